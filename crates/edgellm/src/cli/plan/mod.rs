//! `edgellm plan`: from a measurement and a budget to a policy, or from many budgets to a curve.

mod explain;
mod pareto;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use edgellm::luc::{
    Costs, DecodeDevice, Paper, PolicyCost, Resource, Sensitivity, Solve, Uniform, bits_per_weight, matrices_bytes,
    policy_cost,
};
use edgellm::model::traits::PolicySolver;
use edgellm::model::values::{
    Budget, CompressionPolicy, LayerFormat, MatrixShape, Measurement, Pattern, read_value, write_value,
};
use edgellm::sched::Roofline;
use serde_json::{Value, json};

use super::failure::Usage;
use super::output::{bytes, parse_size, table};
use super::{Context, check_output_file, profile};

/// Choose a format for every unit of a measured model
#[derive(Args)]
#[command(group = clap::ArgGroup::new("budget").multiple(true).required(true))]
pub(crate) struct Plan {
    /// The measurement, as `edgellm measure` wrote it
    #[arg(long, value_name = "FILE")]
    measurement: PathBuf,
    /// How to choose
    #[arg(long, value_enum, default_value_t = Solver::Solve)]
    solver: Solver,
    /// Mean bits per weight, scales included
    #[arg(long, allow_negative_numbers = true, value_name = "BITS", group = "budget")]
    target_bpw: Option<f64>,
    /// Size of all packed units, such as 60MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "budget")]
    target_size: Option<u64>,
    /// Milliseconds to decode a token, with --profile
    #[arg(long, allow_negative_numbers = true, value_name = "MS", group = "budget", requires = "profile")]
    target_ms: Option<f64>,
    /// Memory while tokens are decoded, such as 100MB, with --profile: weights as they are run, cache for --context
    /// tokens, and buffers; the program itself and its tokenizer come on top
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "budget", requires = "profile")]
    target_peak: Option<u64>,
    /// What the device can do, as `edgellm profile` wrote it
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Tokens in the cache, for times and memory
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    /// The model that is to be compressed: refuses a measurement of another one
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// What solvers look at: the divergence of the model's predictions, or the error of a unit's output (default: kl;
    /// paper: local)
    #[arg(long, value_enum)]
    sensitivity: Option<SensitivityArg>,
    /// Bit width of every unit (uniform), or the base width (paper)
    #[arg(long, value_name = "B", group = "budget")]
    bits: Option<u8>,
    /// Weights that share a scale, with --bits
    #[arg(long, value_name = "G")]
    group_size: Option<u16>,
    /// Mean share of weights to prune (paper), or the share of every unit (uniform, with --bits)
    #[arg(long, allow_negative_numbers = true, value_name = "P", default_value_t = 0.0)]
    target_sparsity: f64,
    /// Which weights to prune (uniform, with --bits): dense, unstructured, 2:4 or 4:8
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<Pattern>,
    /// How much wider a sensitive unit gets (paper)
    #[arg(long, value_name = "BITS", default_value_t = 1)]
    step: u8,
    /// Largest share of weights to prune from one unit (paper)
    #[arg(long, allow_negative_numbers = true, value_name = "P", default_value_t = 0.9)]
    max_sparsity: f64,
    /// Say for each unit what the next better and the next worse format would have done
    #[arg(long, conflicts_with = "pareto")]
    explain: bool,
    #[command(flatten)]
    curve: pareto::CurveArgs,
    /// The policy to write: TOML, or JSON if the name ends in .json
    #[arg(short, long, value_name = "POLICY.toml", required_unless_present = "pareto")]
    output: Option<PathBuf>,
}

/// A policy solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Solver {
    /// One format for every unit
    Uniform,
    /// EDGE-LLM's policy: wider where the sensitivity is above the mean
    Paper,
    /// The least total sensitivity within the budget
    Solve,
}

/// Which sensitivity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SensitivityArg {
    /// The divergence of the model's predictions
    Kl,
    /// The error of the unit's output
    Local,
}

