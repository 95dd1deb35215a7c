//! Learning-rate schedules with a linear warm-up.

use crate::TuneError;

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrSchedule {
    /// It stays.
    Constant,
    /// Half a cosine down to zero.
    Cosine,
    /// A line down to zero.
    Linear,
}

impl std::str::FromStr for LrSchedule {
    type Err = TuneError;

    fn from_str(s: &str) -> Result<Self, TuneError> {
        match s {
            "constant" => Ok(LrSchedule::Constant),
            "cosine" => Ok(LrSchedule::Cosine),
            "linear" => Ok(LrSchedule::Linear),
            other => Err(TuneError::Setting {
                what: "learning-rate schedule",
                expected: "constant, cosine or linear".into(),
                found: other.into(),
            }),
        }
    }
}

impl LrSchedule {
    /// The factor on the learning rate in step `step` of `total`, after `warmup` steps of linear increase.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        match self {
            LrSchedule::Constant => 1.0,
            LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            LrSchedule::Linear => 1.0 - progress,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_warm_up_and_end() {
        assert_eq!(LrSchedule::Constant.factor(50, 100, 0), 1.0);
        assert_eq!(LrSchedule::Constant.factor(1, 100, 4), 0.5);
        assert_eq!(LrSchedule::Linear.factor(60, 110, 10), 0.5);
        assert!((LrSchedule::Cosine.factor(60, 110, 10) - 0.5).abs() < 1e-12);
        assert!(LrSchedule::Cosine.factor(110, 110, 10) < 1e-12);
        assert!("step".parse::<LrSchedule>().is_err());
    }
}
