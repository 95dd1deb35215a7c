//! Newton's method for a convex function of a few variables, one evaluation of everything at a time.
//!
//! An evaluation is a pass over data and dear, and one pass evaluates several functions at their own points; so this is a
//! state machine that says where it wants to be evaluated next, not a loop that calls the function.

/// Value, gradient and Hessian (row-major) at a point.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Evaluation {
    pub(super) value: f64,
    pub(super) gradient: Vec<f64>,
    pub(super) hessian: Vec<f64>,
}

/// Decrease that a step must promise, by the quadratic model, to be worth a pass.
const TOLERANCE: f64 = 1e-6;
/// The shortest part of a Newton step that is tried.
const LEAST_STEP: f64 = 1.0 / 64.0;

/// A minimization under way.
#[derive(Clone, Debug)]
pub(super) struct Newton {
    /// Where the function is to be evaluated next.
    pub(super) point: Vec<f64>,
    best: Option<(Vec<f64>, f64)>,
    /// Direction, promised slope, and the part of it that is being tried.
    step: Option<(Vec<f64>, f64, f64)>,
    done: bool,
}

impl Newton {
    pub(super) fn new(start: Vec<f64>) -> Self {
        Self { point: start, best: None, step: None, done: false }
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// The best point so far and its value.
    pub(super) fn best(&self) -> Option<(&[f64], f64)> {
        self.best.as_ref().map(|(point, value)| (point.as_slice(), *value))
    }

    /// Starts again from the best point: the function has changed (more data).
    pub(super) fn restart(&mut self) {
        if let Some((best, _)) = self.best.take() {
            self.point = best;
        }
        self.step = None;
        self.done = false;
    }

    /// Takes the evaluation at [`Newton::point`], and moves it.
    pub(super) fn evaluated(&mut self, found: &Evaluation) {
        if let (Some((best, value)), Some((direction, slope, part))) = (&self.best, &mut self.step) {
            // Armijo's condition; a value that is no number fails it.
            let enough = found.value <= value + 1e-4 * *part * *slope;
            if !enough {
                *part /= 2.0;
                if *part < LEAST_STEP {
                    self.done = true;
                    self.point.clone_from(best);
                } else {
                    self.point = best.iter().zip(&*direction).map(|(x, d)| x + *part * d).collect();
                }
                return;
            }
        }
        self.best = Some((self.point.clone(), found.value));
        let direction = descent(found);
        let slope: f64 = direction.iter().zip(&found.gradient).map(|(d, g)| d * g).sum();
        // Half of the slope is what the quadratic model promises.
        if !slope.is_finite() || -slope / 2.0 < TOLERANCE {
            self.done = true;
            return;
        }
        self.point = self.point.iter().zip(&direction).map(|(x, d)| x + d).collect();
        self.step = Some((direction, slope, 1.0));
    }
}

/// `-(H + lambda I)^-1 g`, with the least `lambda` of a few that makes the matrix safely positive.
fn descent(at: &Evaluation) -> Vec<f64> {
    let n = at.gradient.len();
    let scale = (0..n).map(|i| at.hessian[i * n + i]).fold(f64::MIN_POSITIVE, f64::max);
    let mut damping = 1e-9;
    while damping < 1e3 {
        let mut matrix = at.hessian.clone();
        (0..n).for_each(|i| matrix[i * n + i] += damping * scale);
        if let Some(x) = solve(matrix, &at.gradient, 1e-10 * scale) {
            return x.into_iter().map(|x| -x).collect();
        }
        damping *= 10.0;
    }
    at.gradient.iter().map(|g| -g / scale).collect()
}

/// Solves a symmetric positive system by Cholesky's factorization; `None` if a pivot is below `least`.
fn solve(mut a: Vec<f64>, b: &[f64], least: f64) -> Option<Vec<f64>> {
    let n = b.len();
    for j in 0..n {
        for i in j..n {
            let sum: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - sum;
            a[i * n + j] = if i == j {
                if rest <= least || rest.is_nan() {
                    return None;
                }
                rest.sqrt()
            } else {
                rest / a[j * n + j]
            };
        }
    }
    let mut x = b.to_vec();
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| a[i * n + k] * x[k]).sum();
        x[i] = (x[i] - sum) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| a[k * n + i] * x[k]).sum();
        x[i] = (x[i] - sum) / a[i * n + i];
    }
    Some(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `log(e^(x+y) + e^(x-3y) + e^(-2x)) + 0.05 (x^2 + y^2)`: convex, and far from quadratic.
    fn evaluate(at: &[f64]) -> Evaluation {
        let rows = [[1.0, 1.0], [1.0, -3.0], [-2.0, 0.0]];
        let s = rows.map(|r| r[0] * at[0] + r[1] * at[1]);
        let max = s.into_iter().fold(f64::NEG_INFINITY, f64::max);
        let e = s.map(|s| (s - max).exp());
        let z: f64 = e.iter().sum();
        let mean = |f: &dyn Fn(&[f64; 2]) -> f64| rows.iter().zip(e).map(|(r, e)| e / z * f(r)).sum::<f64>();
        let m = [mean(&|r| r[0]), mean(&|r| r[1])];
        let cov = |i: usize, j: usize| mean(&|r| r[i] * r[j]) - m[i] * m[j];
        Evaluation {
            value: max + z.ln() + 0.05 * (at[0] * at[0] + at[1] * at[1]),
            gradient: vec![m[0] + 0.1 * at[0], m[1] + 0.1 * at[1]],
            hessian: vec![cov(0, 0) + 0.1, cov(0, 1), cov(1, 0), cov(1, 1) + 0.1],
        }
    }

    #[test]
    fn the_minimum_is_found_from_anywhere() {
        for start in [[0.0, 0.0], [30.0, -20.0], [-5.0, 8.0]] {
            let mut newton = Newton::new(start.to_vec());
            let mut passes = 0;
            while !newton.is_done() {
                newton.evaluated(&evaluate(&newton.point.clone()));
                passes += 1;
                assert!(passes < 60, "from {start:?}");
            }
            let (best, value) = newton.best().unwrap();
            let found = evaluate(best);
            assert_eq!(found.value, value);
            assert!(found.gradient.iter().all(|g| g.abs() < 2e-3), "{found:?} from {start:?}");
        }
    }

    #[test]
    fn systems_are_solved_or_refused() {
        let x = solve(vec![4.0, 2.0, 2.0, 3.0], &[10.0, 8.0], 1e-9).unwrap();
        assert!((x[0] - 1.75).abs() < 1e-12 && (x[1] - 1.5).abs() < 1e-12, "{x:?}");
        assert_eq!(solve(vec![1.0, 1.0, 1.0, 1.0], &[1.0, 1.0], 1e-9), None);
        assert_eq!(solve(vec![f64::NAN], &[1.0], 1e-9), None);
    }
}
