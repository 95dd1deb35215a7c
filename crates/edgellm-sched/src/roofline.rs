//! The roofline cost model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
//! multicore architectures", CACM 2009).
//!
//! A matrix `[n, k]` in a format with `b` bytes, applied to `t` tokens, takes
//!
//! `time = max((b + 4 t (n + k)) / bandwidth, n k t / rate) + handover`
//!
//! with the read bandwidth of all threads together, the f32 multiply-add rate of all cores together, and the time to
//! start and join one parallel region. Input and output are f32. Tuning adds the gradient to the input, which reads the
//! same packed weights again and does as many multiply-adds: twice the time. Unpacking is not counted: it
//! overlaps with reading where memory is the limit, and is shared by many tokens where it is not.
//!
//! A single token is another matter: unpacking is most of its work, and differs from format to format. Where the profile
//! has [`DecodeRates`], they are used for it: see there for the formula.

use edgellm_kernels::{Format, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::traits::{CostModel, DecoderShape, UnitCost, Workload};
use edgellm_model::values::{DecodeRates, DeviceProfile, LayerFormat, MatrixShape};

use crate::decode::{block_values, cache_positions, rate_of};
use crate::error::{Result, SchedError};

/// The roofline of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Roofline {
    profile: DeviceProfile,
    bytes_per_ms: f64,
    macs_per_ms: f64,
    handover_ms: f64,
    /// Threads that decode; `None` for as many as were measured at most.
    threads: Option<usize>,
}

