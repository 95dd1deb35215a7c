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

use edgellm_model::ModelError;
use edgellm_model::traits::{CostModel, UnitCost, Workload};
use edgellm_model::values::{DeviceProfile, LayerFormat, MatrixShape};

use crate::error::{Result, SchedError};

/// The roofline of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Roofline {
    profile: DeviceProfile,
    bytes_per_ms: f64,
    macs_per_ms: f64,
    handover_ms: f64,
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
        let gbps = profile.read_gbps.iter().copied().fold(0.0, f64::max);
        let gmacs: f64 = profile.cores.iter().map(|c| c.count as f64 * c.gmacs_f32).sum();
        let handover_ms = profile.handover_us * 1e-3;
        Ok(Self { profile, bytes_per_ms: gbps * 1e6, macs_per_ms: gmacs * 1e6, handover_ms })
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

impl CostModel for Roofline {
    fn cost(&self, matrices: &[MatrixShape], format: &LayerFormat, workload: Workload) -> Result<UnitCost, ModelError> {
        let packed = format.packed()?;
        let (tokens, passes) = match workload {
            Workload::Forward { tokens } => (tokens, 1.0),
            Workload::Tune { tokens } => (tokens, 2.0),
        };
        let mut cost = UnitCost::default();
        for matrix in matrices {
            let bytes = packed.matrix_bytes(matrix.rows, matrix.cols);
            cost.bytes = cost.bytes.saturating_add(bytes);
            cost.milliseconds += passes * self.pass(matrix, bytes, tokens as f64);
        }
        Ok(cost)
    }
}

#[cfg(test)]
mod tests {
    use edgellm_model::values::{CoreKind, Value};

    use super::*;

    /// 10 GB/s with two threads, 2 * 4 + 1 * 2 = 10 GMAC/s, 20 us.
    fn profile() -> DeviceProfile {
        let kind = |name: &str, count, gmacs_f32| CoreKind { name: name.into(), count, gmacs_f32 };
        DeviceProfile {
            format_version: DeviceProfile::VERSION,
            name: "test".into(),
            source: "made up".into(),
            cores: vec![kind("performance", 2, 4.0), kind("efficiency", 1, 2.0)],
            read_gbps: vec![6.0, 10.0, 9.0],
            handover_us: 20.0,
            usable_bytes: 1 << 30,
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
        assert_eq!(two, UnitCost { milliseconds: 2.0 * one.milliseconds, bytes: 2 * bytes });
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
    }

    #[test]
    fn formats_that_do_not_exist_are_refused() {
        let model = Roofline::new(profile()).unwrap();
        assert!(model.cost(&[], &LayerFormat::quantized(7, 32, false), Workload::Forward { tokens: 1 }).is_err());
    }
}
