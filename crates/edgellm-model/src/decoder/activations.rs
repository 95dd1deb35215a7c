//! Ranges of hidden states, for analytics.

use std::borrow::Cow;

use crate::spans;

/// Independent sums, so that the loop runs on vectors.
const LANES: usize = 16;

/// Tells the range of the values behind block `index`, if somebody listens; `None` says that nothing is known.
pub(super) fn activation_range<'a>(index: usize, values: impl FnOnce() -> Option<Cow<'a, [f32]>>) {
    if !tracing::event_enabled!(target: spans::ACTIVATIONS, tracing::Level::TRACE) {
        return;
    }
    if let Some(values) = values().filter(|values| !values.is_empty()) {
        let (min, max, rms) = range(&values);
        tracing::trace!(target: spans::ACTIVATIONS, index, min, max, rms);
    }
}

/// The least and the largest value, and the root of the mean square.
fn range(values: &[f32]) -> (f64, f64, f64) {
    let (mut low, mut high, mut total) = (f32::INFINITY, f32::NEG_INFINITY, 0.0);
    // The sums of a few hundred values in f32, and their sum in f64.
    for part in values.chunks(64 * LANES) {
        let (mut min, mut max, mut sum) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0f32; LANES]);
        for chunk in part.chunks(LANES) {
            for (lane, &value) in chunk.iter().enumerate() {
                min[lane] = min[lane].min(value);
                max[lane] = max[lane].max(value);
                sum[lane] += value * value;
            }
        }
        low = min.into_iter().fold(low, f32::min);
        high = max.into_iter().fold(high, f32::max);
        total += sum.into_iter().map(f64::from).sum::<f64>();
    }
    (f64::from(low), f64::from(high), (total / values.len() as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::range;

    #[test]
    fn a_range_is_that_of_all_values() {
        assert_eq!(range(&[3.0, -4.0]), (-4.0, 3.0, 12.5f64.sqrt()));
        let values: Vec<f32> = (0..5001).map(|i| i as f32 / 5000.0 - 0.25).collect();
        let (min, max, rms) = range(&values);
        let expected = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 5001.0;
        assert_eq!((min, max), (-0.25, 0.75));
        assert!((rms - expected.sqrt()).abs() < 1e-6, "{rms}");
    }
}