impl Roofline {
    /// The roofline of a profile.
    ///
    /// # Errors
    /// A rate of the profile that is missing, not finite or not above zero.
    pub fn new(profile: DeviceProfile) -> Result<Self> {
        let bad = |field, expected, found: String| {
            Err(SchedError::Profile { profile: profile.name.clone(), field, expected, found })
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if profile.read_gbps.is_empty() || !profile.read_gbps.iter().all(|v| positive(*v)) {
            return bad("read_gbps", "at least one number, all above 0", format!("{:?}", profile.read_gbps));
        }
        let usable = |c: &edgellm_model::values::CoreKind| c.count > 0 && positive(c.gmacs_f32);
        if profile.cores.is_empty() || !profile.cores.iter().all(usable) {
            return bad("cores", "at least one kind, with count and gmacs_f32 above 0", format!("{:?}", profile.cores));
        }
        if !profile.handover_us.is_finite() || profile.handover_us < 0.0 {
            return bad("handover_us", "a number that is not negative", profile.handover_us.to_string());
        }
        for rates in &profile.decode {
            let fixed = [rates.block_us, rates.block_value_ns, rates.attention_ns, rates.token_us, rates.logit_ns];
            let sound = fixed.iter().all(|v| v.is_finite() && *v >= 0.0);
            if rates.threads == 0 || !sound || !rates.formats.iter().all(|f| positive(f.ns_per_weight)) {
                let found = format!("those of {} threads", rates.threads);
                return bad("decode", "threads and ns_per_weight above 0, no number below 0", found);
            }
        }
        let gbps = profile.read_gbps.iter().copied().fold(0.0, f64::max);
        let gmacs: f64 = profile.cores.iter().map(|c| c.count as f64 * c.gmacs_f32).sum();
        let handover_ms = profile.handover_us * 1e-3;
        Ok(Self { profile, bytes_per_ms: gbps * 1e6, macs_per_ms: gmacs * 1e6, handover_ms, threads: None })
    }

    /// The same roofline for decoding with `threads` threads.
    ///
    /// # Errors
    /// That number was not measured.
    pub fn with_threads(mut self, threads: usize) -> Result<Self> {
        if self.profile.decode.iter().all(|rates| rates.threads != threads) {
            let known: Vec<String> = self.profile.decode.iter().map(|r| r.threads.to_string()).collect();
            return Err(SchedError::Profile {
                profile: self.profile.name,
                field: "decode",
                expected: "rates for the number of threads that is asked for",
                found: format!("those for {} threads, asked for {threads}", known.join(", ")),
            });
        }
        self.threads = Some(threads);
        Ok(self)
    }

    /// The rates of decoding.
    fn decode(&self) -> Option<&DecodeRates> {
        let rates = &self.profile.decode;
        match self.threads {
            Some(threads) => rates.iter().find(|r| r.threads == threads),
            None => rates.iter().max_by_key(|r| r.threads),
        }
    }

    /// The profile.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// Milliseconds for one pass of `tokens` tokens through a matrix of `bytes` bytes.
    fn pass(&self, matrix: &MatrixShape, bytes: u64, tokens: f64) -> f64 {
        let (rows, cols) = (matrix.rows as f64, matrix.cols as f64);
        let moved = bytes as f64 + 4.0 * tokens * (rows + cols);
        let macs = rows * cols * tokens;
        (moved / self.bytes_per_ms).max(macs / self.macs_per_ms) + self.handover_ms
    }
}

/// Bytes of a matrix in memory, in the arrangement that the CPU runs it in.
fn resident_bytes(matrix: &MatrixShape, format: Format) -> Result<u64, ModelError> {
    Ok(PackedLayout::new(matrix.rows, matrix.cols, format)?.prepared().bytes())
}

impl CostModel for Roofline {
    fn cost(&self, matrices: &[MatrixShape], format: &LayerFormat, workload: Workload) -> Result<UnitCost, ModelError> {
        let packed = format.packed()?;
        let (tokens, passes) = match workload {
            Workload::Forward { tokens } => (tokens, 1.0),
            Workload::Tune { tokens } => (tokens, 2.0),
        };
        let decode = self.decode().filter(|_| workload == Workload::Forward { tokens: 1 });
        let rate = decode.map(|rates| rate_of(rates, packed)).transpose()?;
        let mut cost = UnitCost::default();
        for matrix in matrices {
            let bytes = packed.matrix_bytes(matrix.rows, matrix.cols);
            cost.bytes = cost.bytes.saturating_add(bytes);
            cost.resident_bytes = cost.resident_bytes.saturating_add(resident_bytes(matrix, packed)?);
            cost.milliseconds += match rate {
                Some(ns_per_weight) => ns_per_weight * matrix.rows as f64 * matrix.cols as f64 * 1e-6,
                None => passes * self.pass(matrix, bytes, tokens as f64),
            };
        }
        Ok(cost)
    }

    fn fixed(&self, shape: &DecoderShape) -> Result<UnitCost, ModelError> {
        let rates = self.decode().ok_or_else(|| ModelError::Value {
            what: format!("device profile '{}'", self.profile.name),
            expected: "measured rates of decoding, as `edgellm profile` writes them".into(),
            found: "none".into(),
        })?;
        let blocks = shape.n_blocks as f64;
        let attention = rates.attention_ns * shape.query_size as f64 * shape.context as f64;
        let block_ns = rates.block_us * 1e3 + rates.block_value_ns * block_values(shape) + attention;
        let token_ns = rates.token_us * 1e3 + rates.logit_ns * shape.vocab_size as f64;
        Ok(UnitCost {
            milliseconds: 1e-6 * (blocks * block_ns + token_ns),
            bytes: 0,
            resident_bytes: buffer_bytes(shape),
        })
    }
}

/// Memory beside the packed matrices: norms, the `f16` cache of all blocks, the buffers of one block, and scores of the
/// vocabulary as they are computed, copied out and turned into probabilities.
pub fn buffer_bytes(shape: &DecoderShape) -> u64 {
    let DecoderShape { n_blocks, hidden_size, query_size, kv_size, intermediate_size, vocab_size, context } = *shape;
    let norms = (2 * n_blocks + 1) * hidden_size * 4;
    let cache = n_blocks * 2 * kv_size * 2 * cache_positions(context);
    let block = 4 * (3 * hidden_size + 3 * query_size + 3 * kv_size + 4 * intermediate_size);
    let scores = 3 * 4 * vocab_size;
    (norms + cache + block + scores) as u64
}

#[cfg(test)]
mod tests {
    use edgellm_model::values::{CoreKind, FormatRate, Value};

