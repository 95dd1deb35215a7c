//! Series of a run's metrics, thin enough to be drawn.

use serde_json::{Map, Value};

/// Points of a series at most.
const MOST: usize = 800;

/// A number of an event.
pub(super) fn number(fields: &Map<String, Value>, name: &str) -> Option<f64> {
    fields.get(name).and_then(Value::as_f64).filter(|value| value.is_finite())
}

/// At most [`MOST`] points: of each stretch the least and the largest value, in their order.
pub(super) fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST / 2);
    let ends = |part: &[(f64, f64)]| {
        let least = (0..part.len()).min_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        let most = (0..part.len()).max_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        let mut ends = vec![part[least.min(most)], part[least.max(most)]];
        ends.dedup();
        ends
    };
    points.chunks(stretch).flat_map(ends).collect()
}

/// The mean of every value and those around it, the farther the less: half of the weight on each side lies on the nearest
/// `half` values.
pub(super) fn smoothed(points: &[(f64, f64)], half: f64) -> Vec<(f64, f64)> {
    let keep = 0.5f64.powf(1.0 / half);
    // Sums and weights of a value and those before it.
    let one_side = |values: &mut dyn Iterator<Item = f64>| -> Vec<(f64, f64)> {
        values
            .scan((0.0, 0.0), |(sum, weight), y| {
                (*sum, *weight) = (keep * *sum + y, keep * *weight + 1.0);
                Some((*sum, *weight))
            })
            .collect()
    };
    let before = one_side(&mut points.iter().map(|p| p.1));
    let after = one_side(&mut points.iter().rev().map(|p| p.1));
    let sides = before.into_iter().zip(after.into_iter().rev());
    // The value itself is on both sides.
    let with_sides = points.iter().zip(sides);
    with_sides.map(|(&(x, y), (a, b))| (x, (a.0 + b.0 - y) / (a.1 + b.1 - 1.0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extremes_stay() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), f64::from(i % 10))).collect();
        points[5432].1 = 1000.0;
        points[777].1 = -5.0;
        let thin = thinned(&points);
        assert!(thin.len() <= MOST && thin.contains(&(5432.0, 1000.0)) && thin.contains(&(777.0, -5.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thinned(&points[..10]), points[..10]);
    }

    #[test]
    fn a_constant_stays_what_it_is() {
        let points = [(0.0, 3.0), (1.0, 3.0), (2.0, 3.0)];
        assert!(smoothed(&points, 2.0).iter().all(|p| (p.1 - 3.0).abs() < 1e-12));
    }

    #[test]
    fn a_mean_does_not_lag() {
        let line: Vec<(f64, f64)> = (0..101).map(|i| (f64::from(i), f64::from(i))).collect();
        let smooth = smoothed(&line, 5.0);
        assert!((smooth[50].1 - 50.0).abs() < 1e-2, "{:?}", smooth[50]);
        assert!(smooth[0].1 > 0.0 && smooth[100].1 < 100.0);
        assert!(smoothed(&[], 5.0).is_empty());
    }
}
