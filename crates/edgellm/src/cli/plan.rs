//! `edgellm plan`: from a measurement and a budget to a policy.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use edgellm::luc::{Paper, PolicyCost, Solve, Uniform, bits_per_weight, matrices_bytes, policy_cost};
use edgellm::model::traits::PolicySolver;
use edgellm::model::values::{
    Budget, CompressionPolicy, LayerFormat, MatrixShape, Measurement, Pattern, read_value, write_value,
};
use serde_json::json;

use super::failure::Usage;
use super::output::{bytes, parse_size, table};
use super::{Context, check_output_file};

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
    /// The policy to write: TOML, or JSON if the name ends in .json
    #[arg(short, long, value_name = "POLICY.toml")]
    output: PathBuf,
}

/// A policy solver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Solver {
    /// One format for every unit
    Uniform,
    /// EDGE-LLM's policy: wider where the sensitivity is above the mean
    Paper,
    /// The least total sensitivity within the budget
    Solve,
}

impl Plan {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.check()?;
        check_output_file(&self.output)?;
        let measurement: Measurement = read_value(&self.measurement)?;
        let budget = Budget { bits_per_weight: self.target_bpw, bytes: self.target_size };
        let policy = self.solver()?.solve(&measurement, &budget)?;
        let cost = policy_cost(&measurement, &policy)?;
        write_value(&self.output, &policy)?;
        self.report(ctx, &measurement, &policy, &cost)
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

    fn solver(&self) -> anyhow::Result<Box<dyn PolicySolver>> {
        Ok(match self.solver {
            Solver::Uniform => Box::new(Uniform { format: self.bits.map(|bits| self.format(bits)) }),
            Solver::Solve => Box::new(Solve::default()),
            Solver::Paper => Box::new(Paper {
                base: self.bits,
                step: self.step,
                group_size: self.group_size,
                target_sparsity: self.target_sparsity,
                p_max: self.max_sparsity,
            }),
        })
    }

    fn report(
        &self,
        ctx: &Context,
        measurement: &Measurement,
        policy: &CompressionPolicy,
        cost: &PolicyCost,
    ) -> anyhow::Result<()> {
        let mut rows = Vec::new();
        let mut units = Vec::new();
        for unit in &measurement.units {
            let Some(format) = policy.format_of(unit.unit) else { continue };
            let size = matrices_bytes(&unit.matrices, &format)?;
            let bits = bits_per_weight(size, unit.matrices.iter().map(MatrixShape::weights).sum());
            let option = measurement.options.iter().position(|o| *o == format);
            let sensitivity = option.and_then(|o| unit.kl.get(o)).copied();
            rows.push(vec![
                unit.unit.to_string(),
                format.to_string(),
                format!("{bits:.2}"),
                bytes(size),
                sensitivity.map_or("-".into(), |s| format!("{s:.2e}")),
            ]);
            units.push(json!({
                "unit": unit.unit, "format": format.to_string(), "bits": format.bit_width, "bits_per_weight": bits,
                "bytes": size, "sparsity": format.sparsity, "pattern": format.pattern, "sensitivity": sensitivity,
            }));
        }
        let json = json!({
            "solver": policy.solver, "bits_per_weight": cost.bits_per_weight, "bytes": cost.bytes,
            "weights": cost.weights, "sensitivity": cost.sensitivity, "path": self.output, "units": units,
        });
        ctx.result(json, || {
            let table = table(&["unit", "format", "bits/weight", "size", "sensitivity"], &rows);
            let total = format!("{:.3} bits per weight, {} in all", cost.bits_per_weight, bytes(cost.bytes));
            format!("{table}{total}; wrote {}\n", self.output.display())
        })
    }
}
