//! Fitted weights and temperatures of a vote: the value that lies beside an adapter as `vote.json`.
//!
//! The vote `weighted` is the log-linear pool `p(v) ∝ prod_j p_j(v)^(w_j / T_j)`; [`fit_vote`] finds `w` and `T`. PEFT does
//! not know the file and ignores it.

mod fit;
mod newton;
mod states;

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::values::{Value, read_value, write_value};
use serde::{Deserialize, Serialize};

pub use self::fit::{FitProgress, VoteFit, fit_vote};

/// The name of the file in an adapter's folder.
pub const VOTE_FILE: &str = "vote.json";
/// Temperatures are kept in this range: beyond it an exit knows nothing, or the data are too few.
pub const TEMPERATURES: std::ops::RangeInclusive<f64> = 0.05..=20.0;

/// An exit's part in the vote.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct VoteExit {
    /// The exit, as the number of blocks that were run.
    pub exit: usize,
    /// Its weight `w` in the pool; may be negative.
    pub weight: f64,
    /// Its temperature `T`: `p(v)^(1/T)`, renormalised, is its calibrated distribution.
    pub temperature: f64,
}

/// Weights and temperatures of all exits that vote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VoteWeights {
    /// Version of this file format.
    pub format_version: u32,
    /// The exits, ascending; the last is the whole model.
    pub exits: Vec<VoteExit>,
    /// Response tokens that they were fitted on.
    pub tokens: usize,
}

impl Value for VoteWeights {
    const KIND: &'static str = "vote";
    const VERSION: u32 = 1;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}

impl VoteWeights {
    /// Weights that were fitted on so many tokens.
    pub fn new(exits: Vec<VoteExit>, tokens: usize) -> Self {
        Self { format_version: Self::VERSION, exits, tokens }
    }

    /// The factors `w_j / T_j` on the exits' logits.
    pub fn factors(&self) -> Vec<f32> {
        self.exits.iter().map(|e| (e.weight / e.temperature) as f32).collect()
    }

    /// The exits' temperatures.
    pub fn temperatures(&self) -> Vec<f32> {
        self.exits.iter().map(|e| e.temperature as f32).collect()
    }

    /// Reads the vote of the adapter in the folder `adapter`, for a model that is run with these exits; `None` if none
    /// was fitted.
    ///
    /// # Errors
    /// The file cannot be read, has another format, a value that is out of range, or was fitted for other exits.
    pub fn load(adapter: &Path, exits: &[usize]) -> Result<Option<Self>, ModelError> {
        let path = adapter.join(VOTE_FILE);
        if !path.try_exists().map_err(|e| ModelError::io(&path, e))? {
            return Ok(None);
        }
        let vote: Self = read_value(&path)?;
        vote.check(exits).map_err(|reason| ModelError::Parse { path, what: Self::KIND.into(), reason })?;
        Ok(Some(vote))
    }

    /// Writes the vote into the folder of its adapter, replacing an older one.
    ///
    /// # Errors
    /// A value is out of range, or the file cannot be written.
    pub fn save(&self, adapter: &Path) -> Result<(), ModelError> {
        let path = adapter.join(VOTE_FILE);
        let exits: Vec<usize> = self.exits.iter().map(|e| e.exit).collect();
        let bad = |reason| ModelError::Parse { path: path.clone(), what: Self::KIND.into(), reason };
        self.check(&exits).map_err(bad)?;
        write_value(&path, self)
    }

    fn check(&self, exits: &[usize]) -> Result<(), String> {
        let found: Vec<usize> = self.exits.iter().map(|e| e.exit).collect();
        if found != exits || exits.is_empty() {
            return Err(format!("exits: expected {exits:?}, the adapter's, found {found:?}; fit the vote again"));
        }
        for VoteExit { exit, weight, temperature } in &self.exits {
            if !weight.is_finite() || weight.abs() > 1e6 {
                return Err(format!("weight of exit {exit}: expected a number within 1e6 of zero, found {weight}"));
            }
            if !TEMPERATURES.contains(temperature) {
                let (least, most) = (TEMPERATURES.start(), TEMPERATURES.end());
                return Err(format!("temperature of exit {exit}: expected {least} to {most}, found {temperature}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote() -> VoteWeights {
        let exit = |exit, weight, temperature| VoteExit { exit, weight, temperature };
        VoteWeights::new(vec![exit(2, -0.25, 1.5), exit(4, 1.1, 0.75)], 100)
    }

    #[test]
    fn a_vote_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(VoteWeights::load(folder.path(), &[2, 4]).unwrap(), None);
        vote().save(folder.path()).unwrap();
        assert_eq!(VoteWeights::load(folder.path(), &[2, 4]).unwrap(), Some(vote()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(vote().factors(), [(-0.25f64 / 1.5) as f32, (1.1f64 / 0.75) as f32]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let good = serde_json::to_string(&vote()).unwrap();
        let check = |content: &str, expected: &str| {
            std::fs::write(folder.path().join(VOTE_FILE), content).unwrap();
            let error = VoteWeights::load(folder.path(), &[2, 4]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(VOTE_FILE), "{error}");
        };
        check(&good.replace("\"exit\":2", "\"exit\":1"), "expected [2, 4], the adapter's, found [1, 4]");
        check(&good.replace("0.75", "0.0"), "temperature of exit 4");
        check(&good.replace("1.1", "1e9"), "weight of exit 4");
        check(&good.replace("\"format_version\":1", "\"format_version\":9"), "expected 1, found 9");
        check(&good[..good.len() / 2], "vote");
        check("[]", "vote");
        let mut bad = vote();
        bad.exits[0].weight = f64::NAN;
        assert!(bad.save(folder.path()).is_err());
    }
}
