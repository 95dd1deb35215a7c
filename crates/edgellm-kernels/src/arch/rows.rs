//! The row kernels, over the vector operations of an instruction set.
//!
//! A row is read in blocks of 32 columns. Inside a block, a *unit* of `N` codes (the vector length) is loaded from
//! its bytes (`N` codes of `b` bits are `N b / 8` whole bytes), shifted and masked per lane, converted to floats and
//! scaled, `w = q * scale + min`, with one rounding. A symmetric format's minimum is `-scale * 2^(b - 1)`, exactly.
//! Scales of a row are converted to floats before its codes are read.
//!
//! Formats without a row kernel (the sparse ones) are decoded with their scalar codec, and dotted as rows of floats.
//!
//! A unit's load may read up to [`OVERREAD`] bytes beyond its block. Blocks are read in place where those bytes
//! exist in the matrix; the few others, and the last block of a ragged row of floats, are copied to the stack first.

use core::ops::Range;

use super::Kernel;
use crate::format::{BLOCK, Format, PackedLayout, QuantFormat, ScaleType};

/// Most bytes that a unit's load reads beyond the end of its block.
const OVERREAD: usize = 16;

/// A packed matrix in memory, with lengths checked.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a> {
    layout: PackedLayout,
    words: &'a [u32],
    scales: &'a [u32],
    row_words: usize,
    row_scale_words: usize,
}

impl<'a> PackedRows<'a> {
    /// # Panics
    /// If the lengths do not follow from the layout.
    pub(crate) fn new(layout: PackedLayout, words: &'a [u32], scales: &'a [u32]) -> Self {
        assert!(layout.format.check().is_ok() && layout.cols > 0, "a packed matrix {layout}");
        let (row_words, row_scale_words) = (layout.row_words(), layout.row_scale_words());
        assert_eq!(words.len(), layout.rows * row_words, "words of a packed matrix {layout}");
        if row_scale_words > 0 {
            assert_eq!(scales.len(), layout.rows * row_scale_words, "scales of a packed matrix {layout}");
        }
        PackedRows { layout, words, scales, row_words, row_scale_words }
    }

