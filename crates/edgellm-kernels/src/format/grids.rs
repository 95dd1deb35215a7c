//! Matrices from codes and grids that someone else chose, for roundings that look at more than one group (GPTQ).
//!
//! Such a rounding asks with [`QuantFormat::round_grids`] what the format would store for a row, computes codes on that,
//! and packs both with [`PackedHost::from_grids`], which rounds nothing.

use burn::tensor::Bytes;
use rayon::prelude::*;

use super::{Arrangement, PackedLayout, QuantFormat, ScaleType, put_code};
use crate::error::{KernelError, Result};
use crate::host::PackedHost;

impl QuantFormat {
    /// Rounds the scales and minima of a row's groups, in order, to the nearest that the format stores: what
    /// [`PackedHost::from_grids`] takes, and what the row decodes with. Two-level scales share the units that they choose
    /// here, so that a row is rounded as a whole; their codes are at least 1 where a scale is not 0. `mins` is empty if
    /// the format is symmetric. What was rounded before stays as it is. `row` is only for messages.
    ///
    /// # Errors
    /// [`KernelError::Grid`] if a scale or minimum is not finite or becomes infinite, or if a scale is negative and the
    /// format is asymmetric with two-level scales, which have no sign.
    ///
    /// # Panics
    /// If there are not as many minima as scales, or, if the format is symmetric, none.
    ///
    /// ```
    /// use edgellm_kernels::Format;
    /// let format = Format::parse("q4g32a-8")?.quantized().unwrap();
    /// let (mut scales, mut mins) = (vec![0.013, 0.021], vec![-0.1, -0.2]);
    /// format.round_grids(0, &mut scales, &mut mins)?;
    /// assert!((scales[0] - 0.013).abs() < 1e-4 && (mins[1] + 0.2).abs() < 1e-3);
    /// # Ok::<(), edgellm_kernels::KernelError>(())
    /// ```
    pub fn round_grids(&self, row: usize, scales: &mut [f32], mins: &mut [f32]) -> Result<()> {
        let expected = if self.symmetric { 0 } else { scales.len() };
        assert_eq!(mins.len(), expected, "minima of {} groups of {}", scales.len(), self.name());
        let units = self.choose_units(scales, mins);
        for (group, scale) in scales.iter_mut().enumerate() {
            let min = mins.get(group).copied().unwrap_or(0.0);
            let (found, rounded_min) = self.rounded_grid(units, *scale, min);
            let finite = [*scale, min, found, rounded_min].iter().all(|v| v.is_finite());
            if !finite || self.loses_sign(*scale) {
                return Err(KernelError::Grid { row, group, scale: *scale, min, format: self.name() });
            }
            *scale = found;
            if let Some(min) = mins.get_mut(group) {
                *min = rounded_min;
            }
        }
        Ok(())
    }
}

