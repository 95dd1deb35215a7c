//! `edgellm bench --kernels`: every operator of the CPU device at chosen shapes, beside the machine's limits, which are
//! measured in the same run.
//!
//! What an operator reads goes round through so many copies that they do not fit the caches, as the layers of a model
//! do not. Bytes are those that must be moved once (weights or keys and values, input, output), operations two for
//! each multiply-add.

use std::hint::black_box;
use std::str::FromStr;
use std::time::{Duration, Instant};

use burn::tensor::{Bytes, Device, Int, Tensor, TensorData};
use clap::Args;
use edgellm::device::DeviceChoice;
use edgellm::kernels::{
    AttentionParams, Ceilings, Format, PackedHost, PackedLayout, PackedMatrix, active_isa, attention,
    cross_entropy_head, measure_ceilings, packed_linear, rms_norm, rope, swiglu, threads,
};
use edgellm::model::decoder::Activations;
use serde::Serialize;

use super::super::failure::Usage;
use super::super::progress::{Counted, Progress};
use super::super::{Context, stop_if_requested};
use super::random::Random;
use super::report::{csv_table, markdown_table};
use super::stats::median;

/// Bytes of the copies that an operator goes round through.
const WORKING_SET: u64 = 256 << 20;
/// How long an operator is timed, if it is done at least [`MIN_CALLS`] times by then.
const TIME: Duration = Duration::from_millis(250);
const MIN_CALLS: usize = 5;
const PREFILL_TOKENS: usize = 512;
const BACKWARD_TOKENS: usize = 256;
/// Rows and columns of the output head.
const HEAD: Shape = Shape { rows: 49152, cols: 576 };
/// Its format where none is asked for; else it is the first.
const HEAD_FORMAT: &str = "q4g32s";
/// Query heads, key heads, their width, and keys.
const ATTENTIONS: [[usize; 4]; 2] = [[9, 3, 64, 512], [32, 8, 128, 2048]];
/// Columns of the operators on activations.
const WIDTHS: [usize; 2] = [576, 4096];

/// Which operators are measured, and how.
#[derive(Args)]
#[command(next_help_heading = "Operators")]
pub(crate) struct KernelArgs {
    /// Measure operators instead of models
    #[arg(long, conflicts_with = "model")]
    pub(crate) kernels: bool,
    /// Only these operators (default: all)
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = operator)]
    only: Vec<&'static str>,
    /// Rows and columns of matrices (default: 576x576,1536x576,576x1536,4096x4096)
    #[arg(long, value_name = "RxC", value_delimiter = ',')]
    shape: Vec<Shape>,
    /// Formats of matrices (default: q2g32s to q8g32s, q4g32a, f16, f32)
    #[arg(long, value_name = "FORMAT", value_delimiter = ',')]
    formats: Vec<Format>,
    /// What quantized weights are multiplied with: int8, f32 (default: both)
    #[arg(long, value_name = "PRECISION", value_delimiter = ',')]
    kernel_activations: Vec<Activations>,
}

/// Shapes of SmolLM2-135M, and one of a 7B model.
const SHAPES: [Shape; 4] = [
    Shape { rows: 576, cols: 576 },
    Shape { rows: 1536, cols: 576 },
    Shape { rows: 576, cols: 1536 },
    Shape { rows: 4096, cols: 4096 },
];
const FORMATS: [&str; 9] = ["q2g32s", "q3g32s", "q4g32s", "q4g32a", "q5g32s", "q6g32s", "q8g32s", "f16", "f32"];

/// A list, or the default where it is empty.
fn or<T: Clone>(list: &[T], default: &[T]) -> Vec<T> {
    if list.is_empty() { default.to_vec() } else { list.to_vec() }
}

/// The operators that can be measured.
const OPERATORS: [&str; 6] = ["packed_linear", "cross_entropy_head", "attention", "rms_norm", "swiglu", "rope"];

fn operator(name: &str) -> Result<&'static str, String> {
    let known = OPERATORS.into_iter().find(|operator| *operator == name);
    known.ok_or_else(|| format!("no operator '{name}'; expected one of {}", OPERATORS.join(", ")))
}

/// Rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    rows: usize,
    cols: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(rows, cols)| Some((rows.parse().ok()?, cols.parse().ok()?)));
        match parsed {
            Some((rows @ 1..=1_048_576, cols @ 1..=1_048_576)) if rows * cols <= 1 << 30 => Ok(Self { rows, cols }),
            _ => Err(format!("'{text}' is no shape; expected rows and columns such as 4096x4096")),
        }
    }
}

/// What an operator reached.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct KernelRow {
    operator: &'static str,
    phase: &'static str,
    shape: String,
    /// Of the packed matrix; `None` for operators without one.
    format: Option<String>,
    activations: &'static str,
    n_tokens: usize,
    isa: &'static str,
    n_threads: usize,
    median_ns: u64,
    /// 1e9 bytes, and 1e9 operations, a second.
    gb_per_second: f64,
    gop_per_second: f64,
    /// The machine's, in the same units.
    read_ceiling: f64,
    /// For the operands' type; `None` where there are no vector instructions for it.
    op_ceiling: Option<f64>,
}

const COLUMNS: [&str; 13] = [
    "operator",
    "phase",
    "shape",
    "format",
    "activations",
    "n_tokens",
    "isa",
    "n_threads",
    "median_ns",
    "gb_per_second",
    "gop_per_second",
    "read_ceiling",
    "op_ceiling",
];

/// All that was measured.
pub(crate) struct Found {
    ceilings: Ceilings,
    pub(crate) rows: Vec<KernelRow>,
}

impl Found {
    pub(crate) fn csv(&self) -> String {
        let values: Vec<_> = self.rows.iter().map(|row| serde_json::json!(row)).collect();
        csv_table(&COLUMNS, &values)
    }

    pub(crate) fn markdown(&self) -> String {
        let percent = |part: f64, whole: Option<f64>| {
            whole.map_or_else(|| "-".to_string(), |whole| format!("{:.0}%", 100.0 * part / whole))
        };
        let rows = self.rows.iter().map(|row| {
            vec![
                format!("{} {}", row.operator, row.phase),
                row.shape.clone(),
                row.format.clone().unwrap_or_else(|| "-".into()),
                row.activations.to_string(),
                row.n_tokens.to_string(),
                format!("{:.1}", row.median_ns as f64 / 1e3),
                format!("{:.1}", row.gb_per_second),
                percent(row.gb_per_second, Some(row.read_ceiling)),
                format!("{:.1}", row.gop_per_second),
                percent(row.gop_per_second, row.op_ceiling),
            ]
        });
        let header = ["operator", "shape", "format", "x", "tokens", "us", "GB/s", "of read", "GOP/s", "of peak"];
        let table = markdown_table(&header, &rows.collect::<Vec<_>>(), 4);
        let Ceilings { read_bytes_per_second, int8_macs_per_second, f32_macs_per_second } = self.ceilings;
        let int8 = int8_macs_per_second.map_or_else(|| "none".to_string(), |macs| format!("{:.0} GOP/s", 2e-9 * macs));
        format!(
            "ceilings with {} threads ({}): read {:.1} GB/s, int8 {int8}, f32 {:.0} GOP/s\n\n{table}",
            threads(),
            active_isa(),
            read_bytes_per_second / 1e9,
            2e-9 * f32_macs_per_second,
        )
    }
}

