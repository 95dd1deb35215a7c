//! How fast a token is decoded: measured for every packed format, and for what a decoder does beside products.
//!
//! **Products.** For each format, copies of a prepared matrix that together do not fit the caches are multiplied with one
//! token, one after the other, as the layers of a model are. What a call costs, whatever the matrix, is measured with a
//! small one and taken off. **The rest** is what decoders of two sizes take beyond their products: see
//! [`probe`](crate::probe).

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Bytes, Device, Tensor, TensorData};
use edgellm_kernels::{
    Format, PackedHost, PackedLayout, PackedMatrix, QuantFormat, SparsePattern, packed_linear, set_threads, threads,
};
use edgellm_model::ModelError;
use edgellm_model::generate::to_vec;
use edgellm_model::traits::DecoderShape;
use edgellm_model::values::{DecodeRates, FormatRate};

use crate::error::{Result, SchedError};
use crate::probe;

/// Bytes of a format's matrices: more than the caches next to the cores, as a model has.
const WORKING_SET: u64 = 64 << 20;
/// Rows and columns of a matrix.
const ROWS: usize = 2048;
const COLS: usize = 1024;
/// Sweeps over all copies, of which the median counts.
const SWEEPS: usize = 5;
/// How often everything is measured, some seconds apart; the shortest time counts, so that other work that comes and goes
/// does not.
const ROUNDS: usize = 3;
/// Calls with a small matrix.
const SMALL_CALLS: usize = 400;
/// The format of the decoders.
pub(crate) const PROBE_FORMAT: &str = "q4g32s";

/// Values that a block's operators between the products read and write for a token.
pub(crate) fn block_values(shape: &DecoderShape) -> f64 {
    (4 * shape.hidden_size + 2 * shape.query_size + 2 * shape.kv_size + 4 * shape.intermediate_size) as f64
}

/// Positions that a cache of one block has room for when `context` tokens came one by one: it grows by half.
pub(crate) fn cache_positions(context: usize) -> usize {
    let mut room = 0usize;
    while room < context {
        room = (room + 1).max(room + room / 2).next_multiple_of(64);
    }
    room
}

/// Sets the threads of the kernels, and back.
struct Threads(usize);

impl Threads {
    fn set(count: usize) -> Self {
        let before = threads();
        set_threads(count);
        Self(before)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        set_threads(self.0);
    }
}

/// The rates of 1, 2, 4, ... and `threads` threads, with at most `memory` bytes of matrices.
pub(crate) fn measure(threads: usize, memory: u64, on_step: &mut dyn FnMut(usize, usize)) -> Result<Vec<DecodeRates>> {
    let mut counts: Vec<usize> = (0..).map(|k| 1 << k).take_while(|&n| n < threads).collect();
    counts.push(threads);
    let formats = formats();
    let steps = ROUNDS * (formats.len() + counts.len());
    let values = values(ROWS * COLS);
    let mut done = 0;
    let mut step = || {
        done += 1;
        on_step(done, steps);
    };
    let mut products = vec![vec![f64::INFINITY; formats.len()]; counts.len()];
    let mut times = vec![None::<probe::Times>; counts.len()];
    for _ in 0..ROUNDS {
        for (index, format) in formats.iter().enumerate() {
            let product = Products::new(*format, &values, memory.min(WORKING_SET))?;
            for (best, &threads) in products.iter_mut().zip(&counts) {
                let _threads = Threads::set(threads);
                best[index] = best[index].min(product.ns_per_weight()?);
            }
            step();
        }
        for (best, &threads) in times.iter_mut().zip(&counts) {
            let _threads = Threads::set(threads);
            let now = probe::times()?;
            *best = Some(best.map_or(now, |best| best.least(now)));
            step();
        }
    }
    let mut rates = Vec::with_capacity(counts.len());
    for ((threads, products), times) in counts.into_iter().zip(products).zip(times) {
        let rate = |(format, ns_per_weight): (&Format, f64)| FormatRate { format: format.name(), ns_per_weight };
        let formats: Vec<FormatRate> = formats.iter().zip(products).map(rate).collect();
        let probe = formats.iter().find(|f| f.format == PROBE_FORMAT).map(|f| f.ns_per_weight);
        let (Some(probe), Some(times)) = (probe, times) else {
            return Err(SchedError::Unknown { what: "how fast the probe's format is" });
        };
        rates.push(times.rates(threads, probe, formats)?);
    }
    Ok(rates)
}

