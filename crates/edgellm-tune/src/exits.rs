//! Which exit a tuning step trains, and which blocks lie in its window (EDGE-LLM, DAC 2024, section on adaptive layer tuning).

mod adaptive;

use std::ops::Range;

use edgellm_model::traits::ExitSchedule;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use adaptive::Adaptive;

use crate::TuneError;

/// The blocks that a step at `exit` trains: the `depth` blocks that end there.
pub fn window(exit: usize, depth: usize) -> Range<usize> {
    exit.saturating_sub(depth)..exit
}

/// How strongly the exits before the last are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitScale {
    /// Every exit with the full learning rate.
    Equal,
    /// `e (e + 1) / (L (L + 1))` of it at the exit after `e` of `L` blocks: the loss scale of LayerSkip (Elhoushi et al.,
    /// ACL 2024, section 4.1.2). What an early window learns for its own exit is a change under everything above it,
    /// which the few steps of a short run cannot make good.
    Depth,
}

impl ExitScale {
    /// The factor on the learning rate of the exit after `exit` of `n_blocks` blocks.
    pub fn factor(self, exit: usize, n_blocks: usize) -> f64 {
        let triangle = |n: usize| (n * (n + 1)) as f64;
        match self {
            ExitScale::Equal => 1.0,
            ExitScale::Depth => triangle(exit) / triangle(n_blocks),
        }
    }
}

impl std::str::FromStr for ExitScale {
    type Err = TuneError;

    fn from_str(s: &str) -> Result<Self, TuneError> {
        match s {
            "equal" => Ok(ExitScale::Equal),
            "depth" => Ok(ExitScale::Depth),
            other => {
                Err(TuneError::Setting { what: "exit scale", expected: "equal or depth".into(), found: other.into() })
            }
        }
    }
}

/// All steps of the earliest exit first, then the next, up to the last: from shallow to deep, with shares that grow as
/// 1 : 2 : ... : k, since the deepest exit is the one that most people use, and must make good what the others changed.
#[derive(Clone, Copy, Debug)]
pub struct Sequential {
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl ExitSchedule for Sequential {
    fn name(&self) -> &'static str {
        "sequential"
    }

    fn choose(&self, step: u64, n_exits: usize) -> usize {
        // Exit `i` ends where the first `(i + 1) (i + 2)` of `k (k + 1)` parts of the run end.
        let parts = |exits: usize| (exits * (exits + 1)) as u128;
        let done = u128::from(step) * parts(n_exits);
        let total = u128::from(self.total_steps.max(1));
        (0..n_exits - 1).find(|&exit| done < total * parts(exit + 1)).unwrap_or(n_exits - 1)
    }
}

/// One exit after the other, again and again.
#[derive(Clone, Copy, Debug)]
pub struct Cyclic;

impl ExitSchedule for Cyclic {
    fn name(&self) -> &'static str {
        "cyclic"
    }

    fn choose(&self, step: u64, n_exits: usize) -> usize {
        (step % n_exits as u64) as usize
    }
}

/// An exit at random for each step (the paper's choice).
#[derive(Clone, Copy, Debug)]
pub struct Uniform {
    /// Seed of the draws.
    pub seed: u64,
}

impl ExitSchedule for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn choose(&self, step: u64, n_exits: usize) -> usize {
        step_rng(self.seed, step).random_range(0..n_exits)
    }
}

/// A stream per step: a draw depends on nothing but the seed and the step.
fn step_rng(seed: u64, step: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(step);
    rng
}

/// An exit schedule by its name on the command line.
///
/// # Errors
/// No schedule has that name.
pub fn exit_schedule(name: &str, total_steps: u64, seed: u64) -> Result<Box<dyn ExitSchedule>, TuneError> {
    match name {
        "sequential" => Ok(Box::new(Sequential { total_steps })),
        "cyclic" => Ok(Box::new(Cyclic)),
        "uniform" => Ok(Box::new(Uniform { seed })),
        "adaptive" => Ok(Box::new(Adaptive::new(seed))),
        other => Err(TuneError::Setting {
            what: "exit schedule",
            expected: "sequential, cyclic, uniform or adaptive".into(),
            found: other.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(schedule: &dyn ExitSchedule, steps: u64, n: usize) -> Vec<usize> {
        (0..steps).map(|step| schedule.choose(step, n)).collect()
    }

    #[test]
    fn sequential_goes_from_shallow_to_deep_in_growing_shares() {
        assert_eq!(chosen(&Sequential { total_steps: 10 }, 10, 4), [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]);
        assert_eq!(chosen(&Sequential { total_steps: 3 }, 5, 2), [0, 1, 1, 1, 1]);
        assert_eq!(chosen(&Sequential { total_steps: 5 }, 5, 1), [0; 5]);
        let shares = chosen(&Sequential { total_steps: 1000 }, 1000, 4);
        let counts = [0, 1, 2, 3].map(|exit| shares.iter().filter(|&&e| e == exit).count());
        assert_eq!(counts, [100, 200, 300, 400]);
    }

    #[test]
    fn uniform_depends_on_seed_and_step_only() {
        let schedule = Uniform { seed: 5 };
        let draws = chosen(&schedule, 4000, 4);
        for exit in 0..4 {
            let share = draws.iter().filter(|&&e| e == exit).count() as f64 / 4000.0;
            assert!((share - 0.25).abs() < 0.03, "exit {exit}: {share}");
        }
        assert_eq!(schedule.choose(1234, 4), draws[1234]);
        assert_ne!(draws, chosen(&Uniform { seed: 6 }, 4000, 4));
    }

    #[test]
    fn schedules_have_names_and_most_have_no_state() {
        for name in ["sequential", "cyclic", "uniform", "adaptive"] {
            let mut schedule = exit_schedule(name, 10, 0).unwrap();
            assert_eq!(schedule.name(), name);
            let state = schedule.state();
            assert_eq!(state.is_null(), name != "adaptive");
            schedule.restore(&state).unwrap();
            assert!(schedule.restore(&serde_json::json!([1])).unwrap_err().to_string().contains(name));
        }
        assert!(exit_schedule("best", 1, 0).is_err());
    }

    #[test]
    fn early_exits_are_trained_less() {
        assert_eq!(ExitScale::Equal.factor(8, 30), 1.0);
        assert_eq!(ExitScale::Depth.factor(30, 30), 1.0);
        assert!((ExitScale::Depth.factor(8, 30) - 72.0 / 930.0).abs() < 1e-12);
        assert!("none".parse::<ExitScale>().is_err());
    }

    #[test]
    fn windows_end_at_the_exit() {
        assert_eq!(window(15, 8), 7..15);
        assert_eq!(window(4, 8), 0..4);
    }
}
