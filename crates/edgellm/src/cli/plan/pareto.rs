//! `edgellm plan --pareto`: what each solver makes of every budget, as a table and as a chart.

use std::path::PathBuf;

use clap::Args;
use edgellm::eval::chart::{self, Chart, Series};
use edgellm::luc::{DecodeDevice, PolicyCost, policy_cost};
use edgellm::model::io::read_text;
use edgellm::model::values::{Budget, Measurement};
use serde::Deserialize;
use serde_json::json;

use super::{Plan, Solver};
use crate::cli::failure::Usage;
use crate::cli::output::{bytes, table};
use crate::cli::{Context, check_output_file};

/// Budgets at most in one curve.
const MOST: usize = 1000;

/// Options of the curve.
#[derive(Args)]
#[command(next_help_heading = "Curves")]
pub(crate) struct CurveArgs {
    /// Plan for many budgets in bits per weight: FROM:TO:STEP, or a list such as 2.5,3,4
    #[arg(long, value_name = "BITS", group = "budget", value_parser = budgets)]
    pareto: Option<Budgets>,
    /// Solvers to compare
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", requires = "pareto")]
    #[arg(default_values = ["uniform", "paper", "solve"])]
    solvers: Vec<Solver>,
    /// Draw the curves into this SVG file
    #[arg(long, value_name = "FILE.svg", requires = "pareto")]
    chart: Option<PathBuf>,
    /// Measured points to draw beside them: lines {"label": ..., "bytes": ..., "kl": ...}
    #[arg(long, value_name = "FILE.jsonl", requires = "chart")]
    measured: Option<PathBuf>,
}

/// Bits per weight, ascending.
#[derive(Clone, Debug, PartialEq)]
struct Budgets(Vec<f64>);

/// Parses `FROM:TO:STEP` or a list.
fn budgets(text: &str) -> Result<Budgets, String> {
    let bad = || format!("expected FROM:TO:STEP or a list of numbers above 0, found '{text}'");
    let number = |part: &str| match part.trim().parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err(bad()),
    };
    let parts: Vec<&str> = text.split(':').collect();
    let mut list = match *parts.as_slice() {
        [from, to, step] => {
            let (from, to, step) = (number(from)?, number(to)?, number(step)?);
            let count = ((to - from) / step + 1e-9).floor() + 1.0;
            if !(1.0..=MOST as f64).contains(&count) {
                return Err(format!("expected 1 to {MOST} budgets, found '{text}'"));
            }
            // Rounded: 2.2 + 4 * 0.2 is 3.
            (0..count as usize).map(|i| ((from + i as f64 * step) * 1e9).round() / 1e9).collect()
        }
        [list] => list.split(',').map(number).collect::<Result<Vec<_>, _>>()?,
        _ => return Err(bad()),
    };
    list.sort_by(f64::total_cmp);
    list.dedup();
    Ok(Budgets(list))
}

/// A solver's policy for one budget; without one, the solver has none within it.
struct Point {
    solver: &'static str,
    budget: f64,
    found: Option<PolicyCost>,
}

/// A point that somebody measured.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Measured {
    label: String,
    bytes: f64,
    kl: f64,
}

impl CurveArgs {
    pub(super) fn is_asked(&self) -> bool {
        self.pareto.is_some()
    }

    pub(super) fn run(
        &self,
        ctx: &Context,
        plan: &Plan,
        measurement: &Measurement,
        device: Option<DecodeDevice<'_>>,
    ) -> anyhow::Result<()> {
        let Some(Budgets(budgets)) = &self.pareto else { return Ok(()) };
        if plan.output.is_some() {
            return Err(Usage(
                "--pareto writes no policy; expected --chart FILE.svg or no file instead of --output".into(),
            )
            .into());
        }
        if plan.bits.is_some() || plan.target_bpw.is_some() || plan.target_size.is_some() {
            return Err(Usage("--pareto: expected no --bits, --target-bpw or --target-size beside it".into()).into());
        }
        if let Some(path) = &self.chart {
            check_output_file(path)?;
        }
        let measured = self.read_measured()?;
        let mut points = Vec::new();
        let mut refusal = None;
        for &solver in &self.solvers {
            let solver = plan.solver(solver, device);
            for &bits in budgets {
                let budget = Budget {
                    bits_per_weight: Some(bits),
                    milliseconds: plan.target_ms,
                    peak_bytes: plan.target_peak,
                    ..Budget::default()
                };
                let found = match solver.solve(measurement, &budget) {
                    Ok(policy) => Some(policy_cost(measurement, &policy)?),
                    Err(error) => {
                        refusal = Some(error);
                        None
                    }
                };
                points.push(Point { solver: solver.name(), budget: bits, found });
            }
        }
        if let Some(error) = refusal.filter(|_| points.iter().all(|p| p.found.is_none())) {
            return Err(error.into());
        }
        if let Some(path) = &self.chart {
            chart::write(path, &draw(measurement, &points, &measured)?)?;
        }
        self.report(ctx, measurement, &points)
    }