/// All formats that the suites know, and more sparsities.
fn formats() -> Vec<Format> {
    let mut formats = Format::all();
    let sparse = |bit_width, symmetric, pattern| {
        let dense = QuantFormat { bit_width, group_size: 32, symmetric, ..quantized(PROBE_FORMAT)? };
        dense.with_pattern(pattern).ok().map(Format::Quantized)
    };
    let n_of_m = [SparsePattern::NofM { n: 2, m: 4 }, SparsePattern::NofM { n: 4, m: 8 }];
    let masks = [15, 50, 85].map(|percent| SparsePattern::Bitmask { percent });
    let patterns = || n_of_m.into_iter().chain(masks);
    for bit_width in [2, 3, 4, 5, 6, 8] {
        formats.extend(patterns().filter_map(|pattern| sparse(bit_width, true, pattern)));
    }
    // Asymmetric codes of sparse matrices have no integer kernel; one width stands for all of them.
    formats.retain(|format| format.quantized().is_none_or(|q| !slow(&q)));
    formats.extend(patterns().filter_map(|pattern| sparse(4, false, pattern)));
    let mut seen = std::collections::BTreeSet::new();
    formats.retain(|format| *format != Format::BF16 && seen.insert(format.name()));
    formats
}

fn quantized(name: &str) -> Option<QuantFormat> {
    Format::parse(name).ok()?.quantized()
}

/// Numbers without a pattern, between -1 and 1.
pub(crate) fn values(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let draw = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(draw).collect()
}

/// The same matrix at another place in memory.
pub(crate) fn copy(host: &PackedHost) -> Result<PackedHost> {
    let (words, scales) = (Bytes::from_bytes_vec(host.words.to_vec()), Bytes::from_bytes_vec(host.scales.to_vec()));
    Ok(PackedHost::from_parts(host.layout, words, scales).map_err(ModelError::from)?)
}

/// Copies of a matrix to be multiplied one after the other.
struct Products {
    matrices: Vec<PackedMatrix>,
    small: PackedMatrix,
    x: Tensor<2>,
}

impl Products {
    fn new(format: Format, values: &[f32], memory: u64) -> Result<Self> {
        let device = Device::flex();
        let pack = |rows: usize| -> Result<PackedHost> {
            let layout = PackedLayout::new(rows, COLS, format).map_err(ModelError::from)?;
            let host = PackedHost::quantize(&values[..rows * COLS], layout).map_err(ModelError::from)?;
            Ok(host.prepare().map_err(ModelError::from)?)
        };
        let host = pack(ROWS)?;
        let copies = (memory / host.bytes().max(1)).max(1) as usize;
        let matrices = (0..copies).map(|_| Ok(copy(&host)?.to_device(&device))).collect::<Result<Vec<_>>>()?;
        let x = Tensor::from_data(TensorData::new(values[..COLS].to_vec(), [1, COLS]), &device);
        Ok(Self { matrices, small: pack(16)?.to_device(&device), x })
    }

    /// Nanoseconds for a weight.
    fn ns_per_weight(&self) -> Result<f64> {
        let call = |matrix: &PackedMatrix| -> Result<()> {
            black_box(packed_linear(self.x.clone(), matrix, None));
            Ok(())
        };
        let mut small = Vec::with_capacity(SMALL_CALLS);
        for _ in 0..SMALL_CALLS {
            let start = Instant::now();
            call(&self.small)?;
            small.push(start.elapsed().as_secs_f64());
        }
        let mut sweeps = Vec::with_capacity(SWEEPS);
        for _ in 0..SWEEPS {
            let start = Instant::now();
            for matrix in &self.matrices {
                call(matrix)?;
            }
            sweeps.push(start.elapsed().as_secs_f64());
        }
        // The result is taken out once: the products are done by then, whatever the device does.
        black_box(to_vec(packed_linear(self.x.clone(), &self.small, None))?);
        let n = self.matrices.len() as f64;
        let seconds = (median(&mut sweeps) / n - median(&mut small)).max(0.0);
        let rate = seconds * 1e9 / (ROWS - 16) as f64 / COLS as f64;
        if rate.is_finite() && rate > 0.0 {
            Ok((rate * 1e6).round() / 1e6)
        } else {
            Err(SchedError::Measurement { what: "a product with packed weights", found: rate })
        }
    }
}

