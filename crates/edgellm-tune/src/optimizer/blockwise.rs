//! 8-bit optimizer states: block-wise quantization with the dynamic tree data type (Dettmers et al., "8-bit Optimizers via
//! Block-wise Quantization", ICLR 2022, sections 1.3, 2.1 and 2.2).
//!
//! A block of 256 values shares one scale, its largest magnitude; each value is then a code of a number in `[-1, 1]`. A
//! code is a sign bit, zeros whose count `E` is a decimal exponent, a bit of 1 that ends them, and as many fraction bits as
//! are left: `10^-E` times the middle of one of the equal parts that they cut `[0.1, 1]` into. So small magnitudes keep
//! seven decades, and large ones six bits. The unsigned type, for second moments, has one more fraction bit instead of
//! the sign. Of the two codes without a bit of 1, one is 0 and the other is 1, so that the largest value is exact.
//!
//! One departure: a second moment above 0 is never stored as 0, but at least as the smallest code, because Adam divides by
//! its root (the "zero-point problem" of Li et al., "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, section 4.1).

use std::sync::LazyLock;

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// Magnitudes below this fall to the smallest code or 0; a power of two, below half of the smallest number of both types.
const LEAST: f32 = 1.0 / (1 << 24) as f32;

/// Mantissa bits that choose a cell: no cell of that width holds two boundaries of codes (tested).
const CELL_BITS: u32 = 7;
const CELL_SHIFT: u32 = 23 - CELL_BITS;
const CELLS: usize = (24 << CELL_BITS) + 1;

/// Ascending magnitudes from 0 to 1, and where to find the nearest one.
struct Magnitudes {
    values: Vec<f32>,
    /// `boundaries[i]` lies in the middle of `values[i]` and `values[i + 1]`; after the last, infinity.
    boundaries: Vec<f32>,
    /// For each cell, the magnitude nearest to its lower edge.
    cells: Vec<u8>,
}

impl Magnitudes {
    /// The type with `2^fraction_bits` numbers in the first decade, half as many in each of the next, down to the seventh.
    fn new(fraction_bits: u32) -> Self {
        let mut values = vec![0.0, 1.0];
        let mut decade = 1.0f64;
        for exponent in 0..7 {
            let parts = 1u32 << (fraction_bits - exponent);
            let width = 0.9 / f64::from(parts);
            values.extend((0..parts).map(|part| (decade * (0.1 + (f64::from(part) + 0.5) * width)) as f32));
            decade /= 10.0;
        }
        values.sort_by(f32::total_cmp);
        let mut boundaries: Vec<f32> = values.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
        boundaries.push(f32::INFINITY);
        // The last magnitude, 1, is found through the one before it, so that an index of the signed type has 7 bits.
        let last = values.len() - 2;
        let cells = (0..CELLS as u32)
            .map(|cell| {
                let edge = f32::from_bits(LEAST.to_bits() + (cell << CELL_SHIFT));
                boundaries.iter().position(|&b| edge <= b).unwrap_or(last).min(last) as u8
            })
            .collect();
        Self { values, boundaries, cells }
    }

    /// Index of the nearest magnitude to `x` in `[0, 1]`; of two equally near ones, the smaller.
    #[inline]
    fn nearest(&self, x: f32) -> usize {
        let cell = (x.clamp(LEAST, 1.0).to_bits() - LEAST.to_bits()) >> CELL_SHIFT;
        let index = usize::from(self.cells[cell as usize]);
        index + usize::from(x > self.boundaries[index])
    }
}

static SIGNED: LazyLock<Magnitudes> = LazyLock::new(|| Magnitudes::new(6));
static UNSIGNED: LazyLock<Magnitudes> = LazyLock::new(|| Magnitudes::new(7));

/// The sign bit of a signed code; alone, it is the code of 1.
const SIGN: u8 = 0x80;

/// A list of values in 8 bits each, with a scale for every [`BLOCK`] of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Quantized {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
}

impl Quantized {
    /// `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        Self { codes: vec![0; len], scales: vec![0.0; len.div_ceil(BLOCK)] }
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.codes.len() + 4 * self.scales.len()) as u64
    }

    /// The blocks: codes and scale.
    pub(super) fn blocks_mut(&mut self) -> impl Iterator<Item = (&mut [u8], &mut f32)> {
        self.codes.chunks_mut(BLOCK).zip(&mut self.scales)
    }
}

/// Largest magnitude of a block, at most the largest finite number.
fn scale_of(values: &[f32]) -> f32 {
    // Sixteen maxima side by side: a single one would be a chain that cannot be vectorized.
    let mut lanes = [0.0f32; 16];
    for chunk in values.chunks(16) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            let magnitude = value.abs();
            *lane = if magnitude > *lane { magnitude } else { *lane };
        }
    }
    lanes.into_iter().fold(0.0, f32::max).min(f32::MAX)
}

/// Writes first moments into a block.
pub(super) fn encode_signed(values: &[f32], codes: &mut [u8], scale: &mut f32) {
    *scale = scale_of(values);
    if *scale == 0.0 {
        codes.fill(0);
        return;
    }
    let map = &*SIGNED;
    for (code, value) in codes.iter_mut().zip(values) {
        let index = map.nearest(value.abs() / *scale);
        *code = match (value.is_sign_negative(), index) {
            (_, 0) => 0,
            (true, _) => SIGN | index.min(0x7f) as u8,
            // 1, the last magnitude, is 128: the sign bit alone.
            (false, _) => index as u8,
        };
    }
}

