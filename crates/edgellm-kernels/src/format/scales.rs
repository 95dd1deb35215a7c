//! Scales and minima of the groups of a row: how they are rounded, stored and read.
//!
//! Of floats, a row's words are one `f16` a group if symmetric (the row padded to an even count), one word a group if
//! asymmetric (scale in the low half, min in the high half); or one `f32` a group, or two, scale then min.
//!
//! **Two levels** ([`ScaleType::U8`]): a header word, with the row's unit of scales `d` in the low half and its unit of
//! minima `m` in the high half (0 if symmetric), both bfloat16 and at least 0; then the groups' scale codes, a byte each,
//! four to a word; then, if asymmetric, their min codes likewise. Words are padded with zeros.
//!
//! - asymmetric: `scale = d * c` with `c` in `0 ..= 255`, `min = m * k` with `k` in `-128 ..= 127`;
//! - symmetric: `scale = d * c` with `c` in `-128 ..= 127`: the sign says which end of the codes is the extreme's.
//!
//! bfloat16 because units are small: `f16` has fewer bits below 6e-5 and none below 6e-8, where units of 8-bit weights
//! are. Its 8 bits are enough, for the codes are computed with the unit as it is stored, and they make `d * c` and its
//! product with a code exact in `f32`. A row's unit is the largest one with which all its values are exact, if there is
//! any; otherwise the smallest that reaches them. The largest scale of a row has a code of at least 253 (asymmetric) or
//! 126, and what is `n` times smaller an `n` times smaller code.
//!
//! Rounding to nearest ([`super::grouped`]) takes the next min code below, and the next scale code away from zero, so that
//! groups lie on their grid's span.

use half::{bf16, f16};

use super::QuantFormat;
use super::float::decode_f16;

/// How scales and minima are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// IEEE 754 half precision.
    F16,
    /// IEEE 754 single precision.
    F32,
    /// Codes of 8 bits, times a unit per row.
    U8,
}

/// What the codes of a row's scales and minima are multiplied by. Scales that are floats have none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Units {
    pub(crate) scale: f32,
    pub(crate) min: f32,
}

/// Codes of scales and minima.
#[derive(Clone, Copy)]
struct Range {
    low: f64,
    high: f64,
}

const SIGNED: Range = Range { low: -128.0, high: 127.0 };
const UNSIGNED: Range = Range { low: 0.0, high: 255.0 };

impl Range {
    /// The unit of a row with these values.
    fn unit(self, values: &[f32]) -> f32 {
        let most = |sign: f64| values.iter().map(|&v| sign * f64::from(v)).fold(0.0, f64::max);
        let (up, down) = (most(1.0) / self.high, if self.low < 0.0 { most(-1.0) / -self.low } else { 0.0 });
        self.exact_unit(values).unwrap_or_else(|| bf16_above(up.max(down)))
    }

    /// The largest unit of which all values are whole multiples in range.
    fn exact_unit(self, values: &[f32]) -> Option<f32> {
        let largest = values.iter().copied().fold(0.0f32, |best, v| if v.abs() > best.abs() { v } else { best });
        // A unit's 8 bits times a code's 8.
        if largest == 0.0 || largest.to_bits() & 0xff != 0 {
            return None;
        }
        let most = if largest < 0.0 { -self.low } else { self.high } as u32;
        let largest = f64::from(largest.abs());
        (1..=most).find_map(|code| {
            let unit = (largest / f64::from(code)) as f32;
            let fits = |v: &f32| {
                let code = f64::from(*v) / f64::from(unit);
                code.fract() == 0.0 && (self.low..=self.high).contains(&code)
            };
            let exact = unit.to_bits() & 0xffff == 0 && f64::from(unit) * f64::from(code) == largest;
            (exact && values.iter().all(fits)).then_some(unit)
        })
    }

    /// `value` in units, rounded by `round`, as a value.
    fn rounded(self, value: f32, unit: f32, round: impl Fn(f64) -> f64) -> f32 {
        if unit == 0.0 {
            return 0.0;
        }
        // Of 16 bits: exact.
        (round(f64::from(value) / f64::from(unit)).clamp(self.low, self.high) * f64::from(unit)) as f32
    }
}

/// To the nearest whole number, but not to zero.
fn nearest_not_zero(v: f64) -> f64 {
    if v == 0.0 { 0.0 } else { v.signum() * v.abs().round().max(1.0) }
}

fn away_from_zero(v: f64) -> f64 {
    v.signum() * v.abs().ceil()
}

impl QuantFormat {
    /// The codes that two-level scales have.
    fn scale_range(&self) -> Range {
        if self.symmetric { SIGNED } else { UNSIGNED }
    }

    /// Words of scales in a row with so many groups.
    pub(super) fn scale_words(&self, groups: usize) -> usize {
        match (self.scale_type, self.symmetric) {
            (ScaleType::F16, true) => groups.div_ceil(2),
            (ScaleType::F16, false) | (ScaleType::F32, true) => groups,
            (ScaleType::F32, false) => 2 * groups,
            (ScaleType::U8, true) => 1 + groups.div_ceil(4),
            (ScaleType::U8, false) => 1 + 2 * groups.div_ceil(4),
        }
    }

