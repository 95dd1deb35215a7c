//! The format of one unit: bit width, group size, sparsity and its pattern.

use std::fmt;

use edgellm_kernels::{Format, QuantFormat, ScaleType};
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Which weights may be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Every weight may be non-zero.
    #[default]
    Dense,
    /// Any weight may be zero; each row keeps the same share.
    Unstructured,
}

/// The format of one unit. `bit_width` 16 and 32 keep the weights as f16 and f32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFormat {
    /// Bits per weight code: 2, 3, 4, 5, 6, 8, or 16 (f16) or 32 (f32).
    pub bit_width: u8,
    /// Weights that share a scale: 32, 64 or 128. Ignored by 16 and 32 bits.
    pub group_size: u16,
    /// Symmetric (`w = s (q - 2^(b-1))`) or asymmetric (`w = s q + m`) codes.
    pub symmetric: bool,
    /// Share of weights set to zero, `0 <= sparsity < 1`.
    #[serde(default)]
    pub sparsity: f64,
    /// Where the zeros may be.
    #[serde(default)]
    pub pattern: Pattern,
}

impl LayerFormat {
    /// A dense quantized format.
    pub fn quantized(bit_width: u8, group_size: u16, symmetric: bool) -> Self {
        Self { bit_width, group_size, symmetric, sparsity: 0.0, pattern: Pattern::Dense }
    }

    /// A float format: `bit_width` 16 or 32.
    pub fn float(bit_width: u8) -> Self {
        Self { bit_width, group_size: 32, symmetric: false, sparsity: 0.0, pattern: Pattern::Dense }
    }

    /// The same format with `sparsity` of its weights at zero. Codes become symmetric: they hold zero exactly.
    pub fn with_sparsity(mut self, sparsity: f64) -> Self {
        self.sparsity = sparsity;
        if sparsity > 0.0 {
            self.pattern = Pattern::Unstructured;
            self.symmetric = true;
        } else {
            self.pattern = Pattern::Dense;
        }
        self
    }

    /// The packed format of the kernels.
    ///
    /// # Errors
    /// A bit width, group size or sparsity that no kernel supports.
    pub fn packed(&self) -> Result<Format, ModelError> {
        if !(0.0..1.0).contains(&self.sparsity) {
            return Err(ModelError::Value {
                what: "sparsity".into(),
                expected: "at least 0 and below 1".into(),
                found: self.sparsity.to_string(),
            });
        }
        match self.bit_width {
            32 => Ok(Format::F32),
            16 => Ok(Format::F16),
            _ => Ok(Format::Quantized(QuantFormat::new(
                self.bit_width,
                self.group_size,
                self.symmetric,
                ScaleType::F16,
            )?)),
        }
    }

    /// The format that a packed matrix has.
    pub fn of(format: Format) -> Self {
        match format {
            Format::F32 => Self::float(32),
            Format::F16 | Format::BF16 => Self::float(16),
            Format::Quantized(q) => Self::quantized(q.bit_width, q.group_size, q.symmetric),
        }
    }
}

impl fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bit_width {
            bits @ (16 | 32) => write!(f, "f{bits}")?,
            bits => write!(f, "q{bits}g{}{}", self.group_size, if self.symmetric { 's' } else { 'a' })?,
        }
        if self.sparsity > 0.0 {
            write!(f, "+{:.0}%", self.sparsity * 100.0)?;
        }
        Ok(())
    }
}
