//! The exit where the loss falls fastest for its cost.
//!
//! The signal is the loss-driven learning progress of Graves et al., "Automated Curriculum Learning for Neural Networks"
//! (ICML 2017, sections 3 and 4), divided, as there, by what the step costs: of the last losses of each exit, the slope of
//! the least-squares line, over the mean cost. Probabilities are in proportion to it, with a floor for every exit, so that
//! none starves and an exit that begins to learn is noticed.

use std::collections::VecDeque;

use edgellm_model::ModelError;
use edgellm_model::traits::ExitSchedule;
use rand::RngExt;
use serde_json::{Value, json};

use super::step_rng;

/// Losses of an exit that the slope is taken over.
const WINDOW: usize = 32;

/// Losses of every exit before the slopes count; until then all exits are equally probable.
const MIN_LOSSES: usize = 8;

/// Probability of each exit at least, as a share of that of an even draw.
const FLOOR: f64 = 0.25;

/// A loss and what its step cost.
type Observation = (f64, f64);

/// Draws an exit for each step, in proportion to how fast its loss falls for its cost. A pure function of the seed, the step
/// and the observations.
#[derive(Clone, Debug)]
pub struct Adaptive {
    seed: u64,
    /// The latest observations of each exit, oldest first.
    exits: Vec<VecDeque<Observation>>,
}

impl Adaptive {
    /// A schedule without observations.
    pub fn new(seed: u64) -> Self {
        Self { seed, exits: Vec::new() }
    }

    /// Probability of each of `n_exits` exits for the next step; at least a quarter of `1 / n_exits` each.
    pub fn probabilities(&self, n_exits: usize) -> Vec<f64> {
        let even = 1.0 / n_exits as f64;
        let ready = (0..n_exits).all(|exit| self.exits.get(exit).is_some_and(|seen| seen.len() >= MIN_LOSSES));
        if !ready {
            return vec![even; n_exits];
        }
        let rates: Vec<f64> = self.exits[..n_exits].iter().map(progress).collect();
        let sum: f64 = rates.iter().sum();
        // No exit's loss falls, or numbers at the end of their range.
        if !(sum.is_finite() && sum > 0.0) {
            return vec![even; n_exits];
        }
        rates.into_iter().map(|rate| FLOOR * even + (1.0 - FLOOR) * rate / sum).collect()
    }
}

/// How much the loss falls from one step of the exit to its next for each unit of cost; not below 0.
fn progress(seen: &VecDeque<Observation>) -> f64 {
    let n = seen.len() as f64;
    let middle = (n - 1.0) / 2.0;
    // With the places centred, the slope needs no mean of the losses, but is steadier with it taken off.
    let mean = seen.iter().map(|(loss, _)| loss).sum::<f64>() / n;
    let (mut products, mut squares) = (0.0, 0.0);
    for (place, (loss, _)) in seen.iter().enumerate() {
        let x = place as f64 - middle;
        products += x * (loss - mean);
        squares += x * x;
    }
    let cost = seen.iter().map(|(_, cost)| cost).sum::<f64>() / n;
    (-products / squares).max(0.0) / cost
}

fn usable(&(loss, cost): &Observation) -> bool {
    loss.is_finite() && cost.is_finite() && cost > 0.0
}