    /// The units of a row, of its scale words.
    pub(crate) fn units(&self, scales: &[u32]) -> Units {
        match self.scale_type {
            ScaleType::U8 => {
                Units { scale: f32::from_bits(scales[0] << 16), min: f32::from_bits(scales[0] & 0xffff_0000) }
            }
            ScaleType::F16 | ScaleType::F32 => Units { scale: 1.0, min: 1.0 },
        }
    }

    /// Writes the units of a row into its zeroed scale words.
    pub(crate) fn put_units(&self, scales: &mut [u32], units: Units) {
        if self.scale_type == ScaleType::U8 {
            scales[0] = units.scale.to_bits() >> 16 | units.min.to_bits() & 0xffff_0000;
        }
    }

    /// The units of a row with these scales and minima.
    pub(super) fn choose_units(&self, scales: &[f32], mins: &[f32]) -> Units {
        match self.scale_type {
            ScaleType::U8 => Units {
                scale: self.scale_range().unit(scales),
                min: if self.symmetric { 0.0 } else { SIGNED.unit(mins) },
            },
            ScaleType::F16 | ScaleType::F32 => Units { scale: 1.0, min: 1.0 },
        }
    }

    /// Scale and minimum of a group of a row; the minimum of a symmetric group is `-scale * 2^(b - 1)`, which is exact.
    pub(crate) fn scale_and_min(&self, scales: &[u32], group: usize) -> (f32, f32) {
        let (scale, min) = self.raw_scale(scales, group);
        self.scale_and_min_of(self.units(scales), scale, min)
    }

    /// The bits of a group's scale and minimum, as a row stores them; the minimum is 0 for symmetric formats.
    pub(crate) fn raw_scale(&self, scales: &[u32], group: usize) -> (u32, u32) {
        let byte = |words: &[u32]| words[group / 4] >> (8 * (group % 4)) & 0xff;
        match (self.scale_type, self.symmetric) {
            (ScaleType::F16, true) => ((scales[group / 2] >> (16 * (group % 2))) & 0xffff, 0),
            (ScaleType::F16, false) => (scales[group] & 0xffff, scales[group] >> 16),
            (ScaleType::F32, true) => (scales[group], 0),
            (ScaleType::F32, false) => (scales[2 * group], scales[2 * group + 1]),
            (ScaleType::U8, true) => (byte(&scales[1..]), 0),
            (ScaleType::U8, false) => (byte(&scales[1..]), byte(&scales[1 + scales.len() / 2..])),
        }
    }

    /// Scale and minimum of their bits.
    pub(crate) fn scale_and_min_of(&self, units: Units, scale: u32, min: u32) -> (f32, f32) {
        let signed = |code: u32| f32::from(code as u8 as i8);
        let (scale, min) = match self.scale_type {
            ScaleType::F16 => (decode_f16(scale as u16), decode_f16(min as u16)),
            ScaleType::F32 => (f32::from_bits(scale), f32::from_bits(min)),
            ScaleType::U8 if self.symmetric => (units.scale * signed(scale), 0.0),
            ScaleType::U8 => (units.scale * scale as f32, units.min * signed(min)),
        };
        if self.symmetric { self.centred(scale) } else { (scale, min) }
    }

    /// Writes the bits of a group's scale and minimum into a zeroed row.
    pub(crate) fn put_raw_scale(&self, scales: &mut [u32], group: usize, scale: u32, min: u32) {
        let put_byte = |words: &mut [u32], code: u32| words[group / 4] |= code << (8 * (group % 4));
        match (self.scale_type, self.symmetric) {
            (ScaleType::F16, true) => scales[group / 2] |= scale << (16 * (group % 2)),
            (ScaleType::F16, false) => scales[group] = scale | (min << 16),
            (ScaleType::F32, true) => scales[group] = scale,
            (ScaleType::F32, false) => {
                scales[2 * group] = scale;
                scales[2 * group + 1] = min;
            }
            (ScaleType::U8, true) => put_byte(&mut scales[1..], scale),
            (ScaleType::U8, false) => {
                let minima = 1 + scales.len() / 2;
                put_byte(&mut scales[1..], scale);
                put_byte(&mut scales[minima..], min);
            }
        }
    }

    /// Writes scale and minimum of a group into a zeroed row, rounded to nearest.
    pub(super) fn store(&self, scales: &mut [u32], units: Units, group: usize, scale: f32, min: f32) {
        let code = |value: f32, unit: f32, range: Range| {
            let code = if unit == 0.0 { 0.0 } else { f64::from(value) / f64::from(unit) };
            u32::from(code.round().clamp(range.low, range.high) as i32 as u8)
        };
        let half = |value: f32| u32::from(f16::from_f32(value).to_bits());
        let (scale, min) = match self.scale_type {
            ScaleType::F16 => (half(scale), half(min)),
            ScaleType::F32 => (scale.to_bits(), min.to_bits()),
            ScaleType::U8 => (code(scale, units.scale, self.scale_range()), code(min, units.min, SIGNED)),
        };
        self.put_raw_scale(scales, group, scale, min);
    }