impl Plan {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.check()?;
        if let Some(output) = &self.output {
            check_output_file(output)?;
        }
        let measurement: Measurement = read_value(&self.measurement)?;
        self.check_model(ctx, &measurement)?;
        let roofline = self.roofline(ctx)?;
        let device = roofline.as_ref().map(|model| DecodeDevice { model, context: self.context });
        if self.curve.is_asked() {
            return self.curve.run(ctx, self, &measurement, device);
        }
        let Some(output) = &self.output else { return Err(Usage("expected --output".into()).into()) };
        let budget = Budget {
            bits_per_weight: self.target_bpw,
            bytes: self.target_size,
            milliseconds: self.target_ms,
            peak_bytes: self.target_peak,
        };
        let mut prices = [0.0; 3];
        let mut gap = None;
        let policy = match self.solver {
            Solver::Solve => {
                let solution = self.solve(device).solution(&measurement, &budget)?;
                (prices, gap) = (solution.prices, Some(solution.gap));
                solution.policy
            }
            solver => self.solver(solver, device).solve(&measurement, &budget)?,
        };
        let cost = policy_cost(&measurement, &policy)?;
        write_value(output, &policy)?;
        let costs = Costs::new(&measurement, &budget, device)?;
        let report = Report { measurement: &measurement, policy: &policy, cost: &cost, costs: &costs, prices, gap };
        let mut json = report.json()?;
        json["path"] = json!(output);
        let mut text = report.text()?;
        if self.explain {
            let scarce = scarce(&budget, &prices);
            let sensitivity = self.sensitivity(self.solver);
            let explained = edgellm::luc::explain(&measurement, &policy, &costs, scarce, sensitivity)?;
            json["explain"] = explain::json(&explained);
            text = format!("{}{}", explain::text(&explained, device.is_some()), report.total()?);
        }
        ctx.result(json, || format!("{text}; wrote {}\n", output.display()))
    }

    /// Refuses a measurement of another model than `--model`.
    fn check_model(&self, ctx: &Context, measurement: &Measurement) -> anyhow::Result<()> {
        let Some(name) = &self.model else { return Ok(()) };
        let path = ctx.store.resolve(name)?;
        let found = edgellm::luc::model_digest(&edgellm::model::files::ModelFiles::open(&path)?)?;
        if found == measurement.model_digest {
            return Ok(());
        }
        let known = if measurement.model_digest.is_empty() { "no digest" } else { &measurement.model_digest };
        anyhow::bail!(
            "{}: expected a measurement of {name}, whose weights have the digest {found}, found {known}; measure that model",
            self.measurement.display()
        )
    }

    /// The cost model of `--profile`, for `--threads`.
    fn roofline(&self, ctx: &Context) -> anyhow::Result<Option<Roofline>> {
        let Some(path) = &self.profile else { return Ok(None) };
        let roofline = Roofline::new(profile::read(ctx, path)?)?;
        Ok(Some(match ctx.threads {
            Some(threads) => roofline.with_threads(usize::from(threads))?,
            None => roofline,
        }))
    }

    /// What the arguments cannot mean.
    fn check(&self) -> anyhow::Result<()> {
        let bad = |text: String| Err(Usage(text).into());
        if let Some(bpw) = self.target_bpw.filter(|b| !b.is_finite() || *b <= 0.0) {
            return bad(format!("--target-bpw: expected a number above 0, found {bpw}"));
        }
        if !(0.0..1.0).contains(&self.target_sparsity) || !(0.0..1.0).contains(&self.max_sparsity) {
            let found = format!("{} and {}", self.target_sparsity, self.max_sparsity);
            return bad(format!(
                "--target-sparsity and --max-sparsity: expected at least 0 and below 1, found {found}"
            ));
        }
        if let Some(ms) = self.target_ms.filter(|ms| !ms.is_finite() || *ms <= 0.0) {
            return bad(format!("--target-ms: expected a number above 0, found {ms}"));
        }
        if self.solver == Solver::Solve && self.bits.is_some() {
            return bad(
                "--bits goes with --solver uniform or paper; --solver solve takes --target-bpw or --target-size".into(),
            );
        }
        let one_format = self.solver == Solver::Uniform && self.bits.is_some();
        if self.solver != Solver::Paper && !one_format && self.target_sparsity > 0.0 {
            return bad("--target-sparsity goes with --solver paper, or with --solver uniform and --bits".into());
        }
        match self.pattern {
            None => {}
            Some(_) if !one_format => return bad("--pattern goes with --solver uniform and --bits".into()),
            Some(Pattern::Dense) if self.target_sparsity > 0.0 => {
                return bad(format!(
                    "--pattern dense prunes nothing; found --target-sparsity {}",
                    self.target_sparsity
                ));
            }
            Some(Pattern::Unstructured) if self.target_sparsity == 0.0 => {
                return bad("--pattern unstructured: expected a --target-sparsity above 0".into());
            }
            Some(pattern) if pattern.n_of_m().is_some() && ![0.0, 0.5].contains(&self.target_sparsity) => {
                let found = self.target_sparsity;
                return bad(format!("--pattern {pattern} prunes half of the weights; found --target-sparsity {found}"));
            }
            Some(_) => {}
        }
        if self.group_size.is_some() && self.bits.is_none() {
            return bad("--group-size goes with --bits".into());
        }
        if let Some(bits) = self.bits {
            self.format(bits).packed().map_err(|e| Usage(format!("--bits and --group-size: {e}")))?;
        }
        Ok(())
    }

    fn format(&self, bits: u8) -> LayerFormat {
        let format = if bits >= 16 {
            LayerFormat::float(bits)
        } else {
            LayerFormat::quantized(bits, self.group_size.unwrap_or(32), false)
        };
        match self.pattern {
            Some(pattern) if pattern.n_of_m().is_some() => format.with_n_of_m(pattern),
            _ if self.solver == Solver::Uniform && self.target_sparsity > 0.0 => {
                format.with_sparsity(self.target_sparsity)
            }
            _ => format,
        }
    }

    fn sensitivity(&self, solver: Solver) -> Sensitivity {
        match (self.sensitivity, solver) {
            (Some(SensitivityArg::Kl), _) | (None, Solver::Solve | Solver::Uniform) => Sensitivity::Kl,
            (Some(SensitivityArg::Local), _) | (None, Solver::Paper) => Sensitivity::Local,
        }
    }

    fn solve<'a>(&self, device: Option<DecodeDevice<'a>>) -> Solve<'a> {
        Solve { sensitivity: self.sensitivity(Solver::Solve), device, ..Solve::default() }
    }

    fn solver<'a>(&self, solver: Solver, device: Option<DecodeDevice<'a>>) -> Box<dyn PolicySolver + 'a> {
        match solver {
            Solver::Uniform => Box::new(Uniform { format: self.bits.map(|bits| self.format(bits)), device }),
            Solver::Solve => Box::new(self.solve(device)),
            Solver::Paper => Box::new(Paper {
                base: self.bits,
                step: self.step,
                group_size: self.group_size,
                target_sparsity: self.target_sparsity,
                p_max: self.max_sparsity,
                sensitivity: self.sensitivity(Solver::Paper),
                device,
            }),
        }
    }
}

