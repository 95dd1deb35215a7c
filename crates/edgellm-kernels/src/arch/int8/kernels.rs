//! The integer kernels, over the vector operations of an instruction set.

use core::cell::Cell;
use core::ops::Range;

use super::tokens::{Tile, TileMut, Tokens8};
use super::{Attend, BLOCK_BYTES, LowRank, Vector};
use crate::arch::matmul::ColumnsMut;
use crate::format::{BLOCK, PANEL_ROWS, ScaleType};
use crate::panels::Panels;

/// How far ahead codes are fetched.
const AHEAD: usize = 4096;
/// Most tokens for which codes are unpacked in registers.
const FEW: usize = 8;
/// Rows of a block of the backward pass.
const PAIR: usize = 2;

/// Calls a kernel for a bit width and a number of parts.
macro_rules! for_format {
    ($format:expr, $l:ident::$kernel:ident($($argument:expr),*)) => {
        match ($format.bit_width, $format.group_size) {
            (2, 16) => $l::$kernel::<2, 2>($($argument),*),
            (3, 16) => $l::$kernel::<3, 2>($($argument),*),
            (4, 16) => $l::$kernel::<4, 2>($($argument),*),
            (5, 16) => $l::$kernel::<5, 2>($($argument),*),
            (6, 16) => $l::$kernel::<6, 2>($($argument),*),
            (8, 16) => $l::$kernel::<8, 2>($($argument),*),
            (2, _) => $l::$kernel::<2, 1>($($argument),*),
            (3, _) => $l::$kernel::<3, 1>($($argument),*),
            (4, _) => $l::$kernel::<4, 1>($($argument),*),
            (5, _) => $l::$kernel::<5, 1>($($argument),*),
            (6, _) => $l::$kernel::<6, 1>($($argument),*),
            _ => $l::$kernel::<8, 1>($($argument),*),
        }
    };
}

/// Calls a kernel for a bit width.
macro_rules! for_width {
    ($bits:expr, $l:ident::$kernel:ident($($argument:expr),*)) => {
        match $bits {
            2 => $l::$kernel::<2>($($argument),*),
            3 => $l::$kernel::<3>($($argument),*),
            4 => $l::$kernel::<4>($($argument),*),
            5 => $l::$kernel::<5>($($argument),*),
            6 => $l::$kernel::<6>($($argument),*),
            _ => $l::$kernel::<8>($($argument),*),
        }
    };
}

/// Which part of which product.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    /// `out[t, r] = sum_k x[t, k] w[r, k]`; parts are panels of 16 rows.
    Forward,
    /// `out[t, k] = sum_r x[t, r] w[r, k]`; parts are blocks of 32 columns.
    Backward,
}

/// Some columns of a product's result.
pub(crate) struct Task<'a, 'b> {
    pub(crate) matrix: Panels<'a>,
    pub(crate) x: &'a Tokens8,
    pub(crate) part: Part,
    /// Panels, or blocks of columns.
    pub(crate) range: Range<usize>,
    /// `[tokens, columns of the range]`.
    pub(crate) out: ColumnsMut<'b>,
    /// Whether to add to what `out` holds.
    pub(crate) accumulate: bool,
}

impl Task<'_, '_> {
    /// # Panics
    /// If the shapes disagree.
    pub(crate) fn check(&self) {
        let layout = self.matrix.layout();
        let (limit, blocks, width, of) = match self.part {
            Part::Forward => (layout.panels(), self.matrix.blocks(), PANEL_ROWS, layout.rows),
            Part::Backward => (self.matrix.blocks(), layout.rows.div_ceil(BLOCK), BLOCK, layout.cols),
        };
        assert!(self.range.start <= self.range.end && self.range.end <= limit, "part {:?} of {layout}", self.range);
        assert_eq!(self.x.blocks(), blocks, "width of the tokens");
        assert_eq!(self.out.rows(), self.x.count(), "rows of the result");
        let columns = (self.range.end * width).min(of) - (self.range.start * width).min(of);
        assert_eq!(self.out.cols(), columns, "columns of the result");
    }
}

/// Computes a task.
///
/// # Panics
/// If the task's shapes disagree.
pub(super) fn run<L: Entry>(isa: L, mut task: Task<'_, '_>) {
    task.check();
    match task.part {
        Part::Forward if task.x.count() <= FEW && task.matrix.format().is_sparse() => {
            for_width!(task.matrix.format().bit_width, L::few_kept(isa, &mut task))
        }
        Part::Forward if task.x.count() <= FEW => for_format!(task.matrix.format(), L::few(isa, &mut task)),
        Part::Forward => many(isa, &mut task),
        Part::Backward => backward(isa, &mut task),
    }
}