impl PackedHost {
    /// Packs codes, `[rows, cols]` and below `2^bit_width`, whose groups have these scales and minima, `[rows, groups]`
    /// (no minima if the format is symmetric). The weights decode to `scale * code + min` (asymmetric) or
    /// `scale * (code - 2^(b - 1))` (symmetric), with exactly these scales and minima: they are what
    /// [`QuantFormat::round_grids`] gave, or otherwise what the format can hold.
    ///
    /// # Errors
    /// [`KernelError::NoGrids`] if the format is a float or sparse, [`KernelError::Length`],
    /// [`KernelError::Grid`] if the format would round a scale or minimum, [`KernelError::Code`] if a code is too large,
    /// and the errors of [`PackedLayout::check`].
    ///
    /// ```
    /// use edgellm_kernels::{Format, PackedHost, PackedLayout};
    /// let layout = PackedLayout::new(1, 32, Format::parse("q4g32a-8")?)?;
    /// let codes: Vec<u8> = (0..32).map(|i| i % 16).collect();
    /// let packed = PackedHost::from_grids(layout, &[0.25], &[-1.0], &codes)?;
    /// assert_eq!(packed.dequantize()[..3], [-1.0, -0.75, -0.5]);
    /// # Ok::<(), edgellm_kernels::KernelError>(())
    /// ```
    pub fn from_grids(layout: PackedLayout, scales: &[f32], mins: &[f32], codes: &[u8]) -> Result<Self> {
        layout.check()?;
        if layout.arrangement == Arrangement::Panels {
            let rows = PackedLayout { arrangement: Arrangement::Rows, ..layout };
            return Self::from_grids(rows, scales, mins, codes)?.prepare();
        }
        let Some(format) = layout.format.quantized().filter(|q| !q.is_sparse()) else {
            return Err(KernelError::NoGrids { format: layout.format.name() });
        };
        let groups = format.groups(layout.cols);
        let lengths = [
            ("scales of groups", layout.rows * groups, scales.len()),
            ("minima of groups", if format.symmetric { 0 } else { layout.rows * groups }, mins.len()),
            ("codes", layout.rows * layout.cols, codes.len()),
        ];
        for (what, expected, found) in lengths {
            if expected != found {
                return Err(KernelError::Length { what, layout: layout.to_string(), expected, found });
            }
        }
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        let mut words = vec![0u32; layout.rows * row_words];
        let mut packed_scales = vec![0u32; layout.rows * row_scales];
        words
            .par_chunks_mut(row_words)
            .zip(packed_scales.par_chunks_mut(row_scales))
            .zip(scales.par_chunks(groups).zip(codes.par_chunks(layout.cols)))
            .enumerate()
            .map(|(row, ((words, packed), (scales, codes)))| {
                let mins = if format.symmetric { &[] } else { &mins[row * groups..(row + 1) * groups] };
                format.put_grids(row, scales, mins, packed)?;
                format.put_codes(row, codes, words)
            })
            .collect::<Result<()>>()?;
        Ok(PackedHost { layout, words: Bytes::from_elems(words), scales: Bytes::from_elems(packed_scales) })
    }
}

impl QuantFormat {
    /// Writes scales and minima into the zeroed scale words of a row, if that rounds nothing.
    fn put_grids(&self, row: usize, scales: &[f32], mins: &[f32], packed: &mut [u32]) -> Result<()> {
        let (mut stored, mut stored_mins) = (scales.to_vec(), mins.to_vec());
        self.round_grids(row, &mut stored, &mut stored_mins)?;
        let units = self.choose_units(scales, mins);
        self.put_units(packed, units);
        for (group, (&scale, found)) in scales.iter().zip(stored).enumerate() {
            let min = mins.get(group).copied().unwrap_or(0.0);
            if found != scale || stored_mins.get(group).is_some_and(|found| *found != min) {
                return Err(KernelError::Grid { row, group, scale, min, format: self.name() });
            }
            self.store(packed, units, group, scale, min);
        }
        Ok(())
    }

    /// Writes the codes of a row into zeroed words.
    fn put_codes(&self, row: usize, codes: &[u8], words: &mut [u32]) -> Result<()> {
        for (col, &code) in codes.iter().enumerate() {
            if u32::from(code) >> self.bit_width != 0 {
                return Err(KernelError::Code { row, col, code, format: self.name() });
            }
            put_code(words, usize::from(self.bit_width), col, u32::from(code));
        }
        Ok(())
    }

