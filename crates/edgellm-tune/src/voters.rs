//! How the exits' next-token distributions become one.
//!
//! - `last`: the whole model's, as if there were no exits.
//! - `max` (EDGE-LLM): the distribution of the most confident exit, `argmax_j max_v p_j(v)`.
//! - `renorm-max` (the paper's published code): `max_j p_j(v)`, renormalised.
//! - `mean`: the log-linear pool `prod_j p_j(v)^(1/k)`, renormalised (Genest and Zidek, 1986).
//! - `weighted`: the log-linear pool with fitted weights and temperatures, `prod_j p_j(v)^(w_j/T_j)`, renormalised
//!   (see [`crate::vote`]).
//! - `calibrated-max`, `calibrated-renorm-max`, `calibrated-mean`: as above, on `p_j(v)^(1/T_j)`, renormalised, with the
//!   fitted temperatures `T_j` (Guo et al., "On Calibration of Modern Neural Networks", 2017).
//!
//! `last`, `mean`, `weighted` and `calibrated-mean` are log-linear pools: with a shared head they cost one head product
//! (`edgellm_model::decoder`, `pooled_logits`). The `max` family needs every exit's normalizer, which is a sum over the
//! whole vocabulary, so it costs a head product for each exit.

use edgellm_model::sample::log_softmax;
use edgellm_model::traits::Voter;

use crate::TuneError;
use crate::vote::VoteWeights;

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

    fn pool(&self, n_exits: usize) -> Option<Vec<f32>> {
        let mut weights = vec![0.0; n_exits];
        *weights.last_mut()? = 1.0;
        Some(weights)
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

    fn pool(&self, n_exits: usize) -> Option<Vec<f32>> {
        Some(vec![1.0 / n_exits as f32; n_exits])
    }
}

/// Log-linear pool with a factor on each exit's logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    name: &'static str,
    factors: Vec<f32>,
}

impl Pool {
    /// `factors[j]` is `w_j / T_j` of exit `j`, early to late.
    pub fn new(name: &'static str, factors: Vec<f32>) -> Self {
        Self { name, factors }
    }
}

impl Voter for Pool {
    fn name(&self) -> &'static str {
        self.name
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        assert_eq!(exits.len(), self.factors.len(), "exits and weights of the vote {}", self.name);
        for (token, value) in out.iter_mut().enumerate() {
            // A token that is impossible at an exit of no weight is still possible.
            let used = exits.iter().zip(&self.factors).filter(|(_, factor)| **factor != 0.0);
            *value = used.map(|(exit, factor)| factor * exit[token]).sum();
        }
        log_softmax(out);
    }

    fn pool(&self, n_exits: usize) -> Option<Vec<f32>> {
        assert_eq!(n_exits, self.factors.len(), "exits and weights of the vote {}", self.name);
        Some(self.factors.clone())
    }
}

/// Another vote on tempered exits, `p_j(v)^(1/T_j)` renormalised.
pub struct Calibrated {
    name: &'static str,
    inner: &'static dyn Voter,
    temperatures: Vec<f32>,
}

impl Voter for Calibrated {
    fn name(&self) -> &'static str {
        self.name
    }

    fn vote(&self, exits: &[&[f32]], out: &mut [f32]) {
        check(exits, out);
        assert_eq!(exits.len(), self.temperatures.len(), "exits and temperatures of the vote {}", self.name);
        let temper = |(exit, t): (&&[f32], &f32)| {
            let mut row: Vec<f32> = exit.iter().map(|value| value / t).collect();
            log_softmax(&mut row);
            row
        };
        let rows: Vec<Vec<f32>> = exits.iter().zip(&self.temperatures).map(temper).collect();
        let views: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        self.inner.vote(&views, out);
    }
}

/// All voters that need nothing fitted, by name.
pub const VOTERS: [&dyn Voter; 4] = [&Last, &Max, &RenormMax, &Mean];

/// The voters that need fitted weights or temperatures.
pub const FITTED_VOTERS: [&str; 4] = ["weighted", "calibrated-max", "calibrated-renorm-max", "calibrated-mean"];

/// A voter by its name on the command line, of those that need nothing fitted.
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