/// Reads first moments from a block.
pub(super) fn decode_signed(codes: &[u8], scale: f32, values: &mut [f32]) {
    let map = &*SIGNED;
    for (value, &code) in values.iter_mut().zip(codes) {
        let index = usize::from(code & !SIGN);
        *value = scale
            * match (code & SIGN != 0, index) {
                (true, 0) => 1.0,
                (true, _) => -map.values[index],
                (false, _) => map.values[index],
            };
    }
}

/// Writes second moments, none below 0, into a block.
pub(super) fn encode_unsigned(values: &[f32], codes: &mut [u8], scale: &mut f32) {
    *scale = scale_of(values);
    if *scale == 0.0 {
        codes.fill(0);
        return;
    }
    let map = &*UNSIGNED;
    for (code, &value) in codes.iter_mut().zip(values) {
        let index = map.nearest(value / *scale) as u8;
        *code = if value > 0.0 { index.max(1) } else { 0 };
    }
}

/// Reads second moments from a block.
pub(super) fn decode_unsigned(codes: &[u8], scale: f32, values: &mut [f32]) {
    let map = &*UNSIGNED;
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = scale * map.values[usize::from(code)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest number of the type by search.
    fn nearest(numbers: &[f32], x: f32) -> f32 {
        *numbers.iter().min_by(|a, b| (**a - x).abs().total_cmp(&(**b - x).abs())).unwrap()
    }

    fn signed_numbers() -> Vec<f32> {
        let mut all = vec![0.0; 256];
        decode_signed(&(0..=255).collect::<Vec<u8>>(), 1.0, &mut all);
        all
    }

    #[test]
    fn the_types_are_those_of_the_paper() {
        let mut signed = signed_numbers();
        signed.sort_by(f32::total_cmp);
        signed.dedup();
        assert_eq!(signed.len(), 256);
        assert!((signed[0] + 1.0 - 0.45 / 64.0).abs() < 1e-6, "{}", signed[0]);
        assert_eq!((signed[127], signed[255]), (0.0, 1.0));
        // Six zeros and no fraction bit: the middle of [0.1, 1], times 10^-6.
        assert!((signed[128] - 0.55e-6).abs() < 1e-12);
        let unsigned = &UNSIGNED.values;
        assert_eq!((unsigned.len(), unsigned[0], unsigned[255]), (256, 0.0, 1.0));
        assert!((unsigned[1] - 0.325e-6).abs() < 1e-12 && (unsigned[2] - 0.775e-6).abs() < 1e-12);
        assert!(unsigned[1] > 2.0 * LEAST);
    }

    #[test]
    fn a_cell_holds_at_most_one_boundary() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for cell in 0..CELLS as u32 - 1 {
                let edge = |cell: u32| f32::from_bits(LEAST.to_bits() + (cell << CELL_SHIFT));
                let inside = map.boundaries.iter().filter(|&&b| edge(cell) < b && b < edge(cell + 1)).count();
                assert!(inside <= 1, "cell {cell}: {inside}");
            }
        }
    }

    #[test]
    fn every_value_takes_the_nearest_code() {
        let (signed, unsigned) = (signed_numbers(), UNSIGNED.values.clone());
        let mut x = 1.0f32;
        while x > 1e-8 {
            // The scale of both blocks is 1.
            let (values, mut codes, mut scale) = ([1.0, x, -x], [0u8; 3], 0.0);
            let mut found = [0.0; 3];
            encode_signed(&values, &mut codes, &mut scale);
            decode_signed(&codes, scale, &mut found);
            assert_eq!(scale, 1.0);
            for (value, found) in values.into_iter().zip(found) {
                assert_eq!((value - found).abs(), (value - nearest(&signed, value)).abs(), "{value} became {found}");
            }
            encode_unsigned(&values[..2], &mut codes, &mut scale);
            decode_unsigned(&codes, scale, &mut found);
            let expected = nearest(&unsigned, x).max(unsigned[1]);
            assert_eq!((x - found[1]).abs(), (x - expected).abs(), "{x} became {}", found[1]);
            x *= 0.9993;
        }
    }

    #[test]
    fn extremes_survive() {
        let mut codes = [0u8; 4];
        let (mut scale, mut found) = (0.0, [0.0; 4]);
        for values in [[f32::INFINITY, f32::MAX, 1.0, 0.0], [1e-45, 0.0, 1e-45, 0.0], [0.0; 4]] {
            encode_unsigned(&values, &mut codes, &mut scale);
            decode_unsigned(&codes, scale, &mut found);
            for (value, found) in values.into_iter().zip(found) {
                assert!(found.is_finite() && (found > 0.0 || value == 0.0 || scale < 1e-30), "{value} became {found}");
            }
            encode_signed(&values.map(|v| -v.min(f32::MAX)), &mut codes, &mut scale);
            decode_signed(&codes, scale, &mut found);
            assert!(found.iter().all(|f| f.is_finite()), "{found:?}");
        }
    }
}
