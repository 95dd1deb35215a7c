//! Confidence intervals and comparisons by the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
//! chapters 13 and 16).
//!
//! A figure is a ratio of sums over the items of a sample (windows, examples, questions): `sum a_i / sum b_i`, such as summed
//! loss over tokens. The percentile interval draws as many items as there are, with replacement, again and again, and takes
//! the 2.5th and the 97.5th percentile of the ratio. It says how far the figure would be from this one on other items *of
//! the same kind*. It does not cover another text, another calibration, or, with few items (below some 20), heavy tails.
//!
//! Two models on the same items are compared by the differences of the items, which are drawn together: most of what makes
//! items differ makes them differ for both.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Samples that are drawn.
const DRAWS: usize = 2000;
/// Draws that share a generator, so that the result does not depend on the threads.
const PART: usize = 125;

/// An item of a sample: what is summed above and below the line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// Such as the summed loss of a window, or 1 for a right answer.
    pub sum: f64,
    /// Such as the window's targets, or 1.
    pub weight: f64,
}

/// `sum / weight` over all items.
pub fn ratio(items: &[Item]) -> f64 {
    let sum: f64 = items.iter().map(|item| item.sum).sum();
    sum / items.iter().map(|item| item.weight).sum::<f64>()
}

/// The 95% percentile interval of [`ratio`]; `None` for fewer than two items.
pub fn interval(items: &[Item], seed: u64) -> Option<(f64, f64)> {
    interval_of(items.len(), seed, |indices| {
        let (mut sum, mut weight) = (0.0, 0.0);
        for index in indices {
            sum += items[index].sum;
            weight += items[index].weight;
        }
        sum / weight
    })
}

/// The 95% percentile interval of what `figure` makes of each draw of `n` items; `None` for fewer than two.
pub(crate) fn interval_of(
    n: usize,
    seed: u64,
    figure: impl Fn(&mut dyn Iterator<Item = usize>) -> f64 + Sync,
) -> Option<(f64, f64)> {
    let mut drawn = draws(n, seed, figure)?;
    // A draw of weightless items only has no ratio.
    drawn.retain(|value| value.is_finite());
    drawn.sort_by(f64::total_cmp);
    Some((percentile(&drawn, 0.025)?, percentile(&drawn, 0.975)?))
}

/// How two figures on the same items differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The second figure less the first.
    pub difference: f64,
    /// Its 95% interval.
    pub interval: (f64, f64),
    /// The achieved significance level, two-sided: how often draws centred on no difference are as far from it.
    pub p: f64,
}

/// Compares two figures on the same items by the paired bootstrap; `None` for fewer than two items.
///
/// # Panics
/// If the numbers of items differ.
pub fn paired_difference(a: &[Item], b: &[Item], seed: u64) -> Option<Difference> {
    assert_eq!(a.len(), b.len(), "the same items");
    let difference = ratio(b) - ratio(a);
    let mut drawn = draws(a.len(), seed, |indices| {
        let mut sums = [0.0; 4];
        for index in indices {
            let (a, b) = (a[index], b[index]);
            for (sum, value) in sums.iter_mut().zip([a.sum, a.weight, b.sum, b.weight]) {
                *sum += value;
            }
        }
        sums[2] / sums[3] - sums[0] / sums[1]
    })?;
    drawn.retain(|value| value.is_finite());
    drawn.sort_by(f64::total_cmp);
    let interval = (percentile(&drawn, 0.025)?, percentile(&drawn, 0.975)?);
    let far = drawn.iter().filter(|value| (*value - difference).abs() >= difference.abs()).count();
    // The sample itself is one of the draws: p is never 0.
    let p = (far + 1) as f64 / (drawn.len() + 1) as f64;
    Some(Difference { difference, interval, p })
}

/// What `figure` makes of each draw of `n` indices.
fn draws(n: usize, seed: u64, figure: impl Fn(&mut dyn Iterator<Item = usize>) -> f64 + Sync) -> Option<Vec<f64>> {
    if n < 2 {
        return None;
    }
    let part = |part: usize| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(part as u64);
        let figure = &figure;
        (0..PART).map(move |_| figure(&mut (0..n).map(|_| random.random_range(0..n)))).collect::<Vec<_>>()
    };
    Some((0..DRAWS / PART).into_par_iter().flat_map_iter(part).collect())
}

fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    Some(sorted[(share * last as f64).round() as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(values: &[f64]) -> Vec<Item> {
        values.iter().map(|&sum| Item { sum, weight: 1.0 }).collect()
    }

    /// Values of a normal distribution with mean 5 and deviation 1.
    fn normal(n: usize, seed: u64) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = || random.random_range(f64::EPSILON..1.0);
        (0..n).map(|_| 5.0 + (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()).collect()
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_the_normal_distribution() {
        let values = normal(400, 1);
        let (low, high) = interval(&items(&values), 0).unwrap();
        let mean = values.iter().sum::<f64>() / 400.0;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 399.0).sqrt();
        let half = 1.96 * deviation / 20.0;
        assert!((low - (mean - half)).abs() < 0.12 * half && (high - (mean + half)).abs() < 0.12 * half);
    }

    #[test]
    fn the_interval_holds_the_truth_about_95_times_of_100() {
        let holds = |seed: &u64| {
            let (low, high) = interval(&items(&normal(60, *seed)), *seed).unwrap();
            (low..=high).contains(&5.0)
        };
        let held = (0..200u64).filter(holds).count();
        assert!((180..=198).contains(&held), "{held} of 200");
    }

    #[test]
    fn pairs_see_what_intervals_hide() {
        let a = normal(50, 3);
        let b: Vec<f64> = a.iter().enumerate().map(|(i, v)| v + 0.1 + 0.02 * (i % 5) as f64).collect();
        let found = paired_difference(&items(&a), &items(&b), 0).unwrap();
        assert!((found.difference - 0.14).abs() < 1e-9 && found.interval.0 > 0.1 && found.p < 0.01, "{found:?}");
        let (own, other) = (interval(&items(&a), 0).unwrap(), interval(&items(&b), 0).unwrap());
        assert!(own.1 > other.0, "unpaired, nothing could be said");
        let same = paired_difference(&items(&a), &items(&a), 0).unwrap();
        assert_eq!((same.difference, same.p), (0.0, 1.0));
    }

    #[test]
    fn draws_do_not_depend_on_anything_but_the_seed() {
        let values = items(&normal(30, 9));
        assert_eq!(interval(&values, 4), interval(&values, 4));
        assert_ne!(interval(&values, 4), interval(&values, 5));
        assert_eq!(interval(&values[..1], 4), None);
        let weighted = [Item { sum: 2.0, weight: 1.0 }, Item { sum: 2.0, weight: 3.0 }];
        assert_eq!(ratio(&weighted), 1.0);
    }
}