impl KernelArgs {
    /// Refuses options that only operators have, where models are measured.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let given = [
            ("--only", !self.only.is_empty()),
            ("--shape", !self.shape.is_empty()),
            ("--formats", !self.formats.is_empty()),
            ("--kernel-activations", !self.kernel_activations.is_empty()),
        ];
        match given.into_iter().find(|(_, given)| *given && !self.kernels) {
            Some((name, _)) => Err(Usage(format!("{name} goes with --kernels")).into()),
            None => Ok(()),
        }
    }

    /// Measures all that was asked for.
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<Found> {
        if !matches!(ctx.device, DeviceChoice::Auto | DeviceChoice::Flex) {
            return Err(Usage(format!("--kernels: expected the device flex, found {}", ctx.device)).into());
        }
        let known = FORMATS.iter().map(|name| Format::parse(name)).collect::<Result<Vec<_>, _>>()?;
        let formats = or(&self.formats, &known);
        let shapes = or(&self.shape, &SHAPES);
        let activations = or(&self.kernel_activations, &[Activations::F32, Activations::Int8]);
        // Integer dot products are for quantized weights.
        let kinds = |formats: &[Format]| {
            let all = formats.iter().flat_map(|&format| activations.iter().map(move |&a| (format, a)));
            all.filter(|(f, a)| *a == Activations::F32 || f.quantized().is_some()).collect::<Vec<_>>()
        };
        let head_format = or(&self.formats, &[Format::parse(HEAD_FORMAT)?])[0];
        let (kinds, heads) = (kinds(&formats), kinds(&[head_format]));
        let counts = [
            kinds.len() * shapes.len() * 3,
            heads.len() * 2,
            2 * ATTENTIONS.len(),
            WIDTHS.len(),
            WIDTHS.len(),
            WIDTHS.len(),
        ];
        let wanted = |name: &str| self.only.is_empty() || self.only.contains(&name);
        let total: usize = OPERATORS.iter().zip(counts).filter(|(name, _)| wanted(name)).map(|(_, n)| n).sum();
        ctx.say("measuring the machine's limits, then operators; other work would disturb it");
        let ceilings = measure_ceilings();
        let mut suite = Suite {
            device: Device::flex(),
            random: Random::new(0),
            progress: ctx.progress("bench", total as u64, Counted::Items("operators")),
            found: Found { ceilings, rows: Vec::new() },
        };
        for &shape in shapes.iter().filter(|_| wanted("packed_linear")) {
            for &(format, activations) in &kinds {
                suite.linear(shape, format, activations)?;
            }
        }
        for (format, activations) in heads.into_iter().filter(|_| wanted("cross_entropy_head")) {
            suite.head(format, activations)?;
        }
        for heads in ATTENTIONS.into_iter().filter(|_| wanted("attention")) {
            suite.attention(heads)?;
        }
        let pointwise: Vec<&'static str> = OPERATORS[3..].iter().copied().filter(|name| wanted(name)).collect();
        for width in WIDTHS.into_iter().filter(|_| !pointwise.is_empty()) {
            suite.pointwise(width, &pointwise)?;
        }
        suite.progress.finish();
        Ok(suite.found)
    }
}

/// The operator that a row is about.
struct Case {
    operator: &'static str,
    phase: &'static str,
    shape: String,
    format: Option<Format>,
    activations: Activations,
    tokens: usize,
    bytes: u64,
    macs: u64,
}

struct Suite {
    device: Device,
    random: Random,
    progress: Progress,
    found: Found,
}