/// By which resource options are compared: the one whose price is not 0, of several the first; else one that was limited.
fn scarce(budget: &Budget, prices: &[f64; 3]) -> Resource {
    let priced = Resource::ALL.into_iter().zip(prices).find(|(_, price)| **price > 0.0).map(|(r, _)| r);
    let limited = match budget {
        Budget { bytes: None, bits_per_weight: None, milliseconds: Some(_), .. } => Resource::Time,
        _ => Resource::Bytes,
    };
    priced.unwrap_or(limited)
}

/// What is said of a policy.
struct Report<'a> {
    measurement: &'a Measurement,
    policy: &'a CompressionPolicy,
    cost: &'a PolicyCost,
    costs: &'a Costs<'a>,
    prices: [f64; 3],
    /// How far it may be from the best, where the solver knows.
    gap: Option<f64>,
}

/// A unit's index, format, bytes and sensitivity.
type UnitRow = (usize, LayerFormat, u64, Option<f64>);

impl Report<'_> {
    fn units(&self) -> anyhow::Result<Vec<UnitRow>> {
        let mut units = Vec::new();
        for (index, unit) in self.measurement.units.iter().enumerate() {
            let Some(format) = self.policy.format_of(unit.unit) else { continue };
            let size = matrices_bytes(&unit.matrices, &format)?;
            let option = self.measurement.options.iter().position(|o| *o == format);
            units.push((index, format, size, option.and_then(|o| unit.kl.get(o)).copied()));
        }
        Ok(units)
    }

    /// Bytes, nanoseconds and memory of the whole model.
    fn totals(&self) -> anyhow::Result<[u64; 3]> {
        let formats: Vec<LayerFormat> = self.units()?.iter().map(|u| u.1).collect();
        Ok(self.costs.total(&formats)?)
    }

    fn has_device(&self) -> bool {
        self.costs.fixed().resident_bytes > 0
    }

    fn bits(&self, unit: usize, size: u64) -> f64 {
        bits_per_weight(size, self.measurement.units[unit].matrices.iter().map(MatrixShape::weights).sum())
    }

    fn json(&self) -> anyhow::Result<Value> {
        let (policy, cost) = (self.policy, self.cost);
        let units = self.units()?;
        let units = units.iter().map(|&(index, format, size, sensitivity)| {
            json!({
                "unit": self.measurement.units[index].unit, "format": format.to_string(), "bits": format.bit_width,
                "bits_per_weight": self.bits(index, size), "bytes": size, "sparsity": format.sparsity,
                "pattern": format.pattern, "sensitivity": sensitivity,
            })
        });
        let mut json = json!({
            "solver": policy.solver, "bits_per_weight": cost.bits_per_weight, "bytes": cost.bytes,
            "weights": cost.weights, "sensitivity": cost.sensitivity, "gap": self.gap,
            "kl_per_byte": self.prices[0], "kl_per_ms": self.prices[1] * 1e6,
            "kl_per_peak_byte": self.prices[2], "units": units.collect::<Vec<_>>(),
        });
        if self.has_device() {
            let [_, ns, peak] = self.totals()?;
            json["milliseconds"] = json!(ns as f64 / 1e6);
            json["peak_bytes"] = json!(peak);
        }
        Ok(json)
    }

    fn text(&self) -> anyhow::Result<String> {
        let units = self.units()?;
        let rows = units.iter().map(|&(index, format, size, sensitivity)| {
            vec![
                self.measurement.units[index].unit.to_string(),
                format.to_string(),
                format!("{:.2}", self.bits(index, size)),
                bytes(size),
                sensitivity.map_or("-".into(), |s| format!("{s:.2e}")),
            ]
        });
        let header = ["unit", "format", "bits/weight", "size", "sensitivity"];
        Ok(format!("{}{}", table(&header, &rows.collect::<Vec<_>>()), self.total()?))
    }

    /// What the whole model costs, in a line without its end; shadow prices before it.
    fn total(&self) -> anyhow::Result<String> {
        let cost = self.cost;
        let mut text = String::new();
        for (price, name, scale) in [(0, "MB", 1e6), (1, "ms per token", 1e6), (2, "MB of memory", 1e6)] {
            if self.prices[price] > 0.0 {
                text.push_str(&format!("one more {name} would save about {:.2e} of KL\n", self.prices[price] * scale));
            }
        }
        text.push_str(&format!("{:.3} bits per weight, {} in all", cost.bits_per_weight, bytes(cost.bytes)));
        if let Some(sensitivity) = cost.sensitivity {
            text.push_str(&format!(", predicted KL {sensitivity:.4}"));
        }
        if let Some(gap) = self.gap.filter(|gap| *gap > 0.0) {
            text.push_str(&format!(" (the best may have up to {:.1e} less)", gap));
        }
        if self.has_device() {
            let [_, ns, peak] = self.totals()?;
            text.push_str(&format!(", {:.3} ms per token, {} of memory", ns as f64 / 1e6, bytes(peak)));
        }
        Ok(text)
    }
}