impl ExitSchedule for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn choose(&self, step: u64, n_exits: usize) -> usize {
        let draw: f64 = step_rng(self.seed, step).random();
        let mut below = 0.0;
        for (exit, probability) in self.probabilities(n_exits).into_iter().enumerate() {
            below += probability;
            if draw < below {
                return exit;
            }
        }
        // The sum may be a little below 1.
        n_exits - 1
    }

    /// A loss that is not finite (its step was skipped) and a cost that is not above 0 are no observation.
    fn observe(&mut self, exit: usize, loss: f64, cost: f64) {
        if !usable(&(loss, cost)) {
            return;
        }
        if self.exits.len() <= exit {
            self.exits.resize(exit + 1, VecDeque::new());
        }
        let seen = &mut self.exits[exit];
        if seen.len() == WINDOW {
            seen.pop_front();
        }
        seen.push_back((loss, cost));
    }

    /// A list of the exits' lists of `[loss, cost]`.
    fn state(&self) -> Value {
        json!(self.exits)
    }

    fn restore(&mut self, state: &Value) -> Result<(), ModelError> {
        let bad = |found: String| ModelError::Value {
            what: "state of the exit schedule 'adaptive'".into(),
            expected: format!("lists of at most {WINDOW} pairs of a loss and a cost"),
            found,
        };
        let exits: Vec<VecDeque<Observation>> =
            serde::Deserialize::deserialize(state).map_err(|e: serde_json::Error| bad(e.to_string()))?;
        if let Some(seen) = exits.iter().find(|seen| seen.len() > WINDOW) {
            return Err(bad(format!("a list of {}", seen.len())));
        }
        if let Some((loss, cost)) = exits.iter().flatten().find(|pair| !usable(pair)) {
            return Err(bad(format!("a loss of {loss} with a cost of {cost}")));
        }
        self.exits = exits;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run on exits whose losses fall by `falls` at each of their steps, for `costs`, in noise; counts the choices.
    fn run(falls: &[f64], costs: &[f64], steps: u64) -> (Adaptive, Vec<usize>) {
        let mut schedule = Adaptive::new(4);
        let mut counts = vec![0; falls.len()];
        for step in 0..steps {
            let exit = schedule.choose(step, falls.len());
            let noise = 0.05 * ((step as f64 * 12.9898).sin() * 43758.5453).fract();
            let loss = 3.0 - falls[exit] * counts[exit] as f64 + noise;
            schedule.observe(exit, loss, costs[exit]);
            counts[exit] += 1;
        }
        (schedule, counts)
    }

    #[test]
    fn the_exit_that_learns_fastest_is_found() {
        let (schedule, counts) = run(&[0.001, 0.02, 0.001], &[1.0; 3], 600);
        assert!(counts[1] > 300, "{counts:?}");
        assert!(schedule.probabilities(3)[1] > 0.6, "{:?}", schedule.probabilities(3));
    }

    #[test]
    fn of_equal_progress_the_cheap_one_is_better() {
        let (schedule, counts) = run(&[0.02, 0.02], &[1.0, 4.0], 600);
        assert!(counts[0] > 2 * counts[1], "{counts:?}");
        let p = schedule.probabilities(2);
        // 4 to 1 in the part above the floor of 1/8, but for the noise.
        assert!((p[0] - (0.125 + 0.75 * 0.8)).abs() < 0.05, "{p:?}");
    }

    #[test]
    fn no_exit_starves() {
        // The first exit's loss rises: its rate is 0.
        let (schedule, counts) = run(&[-0.01, 0.02, 0.02, 0.02], &[1.0; 4], 4000);
        let p = schedule.probabilities(4);
        assert!(p.iter().all(|p| *p >= 0.0625), "{p:?}");
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((counts[0] as f64 / 4000.0 - 0.0625).abs() < 0.02, "{counts:?}");
    }

    #[test]
    fn before_enough_is_known_all_are_equal() {
        let mut schedule = Adaptive::new(0);
        assert_eq!(schedule.probabilities(4), [0.25; 4]);
        for place in 0..100 {
            schedule.observe(0, 5.0 - 0.1 * f64::from(place), 1.0);
        }
        assert_eq!(schedule.probabilities(2), [0.5; 2]);
        schedule.observe(1, f64::NAN, 1.0);
        schedule.observe(1, 1.0, 0.0);
        assert_eq!(schedule.exits.len(), 1, "a step that was skipped is no observation");
        // Nothing falls.
        let mut flat = Adaptive::new(0);
        for place in 0..20 {
            flat.observe(place % 2, 1.0, 1.0);
        }
        assert_eq!(flat.probabilities(2), [0.5; 2]);
    }

    #[test]
    fn a_restored_schedule_chooses_the_same() {
        let (mut a, _) = run(&[0.001, 0.02, 0.005], &[1.0, 2.0, 3.0], 200);
        let mut b = Adaptive::new(4);
        b.restore(&a.state()).unwrap();
        for step in 200..400 {
            let exit = a.choose(step, 3);
            assert_eq!(exit, a.choose(step, 3), "a choice changes nothing");
            assert_eq!(exit, b.choose(step, 3));
            let loss = 2.0 + (step as f64).sin();
            a.observe(exit, loss, 1.0);
            b.observe(exit, loss, 1.0);
        }
        assert_eq!(a.state(), b.state());
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let (mut schedule, _) = run(&[0.01, 0.02], &[1.0; 2], 50);
        let before = schedule.state();
        let long: Vec<Observation> = vec![(1.0, 1.0); WINDOW + 1];
        for state in [json!(null), json!({"a": 1}), json!([[[1.0]]]), json!([[[1.0, 0.0]]]), json!([long])] {
            let error = schedule.restore(&state).unwrap_err().to_string();
            assert!(error.contains("expected lists of at most 32 pairs"), "{error}");
            assert_eq!(schedule.state(), before);
        }
    }
}