    /// Whether a scale's sign cannot be stored.
    fn loses_sign(&self, scale: f32) -> bool {
        scale < 0.0 && !self.symmetric && self.scale_type == ScaleType::U8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn dense() -> impl Iterator<Item = (Format, QuantFormat)> {
        let dense = |format: Format| Some((format, format.quantized().filter(|q| !q.is_sparse())?));
        Format::all().into_iter().filter_map(dense)
    }

    /// What a format rounded once, it stores, decodes with, and rounds to itself; of every magnitude.
    #[test]
    fn rounded_grids_are_reproduced_exactly() {
        let (rows, cols) = (7, 290);
        for (format, q) in dense() {
            for (seed, magnitude) in [0.5, 3e-3, 1e-5, 60.0].into_iter().enumerate() {
                let groups = q.groups(cols);
                let sign = |i: usize| if q.symmetric && i.is_multiple_of(3) { -magnitude } else { magnitude };
                let noise = |seed| noise(rows * groups, seed);
                let mut scales: Vec<f32> =
                    noise(seed as u32).iter().enumerate().map(|(i, v)| sign(i) * (v + 0.03)).collect();
                let mut mins: Vec<f32> = noise(seed as u32 + 9).iter().map(|v| magnitude * (1.0 - 9.0 * v)).collect();
                scales[groups / 2] = 0.0;
                if q.symmetric {
                    mins.clear();
                }
                for row in 0..rows {
                    let part = row * groups..(row + 1) * groups;
                    let mins = if q.symmetric { &mut [][..] } else { &mut mins[part.clone()] };
                    q.round_grids(row, &mut scales[part.clone()], mins).unwrap();
                    let (again, mins_again) = (&mut scales[part.clone()].to_vec(), &mut mins.to_vec());
                    q.round_grids(row, again, mins_again).unwrap();
                    assert_eq!((&again[..], &mins_again[..]), (&scales[part], &mins[..]), "{format}");
                }
                let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % (1 << q.bit_width)) as u8).collect();
                let layout = PackedLayout::new(rows, cols, format).unwrap();
                let packed = PackedHost::from_grids(layout, &scales, &mins, &codes).unwrap();
                let expected: Vec<f32> = (0..rows * cols)
                    .map(|i| {
                        let group = i / cols * groups + i % cols / usize::from(q.group_size);
                        q.value(codes[i].into(), scales[group], mins.get(group).copied().unwrap_or(0.0))
                    })
                    .collect();
                assert_eq!(packed.dequantize(), expected, "{format}");
                let panels = PackedHost::from_grids(layout.prepared(), &scales, &mins, &codes).unwrap();
                assert_eq!((panels.layout, panels.dequantize()), (layout.prepared(), expected), "{format}");
            }
        }
    }

    /// Half a code of the row's unit, or half the last bit of a half-precision float.
    #[test]
    fn grids_are_rounded_to_the_nearest() {
        for (format, q) in dense() {
            let (before, mins_before) = (noise(40, 1), noise(40, 2));
            let (mut scales, mut mins) = (before.clone(), mins_before.clone());
            if q.symmetric {
                mins.clear();
            }
            q.round_grids(0, &mut scales, &mut mins).unwrap();
            let half_step = match q.scale_type {
                ScaleType::F16 => 2f32.powi(-12),
                ScaleType::F32 => 0.0,
                ScaleType::U8 => 0.51 / 126.0,
            };
            for (found, expected) in scales.iter().chain(&mins).zip(before.iter().chain(&mins_before)) {
                // Scales above half the unit; others become the unit.
                let allowed = if *expected < half_step { 2.0 * half_step } else { half_step };
                assert!((found - expected).abs() <= allowed, "{format}: {found} {expected}");
            }
        }
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let layout = |name: &str| PackedLayout::new(1, 64, Format::parse(name).unwrap()).unwrap();
        let pack = |name: &str, scales: &[f32], mins: &[f32], codes: &[u8]| {
            PackedHost::from_grids(layout(name), scales, mins, codes).unwrap_err()
        };
        let codes = [3; 64];
        assert!(matches!(pack("f16", &[], &[], &codes), KernelError::NoGrids { .. }));
        assert!(matches!(pack("q4g32s-2:4", &[1.0; 2], &[], &codes), KernelError::NoGrids { .. }));
        assert!(matches!(pack("q4g32a", &[1.0], &[1.0; 2], &codes), KernelError::Length { expected: 2, found: 1, .. }));
        assert!(matches!(pack("q4g32s", &[1.0; 2], &[1.0; 2], &codes), KernelError::Length { expected: 0, .. }));
        assert!(matches!(pack("q4g32s", &[1.0; 2], &[], &[3; 63]), KernelError::Length { expected: 64, .. }));
        assert!(matches!(pack("q2g32s", &[1.0; 2], &[], &[4; 64]), KernelError::Code { row: 0, col: 0, code: 4, .. }));
        // With 0.1 in its row, 1 is not a multiple of the unit either.
        for (name, second, bad) in
            [("q4g32a", 0.1, 1), ("q4g32a-8", 0.1, 0), ("q4g32a-8", -1.0, 1), ("q4g32a-8", f32::NAN, 1)]
        {
            let found = pack(name, &[1.0, second], &[0.0; 2], &codes);
            assert!(matches!(found, KernelError::Grid { row: 0, group, .. } if group == bad), "{name}: {found}");
        }
        let q = layout("q4g32a").format.quantized().unwrap();
        assert!(matches!(q.round_grids(5, &mut [1e6], &mut [0.0]), Err(KernelError::Grid { row: 5, group: 0, .. })));
    }
}