impl Suite {
    fn tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.random.signed()).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// So many copies of what `make` makes, of `bytes` each, that they fill the working set.
    fn copies<T>(
        &mut self,
        bytes: u64,
        mut make: impl FnMut(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        (0..WORKING_SET.div_ceil(bytes.max(1)).max(2)).map(|_| make(self)).collect()
    }

    /// Times `call`, which is given the numbers of copies in turn and returns how long the operator took.
    fn time(&mut self, case: Case, copies: usize, mut call: impl FnMut(usize) -> Duration) -> anyhow::Result<()> {
        stop_if_requested()?;
        call(0);
        let mut samples = Vec::new();
        let mut sum = Duration::ZERO;
        while sum < TIME || samples.len() < MIN_CALLS {
            let took = call((samples.len() + 1) % copies);
            sum += took;
            samples.push(took.as_nanos() as f64);
        }
        let ns = median(&samples).max(1.0);
        let peak = match case.activations {
            Activations::F32 => Some(self.found.ceilings.f32_macs_per_second),
            Activations::Int8 => self.found.ceilings.int8_macs_per_second,
        };
        self.found.rows.push(KernelRow {
            operator: case.operator,
            phase: case.phase,
            shape: case.shape,
            format: case.format.map(|format| format.name()),
            activations: case.activations.name(),
            n_tokens: case.tokens,
            isa: active_isa().name(),
            n_threads: threads(),
            median_ns: ns as u64,
            gb_per_second: case.bytes as f64 / ns,
            gop_per_second: 2.0 * case.macs as f64 / ns,
            read_ceiling: self.found.ceilings.read_bytes_per_second / 1e9,
            op_ceiling: peak.map(|macs| 2e-9 * macs),
        });
        self.progress.set(self.found.rows.len() as u64);
        Ok(())
    }

    /// Random values in a format, in the arrangement for these activations.
    fn packed(&mut self, shape: Shape, format: Format, activations: Activations) -> anyhow::Result<PackedHost> {
        let values: Vec<f32> = (0..shape.rows * shape.cols).map(|_| 0.05 * self.random.signed()).collect();
        let host = PackedHost::quantize(&values, PackedLayout::new(shape.rows, shape.cols, format)?)?;
        Ok(if activations == Activations::Int8 { host.prepare()? } else { host })
    }

    fn matrices(
        &mut self,
        shape: Shape,
        format: Format,
        activations: Activations,
    ) -> anyhow::Result<Vec<PackedMatrix>> {
        let host = self.packed(shape, format, activations)?;
        self.copies(host.bytes(), |suite| {
            let copy = |bytes: &Bytes| Bytes::from_bytes_vec(bytes.to_vec());
            let host = PackedHost::from_parts(host.layout, copy(&host.words), copy(&host.scales))?;
            Ok(host.to_device(&suite.device))
        })
    }

    /// `packed_linear` on one token, on many, and back.
    fn linear(&mut self, shape: Shape, format: Format, activations: Activations) -> anyhow::Result<()> {
        let matrices = self.matrices(shape, format, activations)?;
        let n = matrices.len();
        let weights = matrices[0].layout().bytes();
        let case = |phase, tokens: usize| Case {
            operator: "packed_linear",
            phase,
            shape: format!("{}x{}", shape.rows, shape.cols),
            format: Some(format),
            activations,
            tokens,
            bytes: weights + 4 * (tokens * (shape.rows + shape.cols)) as u64,
            macs: (tokens * shape.rows * shape.cols) as u64,
        };
        for (phase, tokens) in [("decode", 1), ("prefill", PREFILL_TOKENS)] {
            let x = self.tensor([tokens, shape.cols]);
            self.time(case(phase, tokens), n, |i| timed(|| packed_linear(x.clone(), &matrices[i], None)))?;
        }
        let x = self.tensor([BACKWARD_TOKENS, shape.cols]);
        self.time(case("backward", BACKWARD_TOKENS), n, |i| {
            let tracked = Tensor::from_inner(x.clone()).require_grad();
            let sum = packed_linear(tracked, &matrices[i], None).sum();
            timed(|| sum.backward())
        })
    }

    /// The loss of the output head, and back.
    fn head(&mut self, format: Format, activations: Activations) -> anyhow::Result<()> {
        let matrices = self.matrices(HEAD, format, activations)?;
        let n = matrices.len();
        let tokens = BACKWARD_TOKENS;
        let hidden = self.tensor([tokens, HEAD.cols]);
        let ids: Vec<i32> = (0..tokens).map(|_| self.random.below(HEAD.rows as u64) as i32).collect();
        let targets = Tensor::<1, Int>::from_data(ids.as_slice(), &self.device);
        let weights = Tensor::<1>::ones([tokens], &self.device);
        // The backward pass computes the logits again.
        let case = |phase, passes: u64| Case {
            operator: "cross_entropy_head",
            phase,
            shape: format!("{}x{}", HEAD.rows, HEAD.cols),
            format: Some(format),
            activations,
            tokens,
            bytes: passes * matrices[0].layout().bytes() + 4 * (tokens * HEAD.cols) as u64,
            macs: passes * (tokens * HEAD.rows * HEAD.cols) as u64,
        };
        self.time(case("forward", 1), n, |i| {
            timed(|| cross_entropy_head(hidden.clone(), &matrices[i], targets.clone(), weights.clone()))
        })?;
        self.time(case("backward", 2), n, |i| {
            let tracked = Tensor::from_inner(hidden.clone()).require_grad();
            let weights = Tensor::from_inner(weights.clone());
            let loss = cross_entropy_head(tracked, &matrices[i], targets.clone(), weights);
            timed(|| loss.backward())
        })
    }

    /// One query after many keys, and as many queries as keys.
    fn attention(&mut self, [heads, kv_heads, dim, keys]: [usize; 4]) -> anyhow::Result<()> {
        let cache = [1, kv_heads, keys, dim];
        let bytes = 8 * (kv_heads * keys * dim) as u64;
        let pairs = self.copies(bytes, |suite| Ok((suite.tensor(cache), suite.tensor(cache))))?;
        for (phase, tokens) in [("decode", 1), ("prefill", keys)] {
            let params = AttentionParams { scale: (dim as f32).sqrt().recip(), offset: keys - tokens, window: None };
            let visible: usize = (0..tokens).map(|t| params.visible(t).len()).sum();
            let q = self.tensor([1, heads, tokens, dim]);
            let case = Case {
                operator: "attention",
                phase,
                shape: format!("{heads}/{kv_heads}x{dim}, {keys} keys"),
                format: None,
                activations: Activations::F32,
                tokens,
                bytes: bytes + 8 * (heads * tokens * dim) as u64,
                macs: 2 * (heads * visible * dim) as u64,
            };
            self.time(case, pairs.len(), |i| {
                let (k, v) = &pairs[i];
                timed(|| attention(q.clone(), k.clone(), v.clone(), params))
            })?;
        }
        Ok(())
    }

    /// Operators that only read and write activations.
    fn pointwise(&mut self, width: usize, operators: &[&'static str]) -> anyhow::Result<()> {
        const HEAD_DIM: usize = 64;
        let tokens = PREFILL_TOKENS;
        let xs: Vec<Tensor<2>> = self.copies(4 * (tokens * width) as u64, |suite| Ok(suite.tensor([tokens, width])))?;
        let n = xs.len();
        let weight = self.tensor([width]);
        let angles = self.tensor([tokens, HEAD_DIM / 2]);
        for &operator in operators {
            let case = Case {
                operator,
                phase: "forward",
                shape: format!("{tokens}x{width}"),
                format: None,
                activations: Activations::F32,
                tokens,
                bytes: 4 * (if operator == "swiglu" { 3 } else { 2 } * tokens * width) as u64,
                macs: (tokens * width) as u64,
            };
            self.time(case, n, |i| match operator {
                "rms_norm" => timed(|| rms_norm(xs[i].clone(), weight.clone(), 1e-5)),
                "swiglu" => timed(|| swiglu(xs[i].clone(), xs[(i + 1) % n].clone())),
                _ => {
                    let x = xs[i].clone().reshape([1, width / HEAD_DIM, tokens, HEAD_DIM]);
                    timed(|| rope(x, angles.clone(), angles.clone()))
                }
            })?;
        }
        Ok(())
    }
}

/// How long something takes; what it gives is dropped afterwards.
fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let start = Instant::now();
    let result = black_box(work());
    let took = start.elapsed();
    drop(result);
    took
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_parse() {
        assert_eq!("576x1536".parse(), Ok(Shape { rows: 576, cols: 1536 }));
        for bad in ["", "5", "0x3", "3x", "axb", "-1x4", "1000000x1000000", "99999999999999999999x1"] {
            assert!(bad.parse::<Shape>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tables_show_parts_of_the_ceilings() {
        let row = KernelRow {
            operator: "packed_linear",
            phase: "decode",
            shape: "4096x4096".into(),
            format: Some("q4g32s".into()),
            activations: "int8",
            n_tokens: 1,
            isa: "avx512",
            n_threads: 1,
            median_ns: 1_000_000,
            gb_per_second: 8.0,
            gop_per_second: 32.0,
            read_ceiling: 32.0,
            op_ceiling: None,
        };
        let ceilings = Ceilings { read_bytes_per_second: 32e9, int8_macs_per_second: None, f32_macs_per_second: 100e9 };
        let found = Found { ceilings, rows: vec![row] };
        let text = found.markdown();
        assert!(text.contains("read 32.0 GB/s, int8 none, f32 200 GOP/s"), "{text}");
        assert!(text.contains("| 25% |") || text.contains(" 25% |"), "{text}");
        let fields = serde_json::json!(found.rows[0]);
        assert_eq!(fields.as_object().unwrap().len(), COLUMNS.len());
        assert!(COLUMNS.iter().all(|column| fields.get(column).is_some()));
        assert!(found.csv().contains("q4g32s,int8,1,avx512,1,1000000,8.0,32.0,32.0,\n"), "{}", found.csv());
    }
}