    use super::*;

    /// 10 GB/s with two threads, 2 * 4 + 1 * 2 = 10 GMAC/s, 20 us.
    fn profile() -> DeviceProfile {
        let kind = |name: &str, count, gmacs_f32| CoreKind { name: name.into(), count, gmacs_f32 };
        DeviceProfile {
            format_version: DeviceProfile::VERSION,
            name: "test".into(),
            source: "made up".into(),
            measured_on: None,
            cores: vec![kind("performance", 2, 4.0), kind("efficiency", 1, 2.0)],
            read_gbps: vec![6.0, 10.0, 9.0],
            handover_us: 20.0,
            usable_bytes: 1 << 30,
            decode: Vec::new(),
            storage: Vec::new(),
        }
    }

    #[track_caller]
    fn check(format: LayerFormat, workload: Workload, bytes: u64, milliseconds: f64) {
        let shape = MatrixShape { name: "w".into(), rows: 1000, cols: 640 };
        let model = Roofline::new(profile()).unwrap();
        let one = model.cost(std::slice::from_ref(&shape), &format, workload).unwrap();
        assert_eq!(one.bytes, bytes);
        assert!((one.milliseconds - milliseconds).abs() < 1e-12, "{} is not {milliseconds}", one.milliseconds);
        let two = model.cost(&[shape.clone(), shape], &format, workload).unwrap();
        let resident_bytes = 2 * one.resident_bytes;
        assert_eq!(two, UnitCost { milliseconds: 2.0 * one.milliseconds, bytes: 2 * bytes, resident_bytes });
    }

    #[test]
    fn wide_weights_of_one_token_are_bound_by_memory() {
        // 2560000 bytes of weights and 4 * 1640 of input and output at 10 GB/s: 0.256656 ms, four times what the
        // multiply-adds need.
        check(LayerFormat::float(32), Workload::Forward { tokens: 1 }, 2_560_000, 0.256_656 + 0.02);
    }

    #[test]
    fn narrow_weights_of_one_token_are_bound_by_arithmetic_here() {
        // 20 groups of 32 columns, 4 words of codes and 1 of scale and minimum: 400 bytes a row, so 0.040656 ms to
        // read; 640000 multiply-adds at 10 GMAC/s take 0.064 ms.
        check(LayerFormat::quantized(4, 32, false), Workload::Forward { tokens: 1 }, 400_000, 0.064 + 0.02);
    }

    #[test]
    fn many_tokens_are_bound_by_arithmetic() {
        // 640000 * 100 multiply-adds at 10 GMAC/s: 6.4 ms; bytes: 0.3216 ms with f16's 1.28 MB.
        check(LayerFormat::float(16), Workload::Forward { tokens: 100 }, 1_280_000, 6.4 + 0.02);
    }

    #[test]
    fn tuning_passes_twice() {
        check(LayerFormat::float(32), Workload::Tune { tokens: 1 }, 2_560_000, 2.0 * (0.256_656 + 0.02));
    }

    /// Rates of two numbers of threads, in whole numbers.
    fn decoding() -> DeviceProfile {
        let rates = |threads: usize| {
            let rate = |format: &str, ns: f64| FormatRate { format: format.into(), ns_per_weight: ns / threads as f64 };
            DecodeRates {
                threads,
                block_us: 10.0,
                block_value_ns: 1.0,
                attention_ns: 0.5,
                token_us: 20.0,
                logit_ns: 2.0,
                formats: vec![
                    rate("q4g32a", 0.04),
                    rate("q4g128s", 0.02),
                    rate("q4g32s-b50", 0.06),
                    rate("q4g32s-b25", 0.04),
                ],
            }
        };
        DeviceProfile { decode: vec![rates(1), rates(2)], ..profile() }
    }