/// Any voter by its name on the command line; those of [`FITTED_VOTERS`] take what they need from `fitted`.
///
/// # Errors
/// No voter has that name, or it needs what was not fitted.
pub fn fitted_voter(name: &str, fitted: Option<&VoteWeights>) -> Result<Box<dyn Voter>, TuneError> {
    let Some(known) = FITTED_VOTERS.into_iter().find(|known| *known == name) else {
        return match name {
            "last" => Ok(Box::new(Last)),
            "max" => Ok(Box::new(Max)),
            "renorm-max" => Ok(Box::new(RenormMax)),
            "mean" => Ok(Box::new(Mean)),
            _ => Err(TuneError::Setting {
                what: "vote",
                expected: [VOTERS.map(|v| v.name()).join(", "), FITTED_VOTERS.join(", ")].join(", "),
                found: name.into(),
            }),
        };
    };
    let fitted = fitted.ok_or_else(|| TuneError::Setting {
        what: "vote",
        expected: "an adapter whose vote was fitted (`edgellm vote --fit`)".into(),
        found: format!("{name} without fitted weights"),
    })?;
    let temperatures = fitted.temperatures();
    let calibrated =
        |inner| Box::new(Calibrated { name: known, inner, temperatures: temperatures.clone() }) as Box<dyn Voter>;
    Ok(match known {
        "weighted" => Box::new(Pool::new(known, fitted.factors())),
        "calibrated-mean" => {
            let k = temperatures.len() as f32;
            Box::new(Pool::new(known, temperatures.iter().map(|t| 1.0 / (k * t)).collect()))
        }
        "calibrated-max" => calibrated(&Max),
        _ => calibrated(&RenormMax),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ln(p: [f32; 3]) -> [f32; 3] {
        p.map(f32::ln)
    }

    fn fitted(exits: &[(f64, f64)]) -> VoteWeights {
        let exit = |(index, &(weight, temperature)): (usize, &(f64, f64))| crate::vote::VoteExit {
            exit: index + 1,
            weight,
            temperature,
        };
        VoteWeights::new(exits.iter().enumerate().map(exit).collect(), 1)
    }

    fn voted_with(name: &str, exits: &[[f32; 3]], weights: Option<&VoteWeights>) -> Vec<f32> {
        let logs: Vec<[f32; 3]> = exits.iter().map(|e| ln(*e)).collect();
        let views: Vec<&[f32]> = logs.iter().map(|e| e.as_slice()).collect();
        let mut out = vec![0.0; 3];
        fitted_voter(name, weights).unwrap().vote(&views, &mut out);
        out.iter().map(|v| v.exp()).collect()
    }

    fn voted(name: &str, exits: &[[f32; 3]]) -> Vec<f32> {
        voted_with(name, exits, None)
    }

    fn normalized(p: [f32; 3]) -> [f32; 3] {
        p.map(|value| value / p.iter().sum::<f32>())
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
    fn fitted_votes_follow_their_formulas() {
        let exits = [[0.8f32, 0.1, 0.1], [0.3, 0.6, 0.1]];
        let weights = fitted(&[(-0.5, 2.0), (1.5, 1.5)]);
        let vote = |name| voted_with(name, &exits, Some(&weights));
        let [a, b] = exits;
        let pool = |x: f32, y: f32| normalized([0, 1, 2].map(|v| a[v].powf(x) * b[v].powf(y)));
        close(&vote("weighted"), &pool(-0.25, 1.0));
        close(&vote("calibrated-mean"), &pool(0.25, 1.0 / 3.0));
        let (a, b) = (normalized(a.map(|p| p.powf(0.5))), normalized(b.map(|p| p.powf(1.0 / 1.5))));
        close(&vote("calibrated-max"), &a);
        close(&vote("calibrated-renorm-max"), &normalized([0, 1, 2].map(|v| a[v].max(b[v]))));
        assert!(fitted_voter("weighted", None).is_err_and(|e| e.to_string().contains("edgellm vote --fit")));
        assert!(fitted_voter("best", Some(&weights)).is_err_and(|e| e.to_string().contains("calibrated-mean")));
    }

    #[test]
    fn pools_say_the_same_by_factors() {
        let logits = [[0.3f32, -1.0, 2.0], [1.0, 0.5, -0.2]];
        let weights = fitted(&[(0.4, 2.0), (0.9, 0.8)]);
        for name in ["last", "mean", "weighted", "calibrated-mean"] {
            let voter = fitted_voter(name, Some(&weights)).unwrap();
            let factors = voter.pool(2).unwrap();
            let mut pooled = [0, 1, 2].map(|v| factors[0] * logits[0][v] + factors[1] * logits[1][v]);
            log_softmax(&mut pooled);
            let p = logits.map(|z| normalized(z.map(f32::exp)));
            close(&voted_with(name, &p, Some(&weights)), &pooled.map(f32::exp));
        }
        assert!(Max.pool(2).is_none() && RenormMax.pool(2).is_none());
    }

    #[test]
    fn one_exit_wins_every_vote() {
        for v in VOTERS {
            close(&voted(v.name(), &[[0.2, 0.5, 0.3]]), &[0.2, 0.5, 0.3]);
        }
        assert!(voter("best").is_err());
    }
}