    pub(crate) fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Decodes columns `blocks.start * 32 ..` up to the end of the last block (whole blocks: columns beyond the
    /// matrix are unspecified finite values if the scales are finite) of some rows into consecutive rows of `out`.
    ///
    /// # Panics
    /// If rows, blocks or `out` are out of range.
    pub(crate) fn decode(&self, kernel: Kernel, rows: Range<usize>, blocks: Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.layout.rows && blocks.start < blocks.end, "rows {rows:?}, blocks {blocks:?}");
        assert!(blocks.end <= self.layout.cols.div_ceil(BLOCK), "blocks {blocks:?} of {}", self.layout);
        assert_eq!(out.len(), rows.len() * blocks.len() * BLOCK, "decoded rows");
        if !has_kernel(self.layout.format) {
            for (row, out) in rows.zip(out.chunks_exact_mut(blocks.len() * BLOCK)) {
                let (words, scales) = self.row(row);
                self.layout.format.codec().decode_blocks(self.layout.cols, words, scales, blocks.clone(), out);
            }
            return;
        }
        let job = Job { matrix: *self, rows, blocks };
        match kernel {
            Kernel::Scalar(isa) => isa.decode(job, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon(isa) => isa.decode(job, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot(isa) => isa.rows().decode(job, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm(isa) => isa.rows().decode(job, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2(isa) => isa.decode(job, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(isa) => isa.decode(job, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni(isa) => isa.rows().decode(job, out),
        }
    }

    /// Dots some rows with every token: `out[row * tokens + token]`, rows counted from the first.
    ///
    /// # Panics
    /// If rows, the tokens' width or `out` do not fit.
    pub(crate) fn dot(&self, kernel: Kernel, rows: Range<usize>, x: &Tokens, out: &mut [f32]) {
        assert!(rows.end <= self.layout.rows, "rows {rows:?} of {}", self.layout);
        assert_eq!(x.cols, self.layout.cols, "width of the tokens");
        assert_eq!(out.len(), rows.len() * x.count, "products");
        if !has_kernel(self.layout.format) {
            let floats = PackedLayout { rows: 1, format: Format::F32, ..self.layout };
            let mut buffer = vec![0.0f32; self.layout.cols];
            for (row, out) in rows.zip(out.chunks_exact_mut(x.count)) {
                let (words, scales) = self.row(row);
                self.layout.format.codec().decode(words, scales, &mut buffer);
                PackedRows::new(floats, bytemuck::cast_slice(&buffer), &[]).dot(kernel, 0..1, x, out);
            }
            return;
        }
        let job = Job { matrix: *self, rows, blocks: 0..self.layout.cols.div_ceil(BLOCK) };
        match kernel {
            Kernel::Scalar(isa) => isa.dot(job, x, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon(isa) => isa.dot(job, x, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot(isa) => isa.rows().dot(job, x, out),
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm(isa) => isa.rows().dot(job, x, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2(isa) => isa.dot(job, x, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(isa) => isa.dot(job, x, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni(isa) => isa.rows().dot(job, x, out),
        }
    }

    /// Words and scales of a row.
    fn row(&self, row: usize) -> (&'a [u32], &'a [u32]) {
        let (words, scales) = (self.row_words, self.row_scale_words);
        (&self.words[row * words..(row + 1) * words], &self.scales[row * scales..(row + 1) * scales])
    }
}

/// Whether the row kernels read a format.
fn has_kernel(format: Format) -> bool {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => true,
        Format::Quantized(q) => !q.is_sparse(),
    }
}

/// Token vectors, padded with zeros to whole blocks.
pub(crate) struct Tokens {
    count: usize,
    cols: usize,
    stride: usize,
    data: Vec<f32>,
}

impl Tokens {
    /// Copies `[count, cols]` values.
    pub(crate) fn new(x: &[f32], cols: usize) -> Self {
        let count = x.len() / cols;
        assert_eq!(x.len(), count * cols, "tokens of {cols} columns");
        let stride = cols.div_ceil(BLOCK) * BLOCK;
        let mut data = vec![0.0; count * stride];
        for (padded, x) in data.chunks_mut(stride).zip(x.chunks(cols)) {
            padded[..cols].copy_from_slice(x);
        }
        Tokens { count, cols, stride, data }
    }
}

/// Part of a matrix that a kernel works on. Built only by [`PackedRows`], which checks it.
pub(super) struct Job<'a> {
    matrix: PackedRows<'a>,
    rows: Range<usize>,
    blocks: Range<usize>,
}

/// The vector operations of an instruction set.
///
/// # Safety
/// Implementors' functions may only be called where the processor has the instruction set, inside a function
/// compiled for it. Pointers must be valid for the bytes that each function names.
pub(super) unsafe trait Lanes: Copy {
    /// `N` floats.
    type F: Copy;
    /// Vector length: 8 or 16.
    const N: usize;

    /// All lanes the same.
    unsafe fn splat(value: f32) -> Self::F;
    /// Reads `N` floats.
    unsafe fn load(p: *const f32) -> Self::F;
    /// Writes `N` floats.
    unsafe fn store(p: *mut f32, value: Self::F);
    /// `a * b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Sum of the lanes.
    unsafe fn sum(value: Self::F) -> f32;
    /// `N` codes of `B` bits; reads from `p` at most `N * B / 8` bytes rounded up to `N` bytes.
    unsafe fn codes<const B: usize>(p: *const u8) -> Self::F;
    /// `N` half-precision floats: `2 N` bytes.
    unsafe fn f16(p: *const u8) -> Self::F;
    /// `N` bfloat16 floats: `2 N` bytes.
    unsafe fn bf16(p: *const u8) -> Self::F;
}

/// How a block's bytes become numbers.
trait Codec {
    /// Bytes of a block of 32 columns.
    const BLOCK_BYTES: usize;
    /// Whether scales apply.
    const SCALED: bool;
    /// Unit `unit` of the block at `p`.
    ///
    /// # Safety
    /// `BLOCK_BYTES + OVERREAD` readable bytes at `p`, and those of [`Lanes`].
    unsafe fn unit<L: Lanes>(p: *const u8, unit: usize) -> L::F;
}

struct Bits<const B: usize>;
struct Single;
struct Half;
struct Brain;

impl<const B: usize> Codec for Bits<B> {
    const BLOCK_BYTES: usize = 4 * B;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn unit<L: Lanes>(p: *const u8, unit: usize) -> L::F {
        // SAFETY: the unit starts inside the block and reads at most OVERREAD bytes beyond it.
        unsafe { L::codes::<B>(p.add(unit * L::N * B / 8)) }
    }
}

impl Codec for Single {
    const BLOCK_BYTES: usize = 4 * BLOCK;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn unit<L: Lanes>(p: *const u8, unit: usize) -> L::F {
        // SAFETY: inside the block.
        unsafe { L::load(p.add(unit * L::N * 4).cast()) }
    }
}

impl Codec for Half {
    const BLOCK_BYTES: usize = 2 * BLOCK;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn unit<L: Lanes>(p: *const u8, unit: usize) -> L::F {
        // SAFETY: inside the block.
        unsafe { L::f16(p.add(unit * L::N * 2)) }
    }
}

impl Codec for Brain {
    const BLOCK_BYTES: usize = 2 * BLOCK;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn unit<L: Lanes>(p: *const u8, unit: usize) -> L::F {
        // SAFETY: inside the block.
        unsafe { L::bf16(p.add(unit * L::N * 2)) }
    }
}

/// Scales and minima of a row's groups as floats.
struct Scales {
    values: Vec<f32>,
    /// Distance between the scales of neighbouring groups.
    step: usize,
    /// Distance from a scale to its minimum.
    min: usize,
    /// First group that `values` holds.
    first: usize,
    /// `log2(group_size)`.
    shift: u32,
    groups: usize,
}

impl Scales {
    fn new(format: Format, blocks: &Range<usize>, cols: usize) -> Self {
        let Some(q) = format.quantized() else {
            return Scales { values: Vec::new(), step: 0, min: 0, first: 0, shift: 0, groups: 0 };
        };
        let group_size = usize::from(q.group_size);
        // From an even group, so that pairs of f16 scales in a word stay together.
        let first = blocks.start * BLOCK / group_size / 2 * 2;
        let last = ((blocks.end * BLOCK).min(cols) - 1) / group_size;
        // A block of a short last group may reach into a group that does not exist; its columns do not either, but
        // the unit is computed, with scale 0.
        let groups = (blocks.end * BLOCK).div_ceil(group_size).max(last + 1) - first;
        let (step, min) = if q.symmetric || q.scale_type == ScaleType::U8 { (1, groups) } else { (2, 1) };
        let values = vec![0.0; 2 * groups];
        Scales { values, step, min, first, shift: group_size.trailing_zeros(), groups }
    }

    /// Converts the scales of a row.
    ///
    /// # Safety
    /// That of [`Lanes`].
    #[inline(always)]
    unsafe fn read<L: Lanes>(&mut self, q: QuantFormat, row: &[u32]) {
        if q.scale_type == ScaleType::U8 {
            self.read_codes(q, row);
            return self.centre(q);
        }
        let stored = match (q.scale_type, q.symmetric) {
            (ScaleType::F16, true) => &row[self.first / 2..],
            (ScaleType::F32, false) => &row[2 * self.first..],
            _ => &row[self.first..],
        };
        let count = if q.symmetric { self.groups } else { 2 * self.groups };
        let out = &mut self.values[..count];
        match q.scale_type {
            // SAFETY: passed on.
            ScaleType::F16 => unsafe { halves::<L>(bytemuck::cast_slice(stored), out) },
            _ => {
                for (value, &bits) in out.iter_mut().zip(stored) {
                    *value = f32::from_bits(bits);
                }
            }
        }
        self.centre(q);
    }

    /// Converts two-level scales.
    #[inline(always)]
    fn read_codes(&mut self, q: QuantFormat, row: &[u32]) {
        let units = q.units(row);
        let codes = &row[1..];
        let (scales, minima) = if q.symmetric { (codes, &[][..]) } else { codes.split_at(codes.len() / 2) };
        let (scales, minima): (&[u8], &[i8]) = (bytemuck::cast_slice(scales), bytemuck::cast_slice(minima));
        let (out, out_minima) = self.values.split_at_mut(self.groups);
        let out = out.iter_mut().zip(&scales[self.first..]);
        if q.symmetric {
            out.for_each(|(value, &code)| *value = units.scale * f32::from(code as i8));
        } else {
            out.for_each(|(value, &code)| *value = units.scale * f32::from(code));
            for (value, &code) in out_minima.iter_mut().zip(&minima[self.first..]) {
                *value = units.min * f32::from(code);
            }
        }
    }

    /// The minima of a symmetric format.
    #[inline(always)]
    fn centre(&mut self, q: QuantFormat) {
        if q.symmetric {
            let zero = -(q.zero_point() as f32);
            let (scales, minima) = self.values.split_at_mut(self.groups);
            for (min, scale) in minima.iter_mut().zip(scales) {
                *min = *scale * zero;
            }
        }
    }

    /// Scale and minimum of a column's group.
    ///
    /// # Safety
    /// The column lies in the blocks that the value was made for.
    #[inline(always)]
    unsafe fn of(&self, col: usize) -> (f32, f32) {
        let at = ((col >> self.shift) - self.first) * self.step;
        debug_assert!(at + self.min < self.values.len());
        // SAFETY: `groups` counts every group of the blocks; see `new`.
        unsafe { (*self.values.get_unchecked(at), *self.values.get_unchecked(at + self.min)) }
    }
}

/// Converts as many half-precision floats as both slices hold.
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
unsafe fn halves<L: Lanes>(bits: &[u16], out: &mut [f32]) {
    let n = bits.len().min(out.len());
    let whole = n / L::N * L::N;
    let mut i = 0;
    while i < whole {
        // SAFETY: `i + N <= n`, and both slices hold `n` elements.
        unsafe { L::store(out.as_mut_ptr().add(i), L::f16(bits.as_ptr().add(i).cast())) };
        i += L::N;
    }
    if whole < n {
        let (mut source, mut target) = ([0u16; 16], [0f32; 16]);
        source[..n - whole].copy_from_slice(&bits[whole..n]);
        // SAFETY: the arrays hold 16 elements, the largest `N`.
        unsafe { L::store(target.as_mut_ptr(), L::f16(source.as_ptr().cast())) };
        out[whole..n].copy_from_slice(&target[..n - whole]);
    }
}

/// Where the blocks of a row are.
struct RowBytes<'a> {
    /// From the row's first byte to the end of the matrix.
    bytes: &'a [u8],
    row_bytes: usize,
}

impl RowBytes<'_> {
    /// The address of a block with `OVERREAD` readable bytes behind it: in place, or in `stack`.
    #[inline(always)]
    fn block<C: Codec>(&self, block: usize, stack: &mut [u8; 4 * BLOCK + OVERREAD]) -> *const u8 {
        let start = block * C::BLOCK_BYTES;
        let end = start + C::BLOCK_BYTES;
        if end <= self.row_bytes && end + OVERREAD <= self.bytes.len() {
            return self.bytes[start..].as_ptr();
        }
        let part = &self.bytes[start..end.min(self.row_bytes)];
        stack.fill(0);
        stack[..part.len()].copy_from_slice(part);
        stack.as_ptr()
    }
}

impl<'a> Job<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> (RowBytes<'a>, &'a [u32]) {
        let (words, scales) = (self.matrix.row_words, self.matrix.row_scale_words);
        let bytes = bytemuck::cast_slice(&self.matrix.words[row * words..]);
        let scales = if scales == 0 { &[] } else { &self.matrix.scales[row * scales..(row + 1) * scales] };
        (RowBytes { bytes, row_bytes: words * 4 }, scales)
    }
}

/// A unit of weights: codes with their scale.
///
/// # Safety
/// Those of [`Codec::unit`] and [`Scales::of`].
#[inline(always)]
unsafe fn weights<L: Lanes, C: Codec>(p: *const u8, unit: usize, col: usize, scales: &Scales) -> L::F {
    // SAFETY: passed on.
    unsafe {
        let values = C::unit::<L>(p, unit);
        if !C::SCALED {
            return values;
        }
        let (scale, min) = scales.of(col);
        L::fma(values, L::splat(scale), L::splat(min))
    }
}

/// Decodes a job; see [`PackedRows::decode`].
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
pub(super) unsafe fn decode<L: Lanes>(job: Job, out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match job.matrix.layout.format {
            Format::F32 => decode_as::<L, Single>(job, out),
            Format::F16 => decode_as::<L, Half>(job, out),
            Format::BF16 => decode_as::<L, Brain>(job, out),
            Format::Quantized(q) => match q.bit_width {
                2 => decode_as::<L, Bits<2>>(job, out),
                3 => decode_as::<L, Bits<3>>(job, out),
                4 => decode_as::<L, Bits<4>>(job, out),
                5 => decode_as::<L, Bits<5>>(job, out),
                6 => decode_as::<L, Bits<6>>(job, out),
                8 => decode_as::<L, Bits<8>>(job, out),
                _ => unreachable!("checked by PackedRows::new"),
            },
        }
    }
}

#[inline(always)]
unsafe fn decode_as<L: Lanes, C: Codec>(job: Job, out: &mut [f32]) {
    let layout = job.matrix.layout;
    let mut scales = Scales::new(layout.format, &job.blocks, layout.cols);
    let mut stack = [0; 4 * BLOCK + OVERREAD];
    let width = job.blocks.len() * BLOCK;
    for (row, out) in job.rows.clone().zip(out.chunks_exact_mut(width)) {
        let (bytes, row_scales) = job.row(row);
        if let Some(q) = layout.format.quantized() {
            // SAFETY: passed on.
            unsafe { scales.read::<L>(q, row_scales) };
        }
        for (block, out) in job.blocks.clone().zip(out.chunks_exact_mut(BLOCK)) {
            let p = bytes.block::<C>(block, &mut stack);
            for unit in 0..BLOCK / L::N {
                let at = unit * L::N;
                // SAFETY: `block` returns an address with OVERREAD bytes behind it, the column is in the job's
                // blocks, and `out` holds 32 floats.
                unsafe { L::store(out.as_mut_ptr().add(at), weights::<L, C>(p, unit, block * BLOCK + at, &scales)) };
            }
        }
    }
}

/// Dots a job's rows with tokens; see [`PackedRows::dot`].
///
/// # Safety
/// That of [`Lanes`].
#[inline(always)]
pub(super) unsafe fn dot<L: Lanes>(job: Job, x: &Tokens, out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match job.matrix.layout.format {
            Format::F32 => dot_as::<L, Single>(job, x, out),
            Format::F16 => dot_as::<L, Half>(job, x, out),
            Format::BF16 => dot_as::<L, Brain>(job, x, out),
            Format::Quantized(q) => match q.bit_width {
                2 => dot_as::<L, Bits<2>>(job, x, out),
                3 => dot_as::<L, Bits<3>>(job, x, out),
                4 => dot_as::<L, Bits<4>>(job, x, out),
                5 => dot_as::<L, Bits<5>>(job, x, out),
                6 => dot_as::<L, Bits<6>>(job, x, out),
                8 => dot_as::<L, Bits<8>>(job, x, out),
                _ => unreachable!("checked by PackedRows::new"),
            },
        }
    }
}

#[inline(always)]
unsafe fn dot_as<L: Lanes, C: Codec>(job: Job, x: &Tokens, out: &mut [f32]) {
    let layout = job.matrix.layout;
    let mut scales = Scales::new(layout.format, &job.blocks, layout.cols);
    for (row, out) in job.rows.clone().zip(out.chunks_exact_mut(x.count)) {
        let (bytes, row_scales) = job.row(row);
        if let Some(q) = layout.format.quantized() {
            // SAFETY: passed on.
            unsafe { scales.read::<L>(q, row_scales) };
        }
        let mut t = 0;
        while t < x.count {
            let left = x.count - t;
            let x = &x.data[t * x.stride..];
            // SAFETY: `x` holds `left` padded tokens.
            unsafe {
                if left >= 8 {
                    out[t..t + 8].copy_from_slice(&dot_tokens::<L, C, 8>(&bytes, job.blocks.end, &scales, x));
                    t += 8;
                } else if left >= 4 {
                    out[t..t + 4].copy_from_slice(&dot_tokens::<L, C, 4>(&bytes, job.blocks.end, &scales, x));
                    t += 4;
                } else if left >= 2 {
                    out[t..t + 2].copy_from_slice(&dot_tokens::<L, C, 2>(&bytes, job.blocks.end, &scales, x));
                    t += 2;
                } else {
                    out[t..t + 1].copy_from_slice(&dot_tokens::<L, C, 1>(&bytes, job.blocks.end, &scales, x));
                    t += 1;
                }
            }
        }
    }
}

/// Sums of a token that are under way at once. The same for every number of tokens, so that a token's products do not
/// depend on which tokens it is run with.
const SUMS: usize = 2;

/// Dots a row with `T` tokens, with [`SUMS`] accumulators each, so that additions do not wait for one another.
///
/// # Safety
/// `x` holds `T` tokens of `blocks * 32` floats each, the scales are those of the row, and that of [`Lanes`].
#[inline(always)]
unsafe fn dot_tokens<L: Lanes, C: Codec, const T: usize>(
    bytes: &RowBytes,
    blocks: usize,
    scales: &Scales,
    x: &[f32],
) -> [f32; T] {
    let stride = blocks * BLOCK;
    assert!(x.len() >= T * stride, "padded tokens");
    let mut stack = [0; 4 * BLOCK + OVERREAD];
    // SAFETY: lengths are checked above and by `block`; the columns lie in the blocks of the scales.
    unsafe {
        let mut sums = [[L::splat(0.0); SUMS]; T];
        for block in 0..blocks {
            let p = bytes.block::<C>(block, &mut stack);
            for unit in 0..BLOCK / L::N {
                let col = block * BLOCK + unit * L::N;
                let w = weights::<L, C>(p, unit, col, scales);
                for (t, sums) in sums.iter_mut().enumerate() {
                    let sum = &mut sums[unit % SUMS];
                    *sum = L::fma(w, L::load(x.as_ptr().add(t * stride + col)), *sum);
                }
            }
        }
        let mut out = [0.0; T];
        for (out, sums) in out.iter_mut().zip(sums) {
            for sum in sums {
                *out += L::sum(sum);
            }
        }
        out
    }
}
