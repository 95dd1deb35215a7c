//! Which examples each batch takes.
//!
//! A batch is a pure function of the order, the seed and the batch's number, so that a resumed run takes the examples that
//! it would have taken without stored state. A run whose steps have `m` micro-batches asks for batches `step * m` to
//! `step * m + m - 1`.

use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::TuneError;

/// Epochs take streams of the generator from here on: other draws with the same seed take those from 0.
const FIRST_STREAM: u64 = 1 << 63;

/// Batches among which [`Order::Bucketed`] sorts by length at least and at most. Sorting among few keeps an epoch random,
/// sorting among many leaves less padding.
const POOL: std::ops::RangeInclusive<usize> = 4..=64;

/// An order of examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The file's order, again from the start after the last; a batch may have both ends of the file.
    File,
    /// A new random order for every epoch.
    Shuffled,
    /// A new random order for every epoch, in which examples of similar length share a batch: less is padding. Within
    /// pools of a random order, examples are sorted by length and cut into batches; these are taken in random order (as
    /// `LengthGroupedSampler` of transformers).
    Bucketed,
}

impl Order {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Order::File => "file",
            Order::Shuffled => "shuffled",
            Order::Bucketed => "bucketed",
        }
    }
}

impl FromStr for Order {
    type Err = TuneError;

    fn from_str(name: &str) -> Result<Self, TuneError> {
        let known = [Order::File, Order::Shuffled, Order::Bucketed].into_iter().find(|order| order.name() == name);
        known.ok_or_else(|| TuneError::Setting {
            what: "order of the examples",
            expected: "file, shuffled or bucketed".into(),
            found: name.into(),
        })
    }
}

/// Which examples each batch takes.
///
/// In [`Order::File`] every batch has the full size. In the other orders an epoch is cut into as few batches as the size
/// allows, and these differ by one example at most, so that no batch is a small rest.
///
/// ```
/// use edgellm_tune::order::{BatchOrder, Order};
///
/// let order = BatchOrder::new(Order::Shuffled, &[10, 20, 30, 40, 50], 2, 7)?;
/// let mut epoch = [order.batch(0), order.batch(1), order.batch(2)].concat();
/// epoch.sort();
/// assert_eq!(epoch, [0, 1, 2, 3, 4]);
/// assert_eq!(order.epoch(3), 1);
/// # Ok::<(), edgellm_tune::TuneError>(())
/// ```
#[derive(Debug)]
pub struct BatchOrder {
    order: Order,
    lengths: Vec<usize>,
    batch_size: usize,
    seed: u64,
    /// The epoch that was asked for last: only to save time.
    last: Mutex<Option<Epoch>>,
}

/// The batches of an epoch.
#[derive(Debug)]
struct Epoch {
    number: u64,
    /// Examples, batch by batch.
    examples: Vec<usize>,
    /// The batch at each place.
    batches: Vec<usize>,
}

impl BatchOrder {
    /// The order of examples with these lengths in tokens, `batch_size` at a time.
    ///
    /// # Errors
    /// There is no example, or batches are to have none.
    pub fn new(order: Order, lengths: &[usize], batch_size: usize, seed: u64) -> Result<Self, TuneError> {
        for (what, found) in [("number of examples", lengths.len()), ("batch size", batch_size)] {
            if found == 0 {
                return Err(TuneError::Setting { what, expected: "at least 1".into(), found: "0".into() });
            }
        }
        Ok(Self { order, lengths: lengths.to_vec(), batch_size, seed, last: Mutex::new(None) })
    }

    /// Batches of an epoch. In [`Order::File`] the last of them may take examples of the next.
    pub fn batches_per_epoch(&self) -> usize {
        self.lengths.len().div_ceil(self.batch_size)
    }

    /// The examples of batch `batch`, counted from 0 over the whole run, as places in the list of lengths.
    pub fn batch(&self, batch: u64) -> Vec<usize> {
        if self.order == Order::File {
            let n = self.lengths.len();
            let first = (u128::from(batch) * self.batch_size as u128 % n as u128) as usize;
            return (0..n).cycle().skip(first).take(self.batch_size).collect();
        }
        let number = self.epoch(batch);
        let place = (batch % self.batches_per_epoch() as u64) as usize;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let epoch = last.take().filter(|epoch| epoch.number == number).unwrap_or_else(|| self.draw(number));
        let Epoch { examples, batches, .. } = last.insert(epoch);
        let batch = batches[place];
        examples[self.start(batch)..self.start(batch + 1)].to_vec()
    }

    /// The epoch of the first example of batch `batch`, counted from 0.
    pub fn epoch(&self, batch: u64) -> u64 {
        match self.order {
            Order::File => {
                let epoch = u128::from(batch) * self.batch_size as u128 / self.lengths.len() as u128;
                u64::try_from(epoch).unwrap_or(u64::MAX)
            }
            _ => batch / self.batches_per_epoch() as u64,
        }
    }

    /// Where a batch starts in an epoch's examples: all batches have the same size, but for rounding.
    fn start(&self, batch: usize) -> usize {
        (batch as u128 * self.lengths.len() as u128 / self.batches_per_epoch() as u128) as usize
    }