    /// A scale and a minimum as they are read back once they were stored, rounded to nearest. Codes are at least 1 where
    /// the scale is not 0.
    pub(super) fn rounded_grid(&self, units: Units, scale: f32, min: f32) -> (f32, f32) {
        let (scale, min) = match self.scale_type {
            ScaleType::F16 => (f16::from_f32(scale).to_f32(), f16::from_f32(min).to_f32()),
            ScaleType::F32 => (scale, min),
            ScaleType::U8 => (
                self.scale_range().rounded(scale, units.scale, nearest_not_zero),
                SIGNED.rounded(min, units.min, f64::round),
            ),
        };
        if self.symmetric { self.centred(scale) } else { (scale, min) }
    }

    fn centred(&self, scale: f32) -> (f32, f32) {
        (scale, -scale * self.zero_point() as f32)
    }

    /// Scale and minimum for a group of finite values, as they will be read back. Not for two levels.
    pub(super) fn fit(&self, values: &[f32]) -> (f32, f32) {
        if self.symmetric {
            let scale = self.symmetric_scale(values);
            let scale = if self.scale_type == ScaleType::F16 { f16::from_f32(scale).to_f32() } else { scale };
            return self.centred(scale);
        }
        let (low, high) = ends(values);
        match self.scale_type {
            ScaleType::F16 => {
                let min = f16_below(low);
                (f16_above((high - min) / self.levels()), min)
            }
            ScaleType::F32 | ScaleType::U8 => (self.step(low, high), low),
        }
    }

    /// Units, and scales and minima of the groups of finite values, as they will be read back. For two levels.
    pub(super) fn fit_row<'a>(&self, groups: impl Iterator<Item = &'a [f32]> + Clone) -> (Units, Vec<(f32, f32)>) {
        if self.symmetric {
            let scales: Vec<f32> = groups.map(|values| self.symmetric_scale(values)).collect();
            let units = self.choose_units(&scales, &[]);
            let grid = |scale: f32| self.centred(SIGNED.rounded(scale, units.scale, away_from_zero));
            return (units, scales.into_iter().map(grid).collect());
        }
        let lows: Vec<f32> = groups.clone().map(|values| ends(values).0).collect();
        let min = SIGNED.unit(&lows);
        let mins: Vec<f32> = lows.into_iter().map(|low| SIGNED.rounded(low, min, f64::floor)).collect();
        let steps: Vec<f32> = groups.zip(&mins).map(|(values, &min)| self.step(min, ends(values).1)).collect();
        let units = Units { scale: UNSIGNED.unit(&steps), min };
        let grid = |(step, min)| (UNSIGNED.rounded(step, units.scale, f64::ceil), min);
        (units, steps.into_iter().zip(mins).map(grid).collect())
    }

    fn symmetric_scale(&self, values: &[f32]) -> f32 {
        let extreme = values.iter().fold(0.0f32, |best, &v| if v.abs() > best.abs() { v } else { best });
        extreme / -(self.zero_point() as f32)
    }

    fn levels(&self) -> f32 {
        ((1u32 << self.bit_width) - 1) as f32
    }

    /// The step of a grid that reaches from `low` to `high`. In `f64`: the difference may overflow.
    fn step(&self, low: f32, high: f32) -> f32 {
        ((f64::from(high) - f64::from(low)) / f64::from(self.levels())) as f32
    }
}

/// The smallest and the largest of some values.
fn ends(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    (low, values.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// The smallest bfloat16 value that is not below a value that is not negative.
fn bf16_above(value: f64) -> f32 {
    let below = bf16::from_bits(((value as f32).to_bits() >> 16) as u16);
    if f64::from(below.to_f32()) >= value { below.to_f32() } else { bf16::from_bits(below.to_bits() + 1).to_f32() }
}

/// The largest half-precision value that is not above `value`.
fn f16_below(value: f32) -> f32 {
    let near = f16::from_f32(value);
    if near.to_f32() <= value { near.to_f32() } else { next_f16(near, false).to_f32() }
}

/// The smallest half-precision value that is not below `value`.
fn f16_above(value: f32) -> f32 {
    let near = f16::from_f32(value);
    if near.to_f32() >= value { near.to_f32() } else { next_f16(near, true).to_f32() }
}

/// The next half-precision value towards plus (`up`) or minus infinity.
fn next_f16(value: f16, up: bool) -> f16 {
    let bits = value.to_bits();
    if value.to_f32() == 0.0 {
        return f16::from_bits(if up { 0x0001 } else { 0x8001 });
    }
    let away_from_zero = (bits & 0x8000 == 0) == up;
    f16::from_bits(if away_from_zero { bits + 1 } else { bits - 1 })
}
