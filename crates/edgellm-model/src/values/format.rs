//! The format of one unit: bit width, group size, sparsity and its pattern.

use std::fmt;
use std::str::FromStr;

use edgellm_kernels::{Format, QuantFormat, ScaleType, SparsePattern};
use serde::{Deserialize, Serialize};

use crate::ModelError;

/// Which weights may be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Every weight may be non-zero; weights that are pruned anyway are stored like all others.
    #[default]
    Dense,
    /// Any weight may be zero; each row keeps the same share.
    Unstructured,
    /// Of every 4 consecutive weights of a row, 2 are kept.
    #[serde(rename = "2:4")]
    TwoFour,
    /// Of every 8 consecutive weights of a row, 4 are kept.
    #[serde(rename = "4:8")]
    FourEight,
}

impl Pattern {
    /// All patterns.
    pub const ALL: [Pattern; 4] = [Pattern::Dense, Pattern::Unstructured, Pattern::TwoFour, Pattern::FourEight];

    /// `dense`, `unstructured`, `2:4` or `4:8`.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Dense => "dense",
            Pattern::Unstructured => "unstructured",
            Pattern::TwoFour => "2:4",
            Pattern::FourEight => "4:8",
        }
    }

    /// `(n, m)` of a pattern that keeps `n` of every `m` consecutive weights.
    pub fn n_of_m(self) -> Option<(usize, usize)> {
        match self {
            Pattern::Dense | Pattern::Unstructured => None,
            Pattern::TwoFour => Some((2, 4)),
            Pattern::FourEight => Some((4, 8)),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let pattern = Pattern::ALL.into_iter().find(|p| p.name() == s);
        pattern.ok_or_else(|| format!("'{s}' is no pattern; expected dense, unstructured, 2:4 or 4:8"))
    }
}

/// How the scales and minima of quantized weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Scales {
    /// A 16-bit float each.
    #[default]
    F16,
    /// 8 bits each, times a unit of the row; for dense formats.
    U8,
}

/// The format of one unit. `bit_width` 16 and 32 keep the weights as f16 and f32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFormat {
    /// Bits per weight code: 2, 3, 4, 5, 6, 8, or 16 (f16) or 32 (f32).
    pub bit_width: u8,
    /// Weights that share a scale: 16, 32, 64 or 128. Ignored by 16 and 32 bits.
    pub group_size: u16,
    /// Symmetric (`w = s (q - 2^(b-1))`) or asymmetric (`w = s q + m`) codes.
    pub symmetric: bool,
    /// Share of weights set to zero, `0 <= sparsity < 1`; 0.5 with the patterns 2:4 and 4:8.
    #[serde(default)]
    pub sparsity: f64,
    /// Where the zeros may be.
    #[serde(default)]
    pub pattern: Pattern,
    /// How scales and minima are stored. Ignored by 16 and 32 bits.
    #[serde(default)]
    pub scales: Scales,
}

impl LayerFormat {
    /// A dense quantized format with `f16` scales.
    pub fn quantized(bit_width: u8, group_size: u16, symmetric: bool) -> Self {
        Self { bit_width, group_size, symmetric, sparsity: 0.0, pattern: Pattern::Dense, scales: Scales::F16 }
    }

    /// A float format: `bit_width` 16 or 32.
    pub fn float(bit_width: u8) -> Self {
        Self::quantized(bit_width, 32, false)
    }