pub(crate) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Nanoseconds for a weight of a format: as measured, or as its nearest relative takes.
///
/// Relatives have the same bit width and kind of pattern. Nearest is, in this order, one with codes and scales of the same
/// kind, and one with groups of the nearest size. Among those, the time is interpolated between the nearest kept
/// percentages.
pub(crate) fn rate_of(rates: &DecodeRates, format: Format) -> Result<f64, ModelError> {
    let name = format.name();
    if let Some(rate) = rates.formats.iter().find(|f| f.format == name) {
        return Ok(rate.ns_per_weight);
    }
    let unknown = || ModelError::Value {
        what: "rates of decoding in the device profile".into(),
        expected: format!("the format {name} or one like it"),
        found: "neither; write the profile again".into(),
    };
    let wanted = format.quantized().ok_or_else(unknown)?;
    let relatives = rates.formats.iter().filter_map(|rate| {
        let q = quantized(&rate.format)?;
        let (kind, percent) = pattern(q.pattern);
        let same = kind == pattern(wanted.pattern).0 && slow(&q) == slow(&wanted);
        let width = if slow(&wanted) { true } else { q.bit_width == wanted.bit_width };
        let far = u32::from(q.symmetric != wanted.symmetric) + 2 * u32::from(q.scale_type != wanted.scale_type);
        let groups = (f64::from(q.group_size) / f64::from(wanted.group_size)).log2().abs();
        (same && width).then_some(((far, (groups * 4.0) as u32), percent, rate.ns_per_weight))
    });
    let relatives: Vec<_> = relatives.collect();
    let nearest = relatives.iter().map(|r| r.0).min().ok_or_else(unknown)?;
    let mut line: Vec<(f64, f64)> = relatives.iter().filter(|r| r.0 == nearest).map(|r| (r.1, r.2)).collect();
    line.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(between(&line, pattern(wanted.pattern).1))
}

/// Whether the CPU multiplies it in f32 only.
fn slow(q: &QuantFormat) -> bool {
    q.is_sparse() && !q.symmetric
}

/// Kind of a pattern, and the percentage that it keeps.
fn pattern(pattern: SparsePattern) -> (u32, f64) {
    match pattern {
        SparsePattern::Dense => (0, 100.0),
        SparsePattern::NofM { n, m } => (u32::from(n) << 8 | u32::from(m), 50.0),
        SparsePattern::Bitmask { percent } => (1, f64::from(percent)),
    }
}

/// The value at `x` of the line through points in order; beyond them, that of the nearest.
fn between(line: &[(f64, f64)], x: f64) -> f64 {
    let after = line.partition_point(|p| p.0 <= x);
    match (after.checked_sub(1).map(|i| line[i]), line.get(after)) {
        (Some(a), Some(b)) => a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0),
        (Some(a), None) => a.1,
        (None, Some(b)) => b.1,
        (None, None) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_grow_by_half() {
        for (context, room) in [(0, 0), (1, 64), (64, 64), (65, 128), (129, 192), (193, 320), (321, 512)] {
            assert_eq!(cache_positions(context), room, "{context}");
        }
    }

    #[test]
    fn every_format_of_a_policy_has_a_relative() {
        let formats = formats().iter().map(|f| FormatRate { format: f.name(), ns_per_weight: 1.0 }).collect();
        let rates = DecodeRates {
            threads: 1,
            block_us: 0.0,
            block_value_ns: 0.0,
            attention_ns: 0.0,
            token_us: 0.0,
            logit_ns: 0.0,
            formats,
        };
        for name in ["q2g16a", "q3g64s", "q8g128a", "q4g64s-2:4", "q5g32a-4:8", "q6g32s-b44", "q8g128s-b87", "f16"] {
            assert_eq!(rate_of(&rates, Format::parse(name).unwrap()).unwrap(), 1.0, "{name}");
        }
    }
}
