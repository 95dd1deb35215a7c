//! What one run that tunes tells: whether more steps help, which exit or vote to use, and where its time goes.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::about;
use crate::report::{Metrics, STAGES, passes, stage_seconds};

/// Steps of the exit that is trained last, from which something can be said of a trend.
const LEAST_STEPS: usize = 40;
/// Standard errors that make a difference certain, at 5%.
const CERTAIN: f64 = 1.96;
/// The share from which a stage or operator is worth a sentence.
const LARGE_SHARE: f64 = 0.4;

/// Recommendations of a run, in sentences.
pub fn run_recommendations(metrics: &Metrics) -> Vec<String> {
    let all = [skipped(metrics), trend(metrics), exit(metrics), stage(metrics)];
    let mut out: Vec<String> = all.into_iter().flatten().collect();
    out.extend(operators(metrics));
    out.into_iter().map(|sentence| about(&metrics.name, &sentence)).collect()
}

fn number(fields: &Map<String, Value>, name: &str) -> Option<f64> {
    fields.get(name).and_then(Value::as_f64).filter(|value| value.is_finite())
}

fn skipped(metrics: &Metrics) -> Option<String> {
    let all = metrics.of("step").count();
    let skipped = metrics.of("step").filter(|step| step.get("skipped") == Some(&Value::Bool(true))).count();
    (skipped > 0).then(|| {
        format!("{skipped} of {all} steps were left out because loss or gradients were not finite; try a lower learning rate.")
    })
}

/// Whether the loss of the exit that was trained last still falls at the end: its last quarter against the one before.
fn trend(metrics: &Metrics) -> Option<String> {
    let of = |step: &Map<String, Value>| Some((step.get("exit").and_then(Value::as_u64)?, number(step, "loss")?));
    let losses: Vec<(u64, f64)> = metrics.of("step").filter_map(of).collect();
    let exit = losses.last()?.0;
    let losses: Vec<f64> = losses.into_iter().filter(|(of, _)| *of == exit).map(|(_, loss)| loss).collect();
    if losses.len() < LEAST_STEPS {
        return None;
    }
    let quarter = losses.len() / 4;
    let (rest, last) = losses.split_at(losses.len() - quarter);
    let before = &rest[rest.len() - quarter..];
    let (mean_before, error_before) = mean(before);
    let (mean_last, error_last) = mean(last);
    let fell = mean_before - mean_last;
    let error = CERTAIN * error_before.hypot(error_last);
    let figures =
        format!("{mean_last:.4} in the last {quarter} steps of exit {exit}, {mean_before:.4} in those before");
    Some(if fell > error {
        format!("the loss was still falling ({figures}): more steps may help.")
    } else if -fell > error {
        format!("the loss rose at the end ({figures}): try fewer steps or a lower learning rate.")
    } else {
        format!("the loss no longer falls with certainty ({figures}): more of the same steps will hardly help.")
    })
}

/// The mean and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}

/// What tuning changed, and which exit or vote had the least loss on the held-out examples.
fn exit(metrics: &Metrics) -> Option<String> {
    let end = metrics.of("end").last()?;
    let (before, after) = (number(end, "heldout_before")?, number(end, "heldout_after")?);
    let mut found: BTreeMap<String, f64> = BTreeMap::new();
    for exit in end.get("by_exit_after").and_then(Value::as_array).into_iter().flatten() {
        if let (Some(exit), Some(loss)) = (exit["exit"].as_u64(), exit["loss"].as_f64()) {
            found.insert(format!("exit {exit}"), loss);
        }
    }
    for (name, loss) in end.get("votes_after").and_then(Value::as_object).into_iter().flatten() {
        found.extend(loss.as_f64().map(|loss| (format!("the vote '{name}'"), loss)));
    }
    let least = found.iter().min_by(|a, b| a.1.total_cmp(b.1)).filter(|(_, loss)| **loss < after);
    let best = match least {
        Some((name, loss)) => format!("the least has {name}: {loss:.4}"),
        None => "no earlier exit and no vote has less".to_owned(),
    };
    Some(format!("the held-out loss of the last exit was {before:.4} nats before and is {after:.4} after; {best}."))
}