    fn draw(&self, number: u64) -> Epoch {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(FIRST_STREAM.wrapping_add(number));
        let n_batches = self.batches_per_epoch();
        let mut examples: Vec<usize> = (0..self.lengths.len()).collect();
        let mut batches: Vec<usize> = (0..n_batches).collect();
        examples.shuffle(&mut rng);
        if self.order == Order::Bucketed {
            let pool = (n_batches / 4).clamp(*POOL.start(), *POOL.end());
            for first in (0..n_batches).step_by(pool) {
                let end = self.start((first + pool).min(n_batches));
                // A stable sort: examples of one length keep their random order.
                examples[self.start(first)..end].sort_by_key(|&example| self.lengths[example]);
            }
            batches.shuffle(&mut rng);
        }
        Epoch { number, examples, batches }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ORDERS: [Order; 3] = [Order::File, Order::Shuffled, Order::Bucketed];

    fn any_order() -> impl Strategy<Value = Order> {
        prop::sample::select(ORDERS.to_vec())
    }

    /// Tokens of padding in a number of batches.
    fn padding(order: &BatchOrder, lengths: &[usize], batches: u64) -> usize {
        (0..batches)
            .map(|batch| {
                let of_batch: Vec<usize> = order.batch(batch).into_iter().map(|e| lengths[e]).collect();
                of_batch.iter().max().unwrap() * of_batch.len() - of_batch.iter().sum::<usize>()
            })
            .sum()
    }

    #[test]
    fn the_files_order_starts_again_after_the_last() {
        let order = BatchOrder::new(Order::File, &[1; 5], 2, 0).unwrap();
        let batches: Vec<_> = (0..5).map(|batch| order.batch(batch)).collect();
        assert_eq!(batches, [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]);
        assert_eq!((0..6).map(|batch| order.epoch(batch)).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 2]);
        // As often as it takes.
        assert_eq!(BatchOrder::new(Order::File, &[1; 2], 5, 0).unwrap().batch(1), [1, 0, 1, 0, 1]);
        let far = BatchOrder::new(Order::File, &[1; 3], usize::MAX >> 40, 0).unwrap();
        assert_eq!(far.epoch(u64::MAX), u64::MAX);
    }

    #[test]
    fn epochs_and_seeds_differ() {
        for order in [Order::Shuffled, Order::Bucketed] {
            let epoch = |seed: u64, epoch: u64| {
                let order = BatchOrder::new(order, &[3; 40], 4, seed).unwrap();
                (0..10).flat_map(|place| order.batch(epoch * 10 + place)).collect::<Vec<_>>()
            };
            let seen = [epoch(1, 0), epoch(1, 1), epoch(2, 0), epoch(2, 1), (0..40).collect()];
            for (i, a) in seen.iter().enumerate() {
                assert!(seen[..i].iter().all(|b| b != a), "{order:?}: epoch {i} again");
            }
        }
    }

    #[test]
    fn no_batch_is_a_small_rest() {
        let order = BatchOrder::new(Order::Shuffled, &[1; 9], 4, 0).unwrap();
        assert_eq!([0, 1, 2].map(|batch| order.batch(batch).len()), [3, 3, 3]);
        assert_eq!(order.batches_per_epoch(), 3);
    }

    #[test]
    fn names_and_settings_are_checked() {
        for order in ORDERS {
            assert_eq!(order.name().parse::<Order>().unwrap(), order);
        }
        assert!("random".parse::<Order>().unwrap_err().to_string().contains("expected file, shuffled or bucketed"));
        let error = |lengths: &[usize], size| BatchOrder::new(Order::File, lengths, size, 0).unwrap_err().to_string();
        assert_eq!(error(&[], 4), "number of examples: expected at least 1, found 0");
        assert_eq!(error(&[1], 0), "batch size: expected at least 1, found 0");
    }

    proptest! {
        #[test]
        fn an_epoch_has_every_example_once(
            order in any_order(), lengths in prop::collection::vec(1usize..300, 1..120), size in 1usize..20, seed: u64,
        ) {
            let n = lengths.len();
            let order = BatchOrder::new(order, &lengths, size, seed).unwrap();
            let mut stream = Vec::new();
            for batch in 0.. {
                prop_assert_eq!(order.epoch(batch), (stream.len() / n) as u64);
                if stream.len() >= 3 * n {
                    break;
                }
                let taken = order.batch(batch);
                prop_assert!((1..=size).contains(&taken.len()));
                stream.extend(taken);
            }
            for epoch in stream.chunks_exact(n).take(3) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                prop_assert_eq!(epoch, (0..n).collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_batch_depends_on_nothing_but_its_number(
            order in any_order(), lengths in prop::collection::vec(1usize..300, 1..60), size in 1usize..9, seed: u64,
            asked in prop::collection::vec(0u64..200, 1..20),
        ) {
            let new = || BatchOrder::new(order, &lengths, size, seed).unwrap();
            let one_by_one = new();
            let batches: Vec<Vec<usize>> = (0..200).map(|batch| one_by_one.batch(batch)).collect();
            let at_random = new();
            for batch in asked {
                prop_assert_eq!(&at_random.batch(batch), &batches[batch as usize]);
                prop_assert_eq!(&new().batch(batch), &batches[batch as usize]);
            }
        }

        #[test]
        fn buckets_waste_less_padding(
            lengths in prop::collection::vec(1usize..300, 100..400), size in 2usize..9, seed: u64,
        ) {
            let waste = |order| {
                let order = BatchOrder::new(order, &lengths, size, seed).unwrap();
                padding(&order, &lengths, 2 * order.batches_per_epoch() as u64)
            };
            prop_assert!(waste(Order::Bucketed) < waste(Order::Shuffled));
        }
    }

    #[test]
    fn buckets_leave_little_padding_of_many_examples() {
        let lengths: Vec<usize> = (0..2000).map(|i| i * 7919 % 253 + 4).collect();
        let [shuffled, bucketed] = [Order::Shuffled, Order::Bucketed].map(|order| {
            let order = BatchOrder::new(order, &lengths, 4, 0).unwrap();
            padding(&order, &lengths, order.batches_per_epoch() as u64) as f64 / lengths.iter().sum::<usize>() as f64
        });
        assert!(shuffled > 0.3 && bucketed < 0.02, "padding of {shuffled} and {bucketed} of the tokens");
    }
}