    /// The same format with its scales stored in another way.
    pub fn with_scales(self, scales: Scales) -> Self {
        Self { scales, ..self }
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

    /// The same format with half of its weights at zero in an `n:m` pattern; other patterns change nothing.
    pub fn with_n_of_m(mut self, pattern: Pattern) -> Self {
        if pattern.n_of_m().is_some() {
            self.sparsity = 0.5;
            self.pattern = pattern;
        }
        self
    }

    /// The packed format of the kernels.
    ///
    /// Quantized weights with an `n:m` pattern are stored as the kept codes and a mask of one bit per weight, which is
    /// never larger than all codes; unstructured ones where it is smaller: if `k` is the kept share in whole percent
    /// (rounded up, so that every weight that is not zero has its place) and `b` the bit width, where
    /// `1 + k b / 100 < b`. Otherwise, all codes are stored, and zeros are the code of zero. Floats are stored whole.
    ///
    /// # Errors
    /// A bit width, group size or sparsity that no kernel supports, an `n:m` pattern whose sparsity is not 0.5, or scales
    /// of 8 bits where only some of the weights are stored.
    pub fn packed(&self) -> Result<Format, ModelError> {
        let bad = |expected: &str| ModelError::Value {
            what: format!("sparsity of the pattern {}", self.pattern),
            expected: expected.into(),
            found: self.sparsity.to_string(),
        };
        if !(0.0..1.0).contains(&self.sparsity) {
            return Err(bad("at least 0 and below 1"));
        }
        if self.pattern.n_of_m().is_some() && self.sparsity != 0.5 {
            return Err(bad("0.5"));
        }
        match self.bit_width {
            32 => Ok(Format::F32),
            16 => Ok(Format::F16),
            _ => {
                let scale_type = match self.scales {
                    Scales::F16 => ScaleType::F16,
                    Scales::U8 => ScaleType::U8,
                };
                let dense = QuantFormat::new(self.bit_width, self.group_size, self.symmetric, scale_type)?;
                Ok(Format::Quantized(dense.with_pattern(self.stored_pattern())?))
            }
        }
    }

    /// How quantized weights of this format are stored.
    fn stored_pattern(&self) -> SparsePattern {
        match self.pattern {
            Pattern::TwoFour => SparsePattern::NofM { n: 2, m: 4 },
            Pattern::FourEight => SparsePattern::NofM { n: 4, m: 8 },
            Pattern::Unstructured => {
                // Less a hair, so that 1 - 0.7 is 30 percent.
                let percent = ((1.0 - self.sparsity) * 100.0 - 1e-9).ceil().max(1.0) as u32;
                let bits = u32::from(self.bit_width);
                if 100 + percent * bits < 100 * bits {
                    SparsePattern::Bitmask { percent: percent as u8 }
                } else {
                    SparsePattern::Dense
                }
            }
            Pattern::Dense => SparsePattern::Dense,
        }
    }

    /// The format that a packed matrix has.
    pub fn of(format: Format) -> Self {
        match format {
            Format::F32 => Self::float(32),
            Format::F16 | Format::BF16 => Self::float(16),
            Format::Quantized(q) => {
                let scales = if q.scale_type == ScaleType::U8 { Scales::U8 } else { Scales::F16 };
                let dense = Self::quantized(q.bit_width, q.group_size, q.symmetric).with_scales(scales);
                let (sparsity, pattern) = match q.pattern {
                    SparsePattern::Dense => return dense,
                    SparsePattern::Bitmask { percent } => {
                        (f64::from(100 - percent.min(100)) / 100.0, Pattern::Unstructured)
                    }
                    SparsePattern::NofM { m: 4, .. } => (0.5, Pattern::TwoFour),
                    SparsePattern::NofM { .. } => (0.5, Pattern::FourEight),
                };
                Self { sparsity, pattern, ..dense }
            }
        }
    }
}

impl fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bit_width {
            bits @ (16 | 32) => write!(f, "f{bits}")?,
            bits => {
                let scales = if self.scales == Scales::U8 { "-8" } else { "" };
                write!(f, "q{bits}g{}{}{scales}", self.group_size, if self.symmetric { 's' } else { 'a' })?;
            }
        }
        match self.pattern {
            pattern @ (Pattern::TwoFour | Pattern::FourEight) => write!(f, "-{pattern}"),
            _ if self.sparsity > 0.0 => write!(f, "+{:.0}%", self.sparsity * 100.0),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(format: LayerFormat) -> String {
        format.packed().unwrap().name()
    }

    #[test]
    fn pruned_weights_are_stored_sparse_where_that_is_smaller() {
        let stored = |bits, sparsity| packed(LayerFormat::quantized(bits, 32, true).with_sparsity(sparsity));
        for (bits, sparsity, name) in [
            (4, 0.5, "q4g32s-b50"),
            (4, 0.7, "q4g32s-b30"),
            (4, 0.3, "q4g32s-b70"),
            (4, 0.501, "q4g32s-b50"),
            (4, 0.499, "q4g32s-b51"),
            (4, 0.999, "q4g32s-b1"),
            (4, 0.26, "q4g32s-b74"),
            // A mask costs a bit of four.
            (4, 0.25, "q4g32s"),
            (2, 0.5, "q2g32s"),
            (2, 0.6, "q2g32s-b40"),
            (8, 0.13, "q8g32s-b87"),
            (8, 0.12, "q8g32s"),
            (16, 0.5, "f16"),
            (4, 0.0, "q4g32s"),
        ] {
            assert_eq!(stored(bits, sparsity), name, "{bits} bits, sparsity {sparsity}");
        }
        for bits in [2, 3, 4, 5, 6, 8] {
            for (pattern, suffix) in [(Pattern::TwoFour, "2:4"), (Pattern::FourEight, "4:8")] {
                let format = LayerFormat::quantized(bits, 64, false).with_n_of_m(pattern);
                assert_eq!(packed(format), format!("q{bits}g64a-{suffix}"));
                assert_eq!(format.to_string(), packed(format));
            }
        }
        assert_eq!(packed(LayerFormat::float(16).with_n_of_m(Pattern::TwoFour)), "f16");
    }

    /// A row of any width has a place for every weight that pruning leaves.
    #[test]
    fn what_is_not_pruned_has_its_place() {
        for thousandths in 1..1000 {
            let sparsity = f64::from(thousandths) / 1000.0;
            let format = LayerFormat::quantized(8, 32, true).with_sparsity(sparsity);
            let pattern = format.packed().unwrap().quantized().unwrap().pattern;
            for cols in 1..300 {
                let left = cols - (sparsity * cols as f64).round() as usize;
                assert!(pattern.kept(cols) >= left, "sparsity {sparsity}, {cols} columns");
            }
        }
    }

    #[test]
    fn formats_of_matrices_and_back() {
        for name in
            ["q4g32s-2:4", "q3g64a-4:8", "q4g32s-b50", "q8g128s-b87", "q2g32s-b1", "q4g32a", "q2g16a-8", "f16", "f32"]
        {
            let format = Format::parse(name).unwrap();
            assert_eq!(LayerFormat::of(format).packed().unwrap(), format, "{name}");
        }
    }

    #[test]
    fn scales_of_8_bits() {
        let format = LayerFormat::quantized(4, 32, false).with_scales(Scales::U8);
        assert_eq!((format.to_string(), packed(format)), ("q4g32a-8".into(), "q4g32a-8".into()));
        assert_eq!(LayerFormat::of(format.packed().unwrap()), format);
        assert_eq!(packed(LayerFormat::float(16).with_scales(Scales::U8)), "f16");
        // Zeros that are stored as codes are a dense format; masks have scales of 16 bits.
        let symmetric = LayerFormat { symmetric: true, ..format };
        assert_eq!(packed(symmetric.with_sparsity(0.2)), "q4g32s-8");
        for sparse in [symmetric.with_sparsity(0.5), format.with_n_of_m(Pattern::FourEight)] {
            assert!(sparse.packed().unwrap_err().to_string().contains("f16 scales"), "{sparse}");
        }
    }

    #[test]
    fn sparsities_that_do_not_exist() {
        let format = LayerFormat::quantized(4, 32, true);
        for sparsity in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(LayerFormat { sparsity, ..format }.packed().is_err(), "{sparsity}");
        }
        let format = format.with_n_of_m(Pattern::TwoFour);
        assert!(LayerFormat { sparsity: 0.4, ..format }.packed().unwrap_err().to_string().contains("0.5"));
    }

