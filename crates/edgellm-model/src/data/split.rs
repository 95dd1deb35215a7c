//! Taking examples out of the training data, to measure the loss on.

use std::str::FromStr;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::{ModelError, Result};

/// The stream of the generator, so that other draws with the same seed are independent of these.
const STREAM: u64 = u64::from_be_bytes(*b"valsplit");

/// How much of the data is held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValSplit {
    /// This part of the examples, between 0 and 1, rounded.
    Fraction(f64),
    /// This many examples.
    Count(usize),
}

impl FromStr for ValSplit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is no split; expected a part between 0 and 1, such as 0.05, or a count from 1");
        if let Ok(count) = text.parse::<usize>() {
            return if count > 0 { Ok(Self::Count(count)) } else { Err(bad()) };
        }
        match text.parse::<f64>() {
            Ok(part) if part > 0.0 && part < 1.0 => Ok(Self::Fraction(part)),
            _ => Err(bad()),
        }
    }
}

impl ValSplit {
    /// Splits `items` into those to learn from and those that are held out, both in their old order. Which are held out
    /// depends on the seed and on the number of items only. A fraction leaves at least one on each side.
    ///
    /// # Errors
    /// One side would be empty.
    pub fn split<T>(self, items: Vec<T>, seed: u64) -> Result<(Vec<T>, Vec<T>)> {
        let n = items.len();
        let most = n.saturating_sub(1);
        let count = match self {
            Self::Fraction(part) => ((part * n as f64).round() as usize).clamp(1, most.max(1)),
            Self::Count(count) => count,
        };
        if count == 0 || count > most {
            let (what, found) = ("validation split".into(), format!("{count} of {n}"));
            let expected = format!("from 1 to {most} of the examples, so that one is left on each side");
            let expected = if most == 0 { "at least 2 examples to split".into() } else { expected };
            return Err(ModelError::Value { what, expected, found });
        }
        let mut order: Vec<usize> = (0..n).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(STREAM);
        order.shuffle(&mut rng);
        let mut held_out = vec![false; n];
        for &index in &order[..count] {
            held_out[index] = true;
        }
        let (mut train, mut val) = (Vec::with_capacity(n - count), Vec::with_capacity(count));
        for (item, held_out) in items.into_iter().zip(held_out) {
            if held_out { val.push(item) } else { train.push(item) }
        }
        Ok((train, val))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn splits_parse() {
        assert_eq!("0.05".parse(), Ok(ValSplit::Fraction(0.05)));
        assert_eq!("200".parse(), Ok(ValSplit::Count(200)));
        for bad in ["0", "0.0", "1.0", "1.5", "-1", "-0.1", "nan", "inf", "", "5%"] {
            assert!(bad.parse::<ValSplit>().unwrap_err().contains("is no split"), "{bad}");
        }
    }

    #[test]
    fn impossible_splits_are_refused() {
        let error = |split: ValSplit, n: usize| split.split(vec![(); n], 0).unwrap_err().to_string();
        assert!(error(ValSplit::Count(4), 4).contains("expected from 1 to 3 of the examples"));
        assert!(error(ValSplit::Count(9), 4).contains("found 9 of 4"));
        assert!(error(ValSplit::Count(0), 4).contains("found 0 of 4"));
        assert!(error(ValSplit::Fraction(0.5), 1).contains("at least 2 examples"));
        assert!(error(ValSplit::Fraction(0.5), 0).contains("at least 2 examples"));
        assert_eq!(ValSplit::Fraction(1e-9).split(vec![1, 2], 0).unwrap().1.len(), 1);
        assert_eq!(ValSplit::Fraction(0.999).split(vec![1, 2], 0).unwrap().0.len(), 1);
    }

    proptest! {
        #[test]
        fn both_sides_keep_their_order_and_miss_nothing(n in 2usize..200, part in 0.001f64..0.999, seed: u64) {
            let (train, val) = ValSplit::Fraction(part).split((0..n).collect(), seed).unwrap();
            prop_assert!(!train.is_empty() && !val.is_empty());
            prop_assert!(train.is_sorted() && val.is_sorted());
            let mut all = [train.clone(), val.clone()].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
            prop_assert_eq!(ValSplit::Count(val.len()).split((0..n).collect(), seed).unwrap(), (train, val));
        }
    }

    #[test]
    fn seeds_hold_out_others() {
        let val = |seed| ValSplit::Count(10).split((0..1000).collect::<Vec<i32>>(), seed).unwrap().1;
        assert_eq!(val(1), val(1));
        assert_ne!(val(1), val(2));
        // Not the first or the last ones: spread over the file.
        assert!(val(1)[9] - val(1)[0] > 300, "{:?}", val(1));
    }
}
