//! Axes: where values lie, and where there are marks.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use super::number;

/// An axis whose coordinates are values, or logarithms of values to base 10.
pub(super) struct Axis {
    range: Range<f64>,
    logarithmic: bool,
    marks: Vec<f64>,
}

impl Axis {
    pub(super) fn new((low, high): (f64, f64), is_logarithmic: bool, most_marks: usize) -> Self {
        let marks = if is_logarithmic { logarithmic(low, high, most_marks) } else { linear(low, high, most_marks) };
        Self { range: low..high, logarithmic: is_logarithmic, marks }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.marks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        number(if self.logarithmic { 10f64.powf(*value) } else { *value })
    }
}

/// Marks of a linear axis: multiples of 1, 2 or 5 times a power of ten, `most` at most.
pub(super) fn linear(low: f64, high: f64, most: usize) -> Vec<f64> {
    let span = high - low;
    if !span.is_finite() || span <= 0.0 {
        return vec![low];
    }
    let least = span / most.max(1) as f64;
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= least).unwrap_or(10.0 * power);
    let (first, last) = ((low / step).ceil(), (high / step).floor());
    let count = (last - first).clamp(-1.0, 10.0 * most as f64) as i64;
    (0..=count).map(|i| (first + i as f64) * step).collect()
}

/// Marks of a logarithmic axis, between the logarithms `low` and `high` to base 10: powers of ten, with 2 and 5 times them
/// where there is room; over less than that, those of a linear axis. Logarithms as well.
pub(super) fn logarithmic(low: f64, high: f64, most: usize) -> Vec<f64> {
    let decades = || (low.floor() as i32..=high.ceil() as i32).take(1000);
    for multiples in [&[1.0, 2.0, 3.0, 5.0, 7.0][..], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]] {
        let marks: Vec<f64> = decades()
            .flat_map(|power| multiples.iter().map(move |m: &f64| m.log10() + f64::from(power)))
            .filter(|mark| (low..=high).contains(mark))
            .collect();
        if marks.len() < 3 {
            break;
        }
        if marks.len() <= most {
            return marks;
        }
    }
    let marks = if high - low < 1.0 { linear(10f64.powf(low), 10f64.powf(high), most) } else { Vec::new() };
    let marks: Vec<f64> = marks.into_iter().filter(|mark| *mark > 0.0).map(f64::log10).collect();
    if marks.is_empty() { linear(low, high, most) } else { marks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_numbers() {
        assert_eq!(linear(0.3, 9.9, 6), [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(linear(-1.0, 1.0, 4), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        let back = |low: f64, high: f64| -> Vec<f64> {
            logarithmic(low.log10(), high.log10(), 8).iter().map(|m| (10f64.powf(*m) * 1e6).round() / 1e6).collect()
        };
        assert_eq!(back(0.008, 0.28), [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2]);
        assert_eq!(back(0.0008, 0.28), [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]);
        assert_eq!(back(2.11, 2.89), [2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8]);
        assert_eq!(back(0.001, 1000.0).len(), 7);
    }

    #[test]
    fn strange_ranges_have_few_marks() {
        for (low, high) in [(0.0, 0.0), (1.0, 1.0 + 1e-12), (-1e300, 1e300), (f64::NAN, 1.0), (5.0, -5.0)] {
            assert!(linear(low, high, 8).len() <= 81, "{low} {high}");
            assert!(logarithmic(low.clamp(-300.0, 300.0), high.clamp(-300.0, 300.0), 8).len() <= 81, "{low} {high}");
        }
    }
}
