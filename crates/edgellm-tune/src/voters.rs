//! How the exits' next-token distributions become one.
//!
//! - `last`: the whole model's, as if there were no exits.
//! - `max` (EDGE-LLM): the distribution of the most confident exit, `argmax_j max_v p_j(v)`.
//! - `renorm-max` (the paper's published code): `max_j p_j(v)`, renormalised.
//! - `mean`: the log-linear pool `prod_j p_j(v)^(1/k)`, renormalised (Genest and Zidek, 1986).

use edgellm_model::sample::log_softmax;
use edgellm_model::traits::Voter;

use crate::TuneError;

fn check(exits: &[&[f32]], out: &[f32]) {
    assert!(!exits.is_empty(), "a vote needs at least one exit");
    assert!(
        exits.iter().all(|exit| exit.len() == out.len()),
        "exits of lengths {:?} voting over {} tokens",
        exits.iter().map(|e| e.len()).collect::<Vec<_>>(),
        out.len()
    );
}

/// The last exit alone.
#[derive(Clone, Copy, Debug)]
pub struct Last;

impl Voter for Last {
    fn name(&self) -> &'static str {
        "last"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        out.copy_from_slice(exits[exits.len() - 1]);
    }

    fn needs_all_exits(&self) -> bool {
        false
    }
}

/// The most confident exit; of equally confident ones the latest.
#[derive(Clone, Copy, Debug)]
pub struct Max;

impl Voter for Max {
    fn name(&self) -> &'static str {
        "max"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        let confidence = |exit: &[f32]| exit.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let best = exits.iter().max_by(|a, b| confidence(a).total_cmp(&confidence(b)));
        out.copy_from_slice(best.expect("there is at least one exit"));
    }
}

/// Element-wise maximum over the exits, renormalised.
#[derive(Clone, Copy, Debug)]
pub struct RenormMax;

impl Voter for RenormMax {
    fn name(&self) -> &'static str {
        "renorm-max"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        for (token, value) in out.iter_mut().enumerate() {
            *value = exits.iter().map(|exit| exit[token]).fold(f32::NEG_INFINITY, f32::max);
        }
        log_softmax(out);
    }
}

/// Log-linear pool with equal weights.
#[derive(Clone, Copy, Debug)]
pub struct Mean;

impl Voter for Mean {
    fn name(&self) -> &'static str {
        "mean"
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        for (token, value) in out.iter_mut().enumerate() {
            *value = exits.iter().map(|exit| exit[token]).sum::<f32>() / exits.len() as f32;
        }
        log_softmax(out);
    }
}

/// All voters, by name.
pub const VOTERS: [&dyn Voter; 4] = [&Last, &Max, &RenormMax, &Mean];

/// A voter by its name on the command line.
///
/// # Errors
/// No voter has that name.
pub fn voter(name: &str) -> Result<&'static dyn Voter, TuneError> {
    VOTERS.into_iter().find(|v| v.name() == name).ok_or_else(|| TuneError::Setting {
        what: "vote",
        expected: VOTERS.map(|v| v.name()).join(", "),
        found: name.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ln(p: [f32; 3]) -> [f32; 3] {
        p.map(f32::ln)
    }

    fn voted(name: &str, exits: &[[f32; 3]]) -> Vec<f32> {
        let logs: Vec<[f32; 3]> = exits.iter().map(|e| ln(*e)).collect();
        let views: Vec<&[f32]> = logs.iter().map(|e| e.as_slice()).collect();
        let mut out = vec![0.0; 3];
        voter(name).unwrap().vote(&views, &mut out);
        out.iter().map(|v| v.exp()).collect()
    }

    fn close(a: &[f32], b: &[f32]) {
        assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-6), "{a:?} is not {b:?}");
    }

    #[test]
    fn votes_follow_their_formulas() {
        let exits = [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1]];
        close(&voted("last", &exits), &[0.3, 0.6, 0.1]);
        close(&voted("max", &exits), &[0.8, 0.1, 0.1]);
        close(&voted("renorm-max", &exits), &[0.8 / 1.5, 0.6 / 1.5, 0.1 / 1.5]);
        let pool = [(0.8f32 * 0.3).sqrt(), (0.1f32 * 0.6).sqrt(), 0.1];
        let sum: f32 = pool.iter().sum();
        close(&voted("mean", &exits), &pool.map(|p| p / sum));
    }

    #[test]
    fn one_exit_wins_every_vote() {
        for v in VOTERS {
            close(&voted(v.name(), &[[0.2, 0.5, 0.3]]), &[0.2, 0.5, 0.3]);
        }
        assert!(voter("best").is_err());
    }
}