    #[test]
    fn files_of_before_the_patterns_are_read() {
        let read = |text: &str| serde_json::from_str::<LayerFormat>(text).unwrap();
        let base = r#""bit_width": 4, "group_size": 32, "symmetric": true"#;
        assert_eq!(read(&format!("{{{base}}}")), LayerFormat::quantized(4, 32, true));
        let pruned = LayerFormat::quantized(4, 32, true).with_sparsity(0.5);
        assert_eq!(read(&format!(r#"{{{base}, "sparsity": 0.5, "pattern": "unstructured"}}"#)), pruned);
        let small = LayerFormat::quantized(4, 32, true).with_scales(Scales::U8);
        assert_eq!(read(&format!(r#"{{{base}, "scales": "u8"}}"#)), small);
        assert_eq!(read(&serde_json::to_string(&small).unwrap()), small);
        for pattern in Pattern::ALL {
            assert_eq!(Pattern::from_str(pattern.name()), Ok(pattern));
            assert_eq!(serde_json::to_string(&pattern).unwrap(), format!("\"{pattern}\""));
            let format = LayerFormat { pattern, ..pruned };
            assert_eq!(read(&serde_json::to_string(&format).unwrap()), format);
        }
        assert!(Pattern::from_str("1:4").is_err());
    }
}