/// The kernels of an instruction set: those of this module, compiled for it. A value proves that it is there.
pub(super) trait Entry: Vector {
    /// A product with few tokens.
    fn few<const B: usize, const PARTS: usize>(self, task: &mut Task<'_, '_>);
    /// The same with a sparse format.
    fn few_kept<const B: usize>(self, task: &mut Task<'_, '_>);
    /// Unpacks a panel into buffers.
    fn unpack<const B: usize, const PARTS: usize>(self, matrix: &Panels<'_>, panel: usize, buffer: &mut Buffer);
    /// Rounds a row of half blocks (16 columns of all rows) to 8 bits with common scales, and transposes it.
    fn half_block<const B: usize, const PARTS: usize>(self, matrix: &Panels<'_>, half: usize, buffer: &mut Buffer);
    /// Rounds activations.
    fn round_tile(self, tile: &mut TileMut<'_>, x: &[f32], cols: usize);
    /// Attention.
    fn attend(self, job: &mut Attend<'_>);
    /// A product with a matrix of a few rows.
    fn low_rank(self, job: &mut LowRank<'_>);
    /// Sixteen columns of a result for all tokens.
    fn tiles<const PARTS: usize, const BITS: usize>(self, task: &mut Task<'_, '_>, index: usize, buffer: &Buffer);
}

/// Implements [`Entry`] for a type that implements [`Vector`], with its target features. The kernels for many tokens are
/// those of this module, or of another one.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! entries {
    ($isa:ty, $features:literal) => {
        $crate::arch::int8::kernels::entries!($isa, $features, kernels);
    };
    ($isa:ty, $features:literal, $many:ident) => {
        impl $crate::arch::int8::kernels::Entry for $isa {
            fn few<const B: usize, const PARTS: usize>(self, task: &mut Task<'_, '_>) {
                #[target_feature(enable = $features)]
                fn run<const B: usize, const PARTS: usize>(task: &mut Task<'_, '_>) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { kernels::few::<$isa, B, PARTS>(task) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run::<B, PARTS>(task) }
            }

            fn few_kept<const B: usize>(self, task: &mut Task<'_, '_>) {
                #[target_feature(enable = $features)]
                fn run<const B: usize>(task: &mut Task<'_, '_>) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { kernels::few_kept::<$isa, B>(task) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run::<B>(task) }
            }

            fn round_tile(self, tile: &mut $crate::arch::int8::TileMut<'_>, x: &[f32], cols: usize) {
                #[target_feature(enable = $features)]
                fn run(tile: &mut $crate::arch::int8::TileMut<'_>, x: &[f32], cols: usize) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { $crate::arch::int8::tokens::round::<$isa>(tile, x, cols) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run(tile, x, cols) }
            }

            fn attend(self, job: &mut $crate::arch::int8::Attend<'_>) {
                #[target_feature(enable = $features)]
                fn run(job: &mut $crate::arch::int8::Attend<'_>) {
                    // SAFETY: compiled for the instruction set, and called where it exists; the caller checked the job.
                    unsafe { $crate::arch::int8::attend::attend::<$isa>(job) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run(job) }
            }

            fn low_rank(self, job: &mut $crate::arch::int8::LowRank<'_>) {
                #[target_feature(enable = $features)]
                fn run(job: &mut $crate::arch::int8::LowRank<'_>) {
                    // SAFETY: compiled for the instruction set, and called where it exists; the caller checked the job.
                    unsafe { $crate::arch::int8::low_rank::low_rank::<$isa>(job) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run(job) }
            }

            fn unpack<const B: usize, const PARTS: usize>(
                self,
                matrix: &Panels<'_>,
                panel: usize,
                buffer: &mut kernels::Buffer,
            ) {
                #[target_feature(enable = $features)]
                fn run<const B: usize, const PARTS: usize>(m: &Panels<'_>, panel: usize, buffer: &mut kernels::Buffer) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { $many::unpack_panel::<$isa, B, PARTS>(m, panel, buffer) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run::<B, PARTS>(matrix, panel, buffer) }
            }

            fn half_block<const B: usize, const PARTS: usize>(
                self,
                matrix: &Panels<'_>,
                half: usize,
                buffer: &mut kernels::Buffer,
            ) {
                #[target_feature(enable = $features)]
                fn run<const B: usize, const PARTS: usize>(m: &Panels<'_>, half: usize, buffer: &mut kernels::Buffer) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { $many::transpose_half::<$isa, B, PARTS>(m, half, buffer) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run::<B, PARTS>(matrix, half, buffer) }
            }

            fn tiles<const PARTS: usize, const BITS: usize>(
                self,
                task: &mut Task<'_, '_>,
                index: usize,
                buffer: &kernels::Buffer,
            ) {
                #[target_feature(enable = $features)]
                fn run<const PARTS: usize, const BITS: usize>(task: &mut Task<'_, '_>, i: usize, b: &kernels::Buffer) {
                    // SAFETY: compiled for the instruction set, and called where it exists.
                    unsafe { $many::tiles::<$isa, PARTS, BITS>(task, i, b) }
                }
                // SAFETY: `self` proves the instruction set.
                unsafe { run::<PARTS, BITS>(task, index, buffer) }
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use entries;

/// A panel, or half a block of columns, unpacked for the kernels.
#[derive(Default)]
pub(super) struct Buffer {
    /// `[block][quad][16][4]`.
    pub(super) codes: Vec<u8>,
    /// Scales and minima, `[block][part][2][16]`.
    pub(super) scales: Vec<f32>,
    /// Kept codes of a sparse format.
    kept: Vec<u8>,
    /// A block of columns of a sparse format, expanded: `[panel][quad][16][4]`.
    expanded: Vec<u8>,
}

impl Buffer {
    fn resize(&mut self, blocks: usize, parts: usize) {
        self.codes.resize(blocks * BLOCK_BYTES, 0);
        self.scales.resize(blocks * parts * 2 * PANEL_ROWS, 0.0);
    }
}

/// A product with many tokens.
fn many<L: Entry>(isa: L, task: &mut Task<'_, '_>) {
    let mut buffer = Buffer::default();
    let q = task.matrix.format();
    for (index, panel) in task.range.clone().enumerate() {
        for_format!(q, L::unpack(isa, &task.matrix, panel, &mut buffer));
        match (q.group_size, q.bit_width) {
            (16, 8) => L::tiles::<2, 8>(isa, task, index, &buffer),
            (16, 5 | 6) => L::tiles::<2, 6>(isa, task, index, &buffer),
            (16, _) => L::tiles::<2, 4>(isa, task, index, &buffer),
            (_, 8) => L::tiles::<1, 8>(isa, task, index, &buffer),
            (_, 5 | 6) => L::tiles::<1, 6>(isa, task, index, &buffer),
            _ => L::tiles::<1, 4>(isa, task, index, &buffer),
        }
    }
}

/// The backward product.
fn backward<L: Entry>(isa: L, task: &mut Task<'_, '_>) {
    let mut buffer = Buffer::default();
    let halves = task.out.cols().div_ceil(PANEL_ROWS);
    for index in 0..halves {
        let half = 2 * task.range.start + index;
        for_format!(task.matrix.format(), L::half_block(isa, &task.matrix, half, &mut buffer));
        L::tiles::<1, 8>(isa, task, index, &buffer);
    }
}

/// Where the kernels find codes, scales and minima of a panel.
pub(in crate::arch) trait Source<L: Vector> {
    /// Sums of a block that are scaled separately: 2 for groups of 16 columns.
    const PARTS: usize;
    /// Bits of the codes.
    const BITS: usize;
    /// Quad `quad` of block `block`.
    ///
    /// # Safety
    /// The block exists; the instruction set is `L`.
    unsafe fn quad(&self, block: usize, quad: usize) -> L::V;
    /// Asks for what will be read some blocks later.
    #[inline(always)]
    fn prefetch(&self, _block: usize) {}
    /// Scales and minima of a part of a block.
    ///
    /// # Safety
    /// As `quad`.
    unsafe fn scales(&self, block: usize, part: usize) -> (L::F, L::F);
}

/// A panel as it is stored.
struct Stored<const B: usize, const PARTS: usize, const LEVELS: usize> {
    words: *const u8,
    scales: *const u8,
    layout: Scales,
}

/// How the scales of panels are stored.
#[derive(Clone, Copy)]
struct Scales {
    symmetric: bool,
    /// Whether scales are half-precision floats; otherwise single-precision ones, or of two levels.
    half: bool,
    two_levels: bool,
    /// `log2` of the blocks of a group.
    shift: u32,
    /// Bytes before the first group: the rows' units.
    units: usize,
    /// Bytes of a group.
    stride: usize,
    /// Minimum over scale of a symmetric format, less the bias of the codes.
    zero: f32,
    /// What the codes' bytes are centred by.
    bias: f32,
}

impl Scales {
    /// `bias`: what the codes' bytes are centred by.
    fn new(matrix: &Panels<'_>, bias: f32) -> Self {
        let q = matrix.format();
        let vectors = if q.symmetric { 1 } else { 2 };
        let (scale_bytes, unit_bytes) = match q.scale_type {
            ScaleType::F16 => (2, 0),
            ScaleType::F32 => (4, 0),
            ScaleType::U8 => (1, 4),
        };
        Scales {
            symmetric: q.symmetric,
            half: q.scale_type == ScaleType::F16,
            two_levels: q.scale_type == ScaleType::U8,
            shift: (usize::from(q.group_size) / BLOCK).max(1).ilog2(),
            units: unit_bytes * PANEL_ROWS * vectors,
            stride: scale_bytes * PANEL_ROWS * vectors,
            zero: bias - q.zero_point() as f32,
            bias,
        }
    }

    /// # Safety
    /// The group exists; the instruction set is `L`.
    #[inline(always)]
    unsafe fn get<L: Vector, const PARTS: usize>(&self, start: *const u8, block: usize, part: usize) -> (L::F, L::F) {
        // SAFETY: the function's contract.
        unsafe {
            if self.two_levels {
                self.get_as::<L, PARTS, 2>(start, block, part)
            } else {
                self.get_as::<L, PARTS, 1>(start, block, part)
            }
        }
    }

    /// The same of scales of so many levels.
    ///
    /// # Safety
    /// As [`get`](Self::get).
    #[inline(always)]
    unsafe fn get_as<L: Vector, const PARTS: usize, const LEVELS: usize>(
        &self,
        start: *const u8,
        block: usize,
        part: usize,
    ) -> (L::F, L::F) {
        let group = if PARTS == 2 { 2 * block + part } else { block >> self.shift };
        // SAFETY: the units and a group's `stride` bytes lie in the panel, whose scales begin at `start`.
        unsafe {
            if LEVELS == 2 {
                let (p, units) = (start.add(self.units + group * self.stride), start.cast::<f32>());
                let codes = if self.symmetric { L::load_i8(p.cast()) } else { L::load_u8(p) };
                let scale = L::mul(codes, L::load_f(units));
                if self.symmetric {
                    return (scale, L::mul(scale, L::splat(self.zero)));
                }
                let min = L::mul(L::load_i8(p.add(PANEL_ROWS).cast()), L::load_f(units.add(PANEL_ROWS)));
                return (scale, L::fma(scale, L::splat(self.bias), min));
            }
            let p = start.add(group * self.stride);
            let scale = if self.half { L::load_f16(p) } else { L::load_f(p.cast()) };
            let min = if self.symmetric {
                L::mul(scale, L::splat(self.zero))
            } else {
                let p = p.add(self.stride / 2);
                let min = if self.half { L::load_f16(p) } else { L::load_f(p.cast()) };
                L::fma(scale, L::splat(self.bias), min)
            };
            (scale, min)
        }
    }
}

/// Bits `offset ..` of the codes of a quad, from the plane of `P` bits at `plane`.
///
/// # Safety
/// The plane's `64 P` bytes are readable; the instruction set is `L`.
#[inline(always)]
unsafe fn plane<L: Vector, const P: usize>(plane: *const u8, quad: usize, offset: u32) -> L::V {
    let parts = 8 / P;
    let shift = (P * (quad % parts)) as u32;
    let mask = (((1u32 << P) - 1) << offset) as u8;
    // SAFETY: the function's contract.
    unsafe {
        let v = L::load(plane.add(64 * (quad / parts)));
        L::bits(v, shift.saturating_sub(offset), offset.saturating_sub(shift), mask)
    }
}

/// Quad `quad` of a packed block.
///
/// # Safety
/// The block's `64 B` bytes are readable; the instruction set is `L`.
#[inline(always)]
unsafe fn unpack<L: Vector, const B: usize>(block: *const u8, quad: usize) -> L::V {
    // SAFETY: the function's contract; the planes of a block add up to `B` bits.
    unsafe {
        match B {
            8 => L::load(block.add(64 * quad)),
            6 => L::or(plane::<L, 4>(block, quad, 0), plane::<L, 2>(block.add(256), quad, 4)),
            5 => L::or(plane::<L, 4>(block, quad, 0), plane::<L, 1>(block.add(256), quad, 4)),
            4 => plane::<L, 4>(block, quad, 0),
            3 => L::or(plane::<L, 2>(block, quad, 0), plane::<L, 1>(block.add(128), quad, 2)),
            _ => plane::<L, 2>(block, quad, 0),
        }
    }
}

impl<L: Vector, const B: usize, const PARTS: usize, const LEVELS: usize> Source<L> for Stored<B, PARTS, LEVELS> {
    const PARTS: usize = PARTS;
    const BITS: usize = B;

    #[inline(always)]
    fn prefetch(&self, block: usize) {
        for line in 0..B {
            L::prefetch(self.words.wrapping_add(64 * (B * block + line) + AHEAD));
        }
    }

    #[inline(always)]
    unsafe fn quad(&self, block: usize, quad: usize) -> L::V {
        // SAFETY: the block exists.
        unsafe {
            let v = unpack::<L, B>(self.words.add(64 * B * block), quad);
            if B == 8 { L::centre(v) } else { v }
        }
    }

    #[inline(always)]
    unsafe fn scales(&self, block: usize, part: usize) -> (L::F, L::F) {
        // SAFETY: the block exists.
        unsafe { self.layout.get_as::<L, PARTS, LEVELS>(self.scales, block, part) }
    }
}

/// A panel unpacked into buffers.
struct Unpacked<'a, const PARTS: usize, const BITS: usize> {
    codes: &'a [u8],
    /// Scales and minima, `[block][part][2][16]`.
    scales: &'a [f32],
}

impl<L: Vector, const PARTS: usize, const BITS: usize> Source<L> for Unpacked<'_, PARTS, BITS> {
    const PARTS: usize = PARTS;
    const BITS: usize = BITS;

    #[inline(always)]
    unsafe fn quad(&self, block: usize, quad: usize) -> L::V {
        // SAFETY: the block exists.
        unsafe { L::load(self.codes.as_ptr().add(BLOCK_BYTES * block + 64 * quad)) }
    }

    #[inline(always)]
    unsafe fn scales(&self, block: usize, part: usize) -> (L::F, L::F) {
        // SAFETY: the block exists.
        unsafe {
            let p = self.scales.as_ptr().add((block * PARTS + part) * 2 * PANEL_ROWS);
            (L::load_f(p), L::load_f(p.add(PANEL_ROWS)))
        }
    }
}

/// Sixteen columns of the result, as a kernel writes them.
#[derive(Clone, Copy)]
pub(super) struct Place {
    out: *mut f32,
    /// Between tokens.
    stride: usize,
    /// Columns that exist.
    lanes: usize,
    accumulate: bool,
}

impl Place {
    /// # Safety
    /// The place has `lanes` floats; the instruction set is `L`.
    #[inline(always)]
    pub(super) unsafe fn write<L: Vector>(self, token: usize, sum: L::F) {
        // SAFETY: the function's contract.
        unsafe {
            let out = self.out.add(token * self.stride);
            if self.lanes == PANEL_ROWS {
                L::store_f(out, if self.accumulate { L::add(L::load_f(out), sum) } else { sum });
            } else {
                let mut buffer = [0.0; PANEL_ROWS];
                L::store_f(buffer.as_mut_ptr(), sum);
                for (lane, value) in buffer[..self.lanes].iter().enumerate() {
                    *out.add(lane) = if self.accumulate { *out.add(lane) + value } else { *value };
                }
            }
        }
    }
}

/// Sixteen columns of the result for a tile of `T` tokens.
///
/// # Safety
/// The source has the tile's blocks, the tile is `T` wide, the place has its tokens; the instruction set is `L`.
#[inline(always)]
unsafe fn tile<L: Vector, S: Source<L>, const T: usize>(source: &S, x: Tile<'_>, place: Place) {
    macro_rules! finish {
        ($sums:ident, $acc:ident, $block:ident, $part:literal, $sum:expr) => {
            let (scale, min) = source.scales($block, $part);
            for t in 0..T {
                let at = $block * T + t;
                let scale = L::mul(scale, L::splat(*x.scales.as_ptr().add(at)));
                let sum: f32 = $sum(at);
                $sums[t] = L::fma(L::to_f($acc[t]), scale, L::fma(min, L::splat(sum), $sums[t]));
            }
        };
    }
    // SAFETY: the function's contract.
    unsafe {
        let mut sums = [L::splat(0.0); T];
        let mut codes = x.codes.as_ptr();
        for block in 0..x.blocks {
            source.prefetch(block);
            if S::PARTS == 2 {
                let acc = L::sum::<S, T, 4>(source, block, 0, codes);
                finish!(sums, acc, block, 0, |at| x.halves.as_ptr().add(at).read()[0]);
                let acc = L::sum::<S, T, 4>(source, block, 4, codes.add(4 * T));
                finish!(sums, acc, block, 1, |at| x.halves.as_ptr().add(at).read()[1]);
            } else {
                let acc = L::sum::<S, T, 8>(source, block, 0, codes);
                finish!(sums, acc, block, 0, |at| *x.sums.as_ptr().add(at));
            }
            codes = codes.add(8 * T);
        }
        for (t, sum) in sums.into_iter().enumerate() {
            place.write::<L>(t, sum);
        }
    }
}

/// A tile of any width that [`Tokens8`] makes.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tile_of_width<L: Vector, S: Source<L>>(source: &S, x: Tile<'_>, place: Place) {
    // SAFETY: the function's contract.
    unsafe {
        match x.width {
            1 => tile::<L, S, 1>(source, x, place),
            2 => tile::<L, S, 2>(source, x, place),
            4 => tile::<L, S, 4>(source, x, place),
            8 if L::TILE >= 8 => tile::<L, S, 8>(source, x, place),
            12 if L::TILE >= 12 => tile::<L, S, 12>(source, x, place),
            width => unreachable!("a tile of {width} tokens"),
        }
    }
}

/// Where panel (or half block) `index` of a task writes, for the tokens from `first` on.
///
/// # Safety
/// The columns from `16 index` on and the token exist.
pub(super) unsafe fn place(task: &Task<'_, '_>, index: usize, first: usize) -> Place {
    let (start, stride) = (task.out.start(), task.out.stride());
    let lanes = PANEL_ROWS.min(task.out.cols() - PANEL_ROWS * index);
    // SAFETY: the function's contract.
    let out = unsafe { start.add(first * stride + PANEL_ROWS * index) };
    Place { out, stride, lanes, accumulate: task.accumulate }
}

/// # Safety
/// The task was checked; the format has `B` bits and `PARTS` scales in a block; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn few<L: Vector, const B: usize, const PARTS: usize>(task: &mut Task<'_, '_>) {
    // SAFETY: the function's contract.
    unsafe {
        if task.matrix.format().scale_type == ScaleType::U8 {
            few_of::<L, B, PARTS, 2>(task)
        } else {
            few_of::<L, B, PARTS, 1>(task)
        }
    }
}

/// # Safety
/// As [`few`]; the scales have so many levels.
#[inline(always)]
unsafe fn few_of<L: Vector, const B: usize, const PARTS: usize, const LEVELS: usize>(task: &mut Task<'_, '_>) {
    let layout = Scales::new(&task.matrix, if B == 8 { L::BIAS as f32 } else { 0.0 });
    for (index, panel) in task.range.clone().enumerate() {
        let source = Stored::<B, PARTS, LEVELS> {
            words: task.matrix.panel_words(panel).as_ptr().cast(),
            scales: task.matrix.panel_scales(panel).as_ptr().cast(),
            layout,
        };
        for (first, x) in task.x.tiles() {
            // SAFETY: the task was checked: the panel has the tokens' blocks, and the result their columns.
            unsafe { tile_of_width::<L, _>(&source, x, place(task, index, first)) }
        }
    }
}

/// The kept weights of a panel of a sparse format, unpacked.
struct Kept<'a, const B: usize> {
    masks: *const u64,
    /// The kept codes, and 64 bytes more.
    codes: &'a [u8],
    /// The next code.
    next: Cell<usize>,
    /// The next panel, and its cache lines for each block of this one.
    following: *const u8,
    lines: usize,
    fill: u8,
    scales: *const u8,
    layout: Scales,
}

impl<L: Vector, const B: usize> Source<L> for Kept<'_, B> {
    const PARTS: usize = 1;
    const BITS: usize = B;

    #[inline(always)]
    fn prefetch(&self, block: usize) {
        for line in 0..self.lines {
            L::prefetch(self.following.wrapping_add(64 * (self.lines * block + line)));
        }
    }

    /// Quads are asked for in order.
    #[inline(always)]
    unsafe fn quad(&self, block: usize, quad: usize) -> L::V {
        // SAFETY: the block exists, and its masks; a mask's codes, and 64 bytes, are readable.
        unsafe {
            let mask = self.masks.add(block * 8 + quad).read_unaligned();
            let v = L::expand(self.codes.as_ptr().add(self.next.get()), mask, self.fill);
            self.next.set(self.next.get() + mask.count_ones() as usize);
            if B == 8 { L::centre(v) } else { v }
        }
    }

    #[inline(always)]
    unsafe fn scales(&self, block: usize, _: usize) -> (L::F, L::F) {
        // SAFETY: the block exists.
        unsafe { self.layout.get::<L, 1>(self.scales, block, 0) }
    }
}

/// Kept codes before a block of a panel.
fn kept_before(matrix: &Panels<'_>, panel: usize, block: usize) -> usize {
    matrix.panel_words(panel)[..block * PANEL_ROWS].iter().map(|word| word.count_ones() as usize).sum()
}

/// Unpacks the kept codes `range` of a panel into `codes`, and 64 bytes more; returns how many bytes lie before the
/// first.
///
/// # Safety
/// The format has `B` bits and is sparse; the instruction set is `L`.
#[inline(always)]
unsafe fn unpack_kept<L: Vector, const B: usize>(
    matrix: &Panels<'_>,
    panel: usize,
    range: Range<usize>,
    codes: &mut Vec<u8>,
) -> usize {
    let packed = &matrix.panel_words(panel)[matrix.mask_words()..];
    let chunks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
    // A mask of all bits reads up to its codes and no further than the 64 bytes beyond.
    assert!(chunks.end * 16 * B <= packed.len(), "kept codes {range:?} of {}", matrix.layout());
    codes.resize(chunks.len() * BLOCK_BYTES + 2 * 64, 0);
    // Stores that cross cache lines would take twice as long.
    let aligned = codes.as_ptr().align_offset(64);
    for (i, chunk) in chunks.clone().enumerate() {
        // SAFETY: the chunk lies in the panel, and the buffer has a place for it.
        unsafe {
            let from: *const u8 = packed.as_ptr().add(chunk * 16 * B).cast();
            let to = codes.as_mut_ptr().add(aligned + i * BLOCK_BYTES);
            macro_rules! quads {
                ($($quad:literal)*) => { $( L::store(to.add(64 * $quad), unpack::<L, B>(from, $quad)); )* };
            }
            quads!(0 1 2 3 4 5 6 7);
        }
    }
    aligned + range.start - chunks.start * BLOCK_BYTES
}

/// As [`few`], for sparse formats.
///
/// # Safety
/// As [`few`]; the format is sparse.
#[inline(always)]
pub(super) unsafe fn few_kept<L: Vector, const B: usize>(task: &mut Task<'_, '_>) {
    let matrix = task.matrix;
    let layout = Scales::new(&matrix, if B == 8 { L::BIAS as f32 } else { 0.0 });
    let mut codes = Vec::new();
    for (index, panel) in task.range.clone().enumerate() {
        // SAFETY: the task was checked: the panel has the tokens' blocks, and the result their columns. All kept codes
        // are unpacked.
        unsafe {
            let end = kept_before(&matrix, panel, matrix.blocks());
            let start = unpack_kept::<L, B>(&matrix, panel, 0..end, &mut codes);
            let words = matrix.panel_words(panel);
            for (first, x) in task.x.tiles() {
                let source = Kept::<B> {
                    masks: words.as_ptr().cast(),
                    codes: &codes,
                    next: Cell::new(start),
                    following: words.as_ptr_range().end.cast(),
                    lines: words.len().div_ceil(16 * x.blocks),
                    fill: matrix.format().zero_point() as u8,
                    scales: matrix.panel_scales(panel).as_ptr().cast(),
                    layout,
                };
                tile_of_width::<L, _>(&source, x, place(task, index, first));
            }
        }
    }
}

/// Unpacks and expands some blocks of a panel of a sparse format into the buffer from `at` on, uncentred; with `scales`
/// also those of all blocks.
///
/// # Safety
/// The format has `B` bits and is sparse; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn expand_blocks<L: Vector, const B: usize>(
    matrix: &Panels<'_>,
    panel: usize,
    blocks: Range<usize>,
    centre: bool,
    out: &mut [u8],
    kept: &mut Vec<u8>,
) {
    assert!(blocks.end <= matrix.blocks() && out.len() >= blocks.len() * BLOCK_BYTES, "blocks {blocks:?}");
    let start = kept_before(matrix, panel, blocks.start);
    let masks = &matrix.panel_words(panel)[blocks.start * PANEL_ROWS..blocks.end * PANEL_ROWS];
    let count: usize = masks.iter().map(|word| word.count_ones() as usize).sum();
    // SAFETY: the codes of all masks are unpacked, and 64 bytes more; `out` has a place for the blocks.
    unsafe {
        let mut next = unpack_kept::<L, B>(matrix, panel, start..start + count, kept);
        let fill = matrix.format().zero_point() as u8;
        for (quad, mask) in masks.chunks_exact(2).enumerate() {
            let mask = u64::from(mask[0]) | u64::from(mask[1]) << 32;
            let v = L::expand(kept.as_ptr().add(next), mask, fill);
            L::store(out.as_mut_ptr().add(64 * quad), if centre && B == 8 { L::centre(v) } else { v });
            next += mask.count_ones() as usize;
        }
    }
}

/// # Safety
/// The format has `B` bits and `PARTS` scales in a block; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn unpack_panel<L: Vector, const B: usize, const PARTS: usize>(
    matrix: &Panels<'_>,
    panel: usize,
    buffer: &mut Buffer,
) {
    let bias = if B == 8 { L::BIAS as f32 } else { 0.0 };
    let words: *const u8 = matrix.panel_words(panel).as_ptr().cast();
    let (layout, start) = (Scales::new(matrix, bias), matrix.panel_scales(panel).as_ptr().cast());
    let blocks = matrix.blocks();
    buffer.resize(blocks, PARTS);
    let sparse = matrix.format().is_sparse();
    if sparse {
        // SAFETY: the function's contract.
        unsafe { expand_blocks::<L, B>(matrix, panel, 0..blocks, true, &mut buffer.codes, &mut buffer.kept) };
    }
    for block in 0..blocks {
        // SAFETY: the panel has `64 B` bytes of codes for every block, and scales; the buffers were resized.
        unsafe {
            let codes = buffer.codes.as_mut_ptr().add(block * BLOCK_BYTES);
            macro_rules! quads {
                ($($quad:literal)*) => { $(
                    let v = unpack::<L, B>(words.add(64 * B * block), $quad);
                    L::store(codes.add(64 * $quad), if B == 8 { L::centre(v) } else { v });
                )* };
            }
            if !sparse {
                quads!(0 1 2 3 4 5 6 7);
            }
            for part in 0..PARTS {
                let (scale, min) = layout.get::<L, PARTS>(start, block, part);
                let p = buffer.scales.as_mut_ptr().add((block * PARTS + part) * 2 * PANEL_ROWS);
                L::store_f(p, scale);
                L::store_f(p.add(PANEL_ROWS), min);
            }
        }
    }
}

/// The codes of a quad times `scale` plus `min`, rounded, as bytes.
///
/// # Safety
/// As [`unpack`]; the results are 0 to 255.
#[inline(always)]
unsafe fn rounded<L: Vector, const B: usize>(block: *const u8, quad: usize, scale: L::F, min: L::F) -> L::V {
    // SAFETY: the function's contract.
    unsafe {
        let v = unpack::<L, B>(block, quad);
        L::pack([
            L::round(L::fma(L::to_f(L::byte(v, 0)), scale, min)),
            L::round(L::fma(L::to_f(L::byte(v, 1)), scale, min)),
            L::round(L::fma(L::to_f(L::byte(v, 2)), scale, min)),
            L::round(L::fma(L::to_f(L::byte(v, 3)), scale, min)),
        ])
    }
}

/// # Safety
/// The format has `B` bits and `PARTS` scales in a block; the half block has columns; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn transpose_half<L: Vector, const B: usize, const PARTS: usize>(
    matrix: &Panels<'_>,
    half: usize,
    buffer: &mut Buffer,
) {
    let (block, half, panels) = (half / 2, half % 2, matrix.layout().panels());
    let sparse = matrix.format().is_sparse();
    assert!(block < matrix.blocks(), "half block {half} of {}", matrix.layout());
    let (top, layout) = (((1u32 << B) - 1) as f32, Scales::new(matrix, 0.0));
    buffer.resize(panels.div_ceil(PAIR), 1);
    if sparse {
        buffer.expanded.resize(panels * BLOCK_BYTES, 0);
        for (panel, out) in buffer.expanded.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            // SAFETY: the function's contract.
            unsafe { expand_blocks::<L, B>(matrix, panel, block..block + 1, false, out, &mut buffer.kept) };
        }
    }
    for pair in 0..panels.div_ceil(PAIR) {
        // SAFETY: the panels and the block exist; the buffers were resized.
        unsafe {
            macro_rules! group {
                ($panel:expr) => {{
                    let start = matrix.panel_scales($panel).as_ptr().cast();
                    layout.get::<L, PARTS>(start, block, if PARTS == 2 { half } else { 0 })
                }};
            }
            let members = PAIR * pair..(PAIR * pair + PAIR).min(panels);
            let mut extreme = L::splat(0.0);
            for panel in members.clone() {
                let (scale, min) = group!(panel);
                let other_end = L::fma(scale, L::splat(top), min);
                extreme = L::max(extreme, L::max(L::abs(min), L::abs(other_end)));
            }
            let scale = L::largest(extreme) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let codes = buffer.codes.as_mut_ptr().add(pair * BLOCK_BYTES);
            for (i, panel) in members.enumerate() {
                let (scale, min) = group!(panel);
                let scale = L::mul(scale, L::splat(inverse));
                let min = L::fma(min, L::splat(inverse), L::splat(128.0));
                let words: *const u8 = matrix.panel_words(panel).as_ptr().cast();
                macro_rules! rounded {
                    ($quad:literal) => {
                        if sparse {
                            rounded::<L, 8>(buffer.expanded.as_ptr().add(panel * BLOCK_BYTES), $quad, scale, min)
                        } else {
                            rounded::<L, B>(words.add(64 * B * block), $quad, scale, min)
                        }
                    };
                }
                let v = if half == 0 {
                    [rounded!(0), rounded!(1), rounded!(2), rounded!(3)]
                } else {
                    [rounded!(4), rounded!(5), rounded!(6), rounded!(7)]
                };
                for (a, v) in L::transpose(v).into_iter().enumerate() {
                    L::store(codes.add(64 * (4 * i + a)), L::centre(v));
                }
            }
            let p = buffer.scales.as_mut_ptr().add(pair * 2 * PANEL_ROWS);
            L::store_f(p, L::splat(scale));
            L::store_f(p.add(PANEL_ROWS), L::splat(scale * (L::BIAS as f32 - 128.0)));
        }
    }
}

/// # Safety
/// The task was checked; the buffer holds the blocks of its tokens; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn tiles<L: Vector, const PARTS: usize, const BITS: usize>(
    task: &mut Task<'_, '_>,
    index: usize,
    buffer: &Buffer,
) {
    let blocks = task.x.blocks();
    assert!(buffer.codes.len() >= blocks * BLOCK_BYTES && buffer.scales.len() >= blocks * PARTS * 2 * PANEL_ROWS);
    let source = Unpacked::<PARTS, BITS> { codes: &buffer.codes, scales: &buffer.scales };
    for (first, x) in task.x.tiles() {
        // SAFETY: the buffer has the tokens' blocks, and the result their columns.
        unsafe { tile_of_width::<L, _>(&source, x, place(task, index, first)) }
    }
}
