//! Mean, standard deviation and median of repeated measurements.

/// The arithmetic mean; 0 of no values.
pub(crate) fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// The standard deviation of a sample, with `n - 1` in the denominator; 0 of fewer than two values.
pub(crate) fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// The middle value, or the mean of the two in the middle; 0 of no values.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_samples() {
        let values = [4.0, 2.0, 9.0, 5.0];
        assert_eq!(mean(&values), 5.0);
        assert_eq!(median(&values), 4.5);
        assert!((deviation(&values) - (26.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn few_values_have_no_spread() {
        assert_eq!((mean(&[]), deviation(&[]), median(&[])), (0.0, 0.0, 0.0));
        assert_eq!((mean(&[7.0]), deviation(&[7.0]), median(&[7.0])), (7.0, 0.0, 7.0));
    }
}