fn stage(metrics: &Metrics) -> Option<String> {
    let (seconds, _) = stage_seconds(metrics);
    let total: f64 = seconds.iter().sum();
    let (name, most) = STAGES.iter().zip(seconds).max_by(|a, b| a.1.total_cmp(&b.1))?;
    (total > 0.0 && most / total >= LARGE_SHARE)
        .then(|| format!("of a step's {:.1} ms the stage '{name}' takes {:.0}%.", 1e3 * total, 100.0 * most / total))
}

fn operators(metrics: &Metrics) -> Vec<String> {
    let sentence = |(pass, operators): (&str, Vec<(String, f64)>)| {
        let total: f64 = operators.iter().map(|(_, ms)| ms).sum();
        let (name, most) = operators.into_iter().next()?;
        (total > 0.0 && most / total >= LARGE_SHARE).then(|| {
            format!(
                "in passes of the kind '{pass}', the operator {name} takes {:.0}% of the time.",
                100.0 * most / total
            )
        })
    };
    passes(metrics).into_iter().map(|(pass, times)| (pass, times.operators())).filter_map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(losses: impl Iterator<Item = f64>) -> Metrics {
        let event = |(i, loss): (usize, f64)| {
            let seconds = json!({"prefix": 0.01, "window": 0.02, "head": 0.01, "backward": 0.1, "update": 0.01});
            let step = json!({"event": "step", "step": i, "exit": 8, "loss": loss, "stage_seconds": seconds, "skipped": i == 3});
            step.as_object().cloned().unwrap()
        };
        Metrics { name: "run".into(), events: losses.enumerate().map(event).collect() }
    }

    /// Noise that has no trend.
    fn noise(i: u32) -> f64 {
        f64::from(i * 37 % 11) / 11.0 - 0.5
    }

    #[test]
    fn a_trend_must_be_larger_than_the_noise() {
        let falling = run_recommendations(&run((0..100).map(|i| 3.0 - 0.02 * f64::from(i) + 0.2 * noise(i))));
        assert!(falling.iter().any(|s| s.contains("still falling")), "{falling:?}");
        let flat = run_recommendations(&run((0..100).map(|i| 2.0 + noise(i))));
        assert!(flat.iter().any(|s| s.contains("no longer falls")), "{flat:?}");
        let rising = run_recommendations(&run((0..100).map(|i| 2.0 + 0.02 * f64::from(i))));
        assert!(rising.iter().any(|s| s.contains("rose at the end")), "{rising:?}");
        let short = run_recommendations(&run((0..20).map(|i| 3.0 - 0.1 * f64::from(i))));
        assert!(!short.iter().any(|s| s.contains("loss") && s.contains("falling")), "{short:?}");
    }

    #[test]
    fn large_stages_and_skipped_steps_are_named() {
        let said = run_recommendations(&run((0..10).map(|_| 1.0)));
        assert!(said.iter().any(|s| s == "run: of a step's 150.0 ms the stage 'backward' takes 67%."), "{said:?}");
        assert!(said[0].starts_with("run: 1 of 10 steps were left out"), "{said:?}");
    }

    #[test]
    fn the_best_vote_is_named_with_its_loss() {
        let end = json!({
            "event": "end", "heldout_before": 5.0, "heldout_after": 2.0,
            "by_exit_after": [{"exit": 4, "loss": 2.5}, {"exit": 8, "loss": 2.0}],
            "votes_after": {"mean": 1.75, "last": 2.0},
        });
        let metrics = Metrics { name: "run".into(), events: vec![end.as_object().cloned().unwrap()] };
        let said = run_recommendations(&metrics);
        assert!(
            said[0].contains("was 5.0000 nats before and is 2.0000 after; the least has the vote 'mean': 1.7500"),
            "{said:?}"
        );
    }

    #[test]
    fn the_longest_operator_is_named() {
        let layers = json!({"event": "layers", "pass": "decode", "tokens": 10, "layers": [
            {"index": 0, "ms": 10.0, "operators": {"qkv": 6.0, "norm": 1.0}}]});
        let metrics = Metrics { name: "run".into(), events: vec![layers.as_object().cloned().unwrap()] };
        assert!(run_recommendations(&metrics)[0].contains("the operator qkv takes 86%"));
    }
}