    fn read_measured(&self) -> anyhow::Result<Vec<Measured>> {
        let Some(path) = &self.measured else { return Ok(Vec::new()) };
        let text = read_text(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let read = |(index, line): (usize, &str)| {
            let point: Result<Measured, _> = serde_json::from_str(line);
            match point {
                Ok(p) if p.bytes.is_finite() && p.kl.is_finite() && p.bytes > 0.0 && p.kl >= 0.0 => Ok(p),
                Ok(p) => Err(format!("bytes above 0 and kl of at least 0, found {} and {}", p.bytes, p.kl)),
                Err(e) => Err(format!("{{\"label\", \"bytes\", \"kl\"}}, found {e}")),
            }
            .map_err(|e| anyhow::anyhow!("{}, line {}: expected {e}", path.display(), index + 1))
        };
        lines.map(read).collect()
    }

    fn report(&self, ctx: &Context, measurement: &Measurement, points: &[Point]) -> anyhow::Result<()> {
        let json = json!({
            "model": measurement.model, "compressor": measurement.compressor, "chart": self.chart,
            "points": points.iter().map(|p| json!({
                "solver": p.solver, "budget_bits_per_weight": p.budget,
                "bits_per_weight": p.found.map(|c| c.bits_per_weight), "bytes": p.found.map(|c| c.bytes),
                "kl": p.found.and_then(|c| c.sensitivity),
            })).collect::<Vec<_>>(),
        });
        let row = |p: &Point| {
            let cell = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            vec![
                p.solver.to_string(),
                format!("{}", p.budget),
                cell(p.found.map(|c| format!("{:.3}", c.bits_per_weight))),
                cell(p.found.map(|c| bytes(c.bytes))),
                match p.found {
                    None => "cannot be kept".into(),
                    Some(cost) => cell(cost.sensitivity.map(|s| format!("{s:.4}"))),
                },
            ]
        };
        let rows: Vec<_> = points.iter().map(row).collect();
        let table = table(&["solver", "budget", "bits/weight", "size", "predicted KL"], &rows);
        let wrote = self.chart.as_ref().map_or(String::new(), |path| format!("wrote {}\n", path.display()));
        ctx.result(json, || format!("{table}{wrote}"))
    }
}

/// Bytes against KL, predicted and measured.
fn draw(measurement: &Measurement, points: &[Point], measured: &[Measured]) -> anyhow::Result<String> {
    let mut series: Vec<Series> = Vec::new();
    let mut add = |label: String, point: (f64, f64), line| match series.iter_mut().find(|s| s.label == label) {
        Some(known) => known.points.push(point),
        None => series.push(Series { label, points: vec![point], line, ..Series::default() }),
    };
    for point in points {
        if let Some(PolicyCost { bytes, sensitivity: Some(kl), .. }) = point.found {
            add(format!("{} (predicted)", point.solver), (bytes as f64 / 1e6, kl), true);
        }
    }
    for point in measured {
        add(point.label.clone(), (point.bytes / 1e6, point.kl), true);
    }
    for series in &mut series {
        series.points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        series.points.dedup();
    }
    let title = format!("{}: divergence against size ({})", measurement.model, measurement.compressor);
    let chart =
        Chart { title: &title, x: "MB of packed weights", y: "KL per token (nats)", log_y: true, ..Chart::default() };
    Ok(chart.points(&series)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_ranges_or_lists() {
        let list = |text: &str| budgets(text).map(|b| b.0);
        assert_eq!(list("2.2:3:0.2").unwrap(), [2.2, 2.4, 2.6, 2.8, 3.0]);
        assert_eq!(list("4,2.5,4").unwrap(), [2.5, 4.0]);
        assert_eq!(list("3").unwrap(), [3.0]);
        for bad in ["", "1:2", "3:2:0.5", "2:3:0", "2:1e9:1e-3", "a,b", "-1", "nan", "1:2:3:4"] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }
}