    #[test]
    fn a_token_takes_what_was_measured() {
        let shape = [MatrixShape { name: "w".into(), rows: 1000, cols: 1000 }];
        let token = Workload::Forward { tokens: 1 };
        let ms = |model: &Roofline, format| model.cost(&shape, &format, token).unwrap().milliseconds;
        let two = Roofline::new(decoding()).unwrap();
        let one = two.clone().with_threads(1).unwrap();
        for (format, expected) in [
            (LayerFormat::quantized(4, 32, false), 0.04),
            // The nearest: codes of the same kind before groups of the same size.
            (LayerFormat::quantized(4, 64, true), 0.02),
            (LayerFormat::quantized(4, 64, false), 0.04),
            // Half way between those that keep 50 and 25 percent; beyond them, the nearest.
            (LayerFormat::quantized(4, 32, true).with_sparsity(0.625), 0.0504),
            (LayerFormat::quantized(4, 32, true).with_sparsity(0.9), 0.04),
        ] {
            assert!((ms(&one, format) - expected).abs() < 1e-9, "{format}: {}", ms(&one, format));
            assert!((ms(&two, format) - expected / 2.0).abs() < 1e-9, "{format}");
        }
        let unknown = two.cost(&shape, &LayerFormat::quantized(3, 32, true), token).unwrap_err().to_string();
        assert!(unknown.contains("q3g32s"), "{unknown}");
        assert!(two.clone().with_threads(3).unwrap_err().to_string().contains("1, 2"));
        let fixed = DecoderShape {
            n_blocks: 2,
            hidden_size: 100,
            query_size: 100,
            kv_size: 50,
            intermediate_size: 300,
            vocab_size: 1000,
            context: 10,
        };
        let cost = two.fixed(&fixed).unwrap();
        // Two blocks of 10 us, a nanosecond a value and 0.5 * 100 * 10 ns; 20 us and 2 us.
        let expected = 2.0 * (10.0 + 1e-3 * block_values(&fixed) + 0.5) + 22.0;
        assert!((cost.milliseconds - 1e-3 * expected).abs() < 1e-12, "{cost:?}");
        // Norms 2000 bytes, 64 cached positions of 50 keys and values in f16 for each block, 12 kB of scores.
        assert!(cost.resident_bytes > 2000 + 2 * 2 * 50 * 2 * 64 + 12_000, "{cost:?}");
        assert!(Roofline::new(profile()).unwrap().fixed(&fixed).is_err());
    }

    #[test]
    fn profiles_without_rates_are_refused() {
        let refused = |change: &dyn Fn(&mut DeviceProfile), field: &str| {
            let mut bad = profile();
            change(&mut bad);
            let error = Roofline::new(bad).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        };
        refused(&|p| p.read_gbps.clear(), "read_gbps");
        refused(&|p| p.read_gbps[1] = 0.0, "read_gbps");
        refused(&|p| p.cores.clear(), "cores");
        refused(&|p| p.cores[0].gmacs_f32 = f64::NAN, "cores");
        refused(&|p| p.handover_us = -1.0, "handover_us");
        refused(&|p| p.decode = vec![DecodeRates { token_us: f64::NAN, ..decoding().decode[0].clone() }], "decode");
        refused(&|p| p.decode = vec![DecodeRates { threads: 0, ..decoding().decode[0].clone() }], "decode");
    }

    #[test]
    fn formats_that_do_not_exist_are_refused() {
        let model = Roofline::new(profile()).unwrap();
        assert!(model.cost(&[], &LayerFormat::quantized(7, 32, false), Workload::Forward { tokens: 1 }).is_err());
    }
}
