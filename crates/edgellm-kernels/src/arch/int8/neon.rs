//! ARM's Advanced SIMD: a vector is four registers.
//!
//! Codes are signed bytes here: those of all 8 bits are centred by 128. Dot products are one instruction (`sdot`) where
//! the processor has it; otherwise products of 16 bits, whose sums of pairs fit 16 bits.
//!
//! With 8-bit matrix products (`smmla`) a register holds eight columns of two rows or tokens, and an instruction adds
//! the four products of two rows with two tokens: twice as many as `sdot`. Panels that were unpacked for many tokens
//! are brought into that order, with scales likewise, and tokens are as they are read; the sums of a tile stay in that
//! order to its end.

use core::arch::aarch64::*;
use core::arch::asm;

use super::kernels::{self, Buffer, Source, Task, entries};
use super::tokens::Tile;
use super::{BLOCK_BYTES, PLACES, Vector};
use crate::arch::neon::Neon;
use crate::format::PANEL_ROWS;
use crate::panels::Panels;

/// Proof that the processor has Advanced SIMD and its dot products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NeonDot(Neon);

impl NeonDot {
    pub(in crate::arch) fn new() -> Option<Self> {
        let rows = Neon::new()?;
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(NeonDot(rows))
    }

    /// The row kernels.
    pub(in crate::arch) fn rows(self) -> Neon {
        self.0
    }
}

/// Proof that the processor has Advanced SIMD, its dot products, and its matrix products of bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NeonI8mm(NeonDot);

impl NeonI8mm {
    pub(in crate::arch) fn new() -> Option<Self> {
        let dot = NeonDot::new()?;
        std::arch::is_aarch64_feature_detected!("i8mm").then_some(NeonI8mm(dot))
    }

    /// The row kernels.
    pub(in crate::arch) fn rows(self) -> Neon {
        self.0.rows()
    }
}

/// The same of each of four registers.
macro_rules! each {
    ($i:ident, $of:expr) => {
        [
            {
                let $i = 0;
                $of
            },
            {
                let $i = 1;
                $of
            },
            {
                let $i = 2;
                $of
            },
            {
                let $i = 3;
                $of
            },
        ]
    };
}

entries!(Neon, "neon");
entries!(NeonDot, "neon,dotprod");
entries!(NeonI8mm, "neon,dotprod,i8mm", pairs);

/// The dot products of [`Vector::dot`] with multiplications to 16 bits: pairs are at most `2 * 128 * 127`.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn multiply(acc: int32x4_t, v: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function's contract.
    unsafe {
        let low = vmull_s8(vget_low_s8(v), vget_low_s8(x));
        let high = vmull_high_s8(v, x);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
}

/// The dot products of [`Vector::dot`] in one instruction.
///
/// # Safety
/// The processor has dot products; the caller is compiled for them.
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, v: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function's contract; the instruction touches no memory and no flags.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {v:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc, v = in(vreg) v, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// Adds `[a0 b0, a0 b1, a1 b0, a1 b1]` for the vectors of eight bytes `a = [a0, a1]`, `b = [b0, b1]`.
///
/// # Safety
/// The processor has matrix products of bytes; the caller is compiled for them.
#[inline(always)]
unsafe fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the function's contract; the instruction touches no memory and no flags.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// As [`sdot`], with four of `x`'s bytes.
///
/// # Safety
/// As [`sdot`]; `lane` is below 4.
#[inline(always)]
unsafe fn sdot_lane(acc: int32x4_t, v: int8x16_t, x: int8x16_t, lane: usize) -> int32x4_t {
    #[inline(always)]
    unsafe fn one<const LANE: usize>(mut acc: int32x4_t, v: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the function's contract; the instruction touches no memory and no flags.
        unsafe {
            asm!(
                "sdot {acc:v}.4s, {v:v}.16b, {x:v}.4b[{lane}]",
                acc = inout(vreg) acc, v = in(vreg) v, x = in(vreg) x, lane = const LANE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        acc
    }
    // SAFETY: passed on.
    unsafe {
        match lane {
            0 => one::<0>(acc, v, x),
            1 => one::<1>(acc, v, x),
            2 => one::<2>(acc, v, x),
            _ => one::<3>(acc, v, x),
        }
    }
}

/// Adds the products of the high halves in 16 bits. The compiler does not use the instruction where both halves of `x`
/// are the same.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn smlal2(mut acc: int16x8_t, v: int8x16_t, x: int8x16_t) -> int16x8_t {
    // SAFETY: the function's contract; the instruction touches no memory and no flags.
    unsafe {
        asm!(
            "smlal2 {acc:v}.8h, {v:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc, v = in(vreg) v, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// Makes the compiler compute these sums before it loads what follows. Otherwise it starts on many quads at once and
/// runs out of registers.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn in_order<const T: usize>(sums: &mut [[[int16x8_t; 2]; 4]; T]) {
    for [low, high] in sums.as_flattened_mut() {
        // SAFETY: no instructions.
        unsafe { asm!("/* {0:v} {1:v} */", inout(vreg) * low, inout(vreg) * high, options(nostack, preserves_flags)) }
    }
}

/// [`Vector::sum`] with products of 16 bits, which are added there as long as they fit.
///
/// # Safety
/// That of [`Vector::sum`].
#[inline(always)]
unsafe fn sum_products<L: Lanes, S: Source<L>, const T: usize, const N: usize>(
    source: &S,
    block: usize,
    first: usize,
    x: *const u32,
) -> [L::I; T] {
    macro_rules! step {
        ($acc:ident, [$($quad:literal)*]) => {
            let mut products = [[[vdupq_n_s16(0); 2]; 4]; T];
            $(
                let v = source.quad(block, first + $quad);
                for t in 0..T {
                    let x = vreinterpretq_s8_u32(vdupq_n_u32(x.add($quad * T + t).read_unaligned()));
                    products[t] = each!(i, {
                        let ([low, high], v) = (products[t][i], vreinterpretq_s8_u8(v[i]));
                        [vmlal_s8(low, vget_low_s8(v), vget_low_s8(x)), smlal2(high, v, x)]
                    });
                }
                in_order(&mut products);
            )*
            for t in 0..T {
                $acc[t] = each!(i, {
                    let ([low, high], [a, b]) = (products[t][i], $acc[t][i]);
                    [vpadalq_s16(a, low), vpadalq_s16(b, high)]
                });
            }
        };
    }
    // SAFETY: the function's contract. In 16 bits, 8 products with codes of 5 bits are at most 8 * 31 * 127, 4 of 6
    // bits 4 * 63 * 127, 2 of 8 bits 2 * 128 * 127.
    unsafe {
        let mut acc = [[[vdupq_n_s32(0); 2]; 4]; T];
        match (S::BITS, N) {
            (..=5, 8) => {
                step!(acc, [0 1 2 3 4 5 6 7]);
            }
            (..=6, _) => {
                step!(acc, [0 1 2 3]);
                if N == 8 {
                    step!(acc, [4 5 6 7]);
                }
            }
            _ => {
                step!(acc, [0 1]);
                step!(acc, [2 3]);
                if N == 8 {
                    step!(acc, [4 5]);
                    step!(acc, [6 7]);
                }
            }
        }
        acc.map(|acc| each!(i, vpaddq_s32(acc[i][0], acc[i][1])))
    }
}

/// [`Vector::sum`] with dot products, whose tokens' bytes are lanes of registers.
///
/// # Safety
/// That of [`Vector::sum`].
#[inline(always)]
unsafe fn sum_dots<L: Lanes, S: Source<L>, const T: usize, const N: usize>(
    source: &S,
    block: usize,
    first: usize,
    x: *const u32,
) -> [L::I; T] {
    macro_rules! step {
        ($acc:ident, $quad:literal, [$($t:literal)*]) => {
            let v = source.quad(block, first + $quad);
            $(
                if $t < T {
                    let at = $quad * T + $t;
                    let x = vreinterpretq_s8_u32(vld1q_u32(x.add(at / 4 * 4)));
                    $acc[$t] = each!(i, sdot_lane($acc[$t][i], vreinterpretq_s8_u8(v[i]), x, at % 4));
                }
            )*
        };
        ($acc:ident, [$($quad:literal)*]) => { $( step!($acc, $quad, [0 1 2 3]); )* };
    }
    // SAFETY: the function's contract.
    unsafe {
        let mut acc = [[vdupq_n_s32(0); 4]; T];
        assert!(T <= 4, "a tile of {T} tokens");
        step!(acc, [0 1 2 3]);
        if N == 8 {
            step!(acc, [4 5 6 7]);
        }
        acc
    }
}

/// The instruction sets of this module.
trait Lanes: Vector<V = [uint8x16_t; 4], I = [int32x4_t; 4], F = [float32x4_t; 4]> {}
impl<L: Vector<V = [uint8x16_t; 4], I = [int32x4_t; 4], F = [float32x4_t; 4]>> Lanes for L {}

/// Implements [`Vector`] with the width of a tile, and functions for a dot product and for several.
macro_rules! vector {
    ($isa:ty, $tile:literal, $dot:ident, $sum:ident) => {
        // SAFETY: every function uses only the proven instruction sets, and reads or writes the bytes that the trait
        // names.
        unsafe impl Vector for $isa {
            type V = [uint8x16_t; 4];
            type I = [int32x4_t; 4];
            type F = [float32x4_t; 4];
            const TILE: usize = $tile;
            const BIAS: u32 = 128;

            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self::V {
                // SAFETY: the trait's contract.
                unsafe { [vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48))] }
            }

            #[inline(always)]
            unsafe fn store(p: *mut u8, v: Self::V) {
                // SAFETY: the trait's contract.
                unsafe {
                    vst1q_u8(p, v[0]);
                    vst1q_u8(p.add(16), v[1]);
                    vst1q_u8(p.add(32), v[2]);
                    vst1q_u8(p.add(48), v[3]);
                }
            }

            #[inline(always)]
            unsafe fn bits(v: Self::V, right: u32, left: u32, mask: u8) -> Self::V {
                // SAFETY: the trait's contract.
                unsafe {
                    let (right, left) = (vdupq_n_s8(-(right as i8)), vdupq_n_s8(left as i8));
                    let mask = vdupq_n_u8(mask);
                    each!(i, vandq_u8(vshlq_u8(vshlq_u8(v[i], right), left), mask))
                }
            }

            #[inline(always)]
            unsafe fn or(a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vorrq_u8(a[i], b[i])) }
            }

            #[inline(always)]
            unsafe fn centre(v: Self::V) -> Self::V {
                // SAFETY: the trait's contract.
                unsafe { each!(i, veorq_u8(v[i], vdupq_n_u8(0x80))) }
            }

            #[inline(always)]
            unsafe fn dot(acc: Self::I, v: Self::V, x: *const u32, _wide: bool) -> Self::I {
                // SAFETY: the trait's contract.
                unsafe {
                    let x = vreinterpretq_s8_u32(vdupq_n_u32(x.read_unaligned()));
                    each!(i, $dot(acc[i], vreinterpretq_s8_u8(v[i]), x))
                }
            }

            #[inline(always)]
            unsafe fn sum<S: Source<Self>, const T: usize, const N: usize>(
                source: &S,
                block: usize,
                first: usize,
                x: *const u32,
            ) -> [Self::I; T] {
                // SAFETY: passed on.
                unsafe { $sum::<Self, S, T, N>(source, block, first, x) }
            }

            #[inline(always)]
            unsafe fn expand(p: *const u8, mask: u64, fill: u8) -> Self::V {
                // SAFETY: the trait's contract: before the last 16 places, at most 48 bytes are used.
                unsafe {
                    let (mut at, mut places) = (0, [0; 4]);
                    let masks: [[u8; 2]; 4] = [0, 1, 2, 3].map(|i| ((mask >> (16 * i)) as u16).to_le_bytes());
                    for (place, mask) in places.iter_mut().zip(masks) {
                        *place = at;
                        at += u16::from_le_bytes(mask).count_ones() as usize;
                    }
                    each!(i, {
                        let [low, high] = masks[i];
                        let first = vld1_u8(PLACES[usize::from(low)].as_ptr());
                        let second = vld1_u8(PLACES[usize::from(high)].as_ptr());
                        let second = vadd_u8(second, vdup_n_u8(low.count_ones() as u8));
                        vqtbx1q_u8(vdupq_n_u8(fill), vld1q_u8(p.add(places[i])), vcombine_u8(first, second))
                    })
                }
            }

            #[inline(always)]
            unsafe fn zero() -> Self::I {
                // SAFETY: the trait's contract.
                unsafe { [vdupq_n_s32(0); 4] }
            }

            #[inline(always)]
            unsafe fn to_f(v: Self::I) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vcvtq_f32_s32(v[i])) }
            }

            #[inline(always)]
            unsafe fn round(v: Self::F) -> Self::I {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vcvtnq_s32_f32(v[i])) }
            }

            #[inline(always)]
            unsafe fn byte(v: Self::V, i: u32) -> Self::I {
                // SAFETY: the trait's contract.
                unsafe {
                    let shift = vdupq_n_s32(-8 * i as i32);
                    let low = vdupq_n_u32(0xff);
                    each!(j, { vreinterpretq_s32_u32(vandq_u32(vshlq_u32(vreinterpretq_u32_u8(v[j]), shift), low)) })
                }
            }

            #[inline(always)]
            unsafe fn pack(v: [Self::I; 4]) -> Self::V {
                // SAFETY: the trait's contract.
                unsafe {
                    each!(i, {
                        let lanes = vsliq_n_s32::<8>(v[0][i], v[1][i]);
                        let lanes = vsliq_n_s32::<16>(lanes, v[2][i]);
                        vreinterpretq_u8_s32(vsliq_n_s32::<24>(lanes, v[3][i]))
                    })
                }
            }

            #[inline(always)]
            unsafe fn transpose(v: [Self::V; 4]) -> [Self::V; 4] {
                const ORDER: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
                // SAFETY: the trait's contract; the table has 16 bytes.
                unsafe {
                    // 4 x 4 quarters, then 4 x 4 bytes in each quarter.
                    let order = vld1q_u8(ORDER.as_ptr());
                    each!(a, each!(i, vqtbl1q_u8(v[i][a], order)))
                }
            }

            #[inline(always)]
            unsafe fn load_f(p: *const f32) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vld1q_f32(p.add(4 * i))) }
            }

            #[inline(always)]
            unsafe fn store_f(p: *mut f32, v: Self::F) {
                // SAFETY: the trait's contract.
                unsafe {
                    vst1q_f32(p, v[0]);
                    vst1q_f32(p.add(4), v[1]);
                    vst1q_f32(p.add(8), v[2]);
                    vst1q_f32(p.add(12), v[3]);
                }
            }

            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe {
                    let bytes = vld1q_s8(p);
                    let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
                    [
                        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                        vcvtq_f32_s32(vmovl_high_s16(low)),
                        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                        vcvtq_f32_s32(vmovl_high_s16(high)),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn load_u8(p: *const u8) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe {
                    let bytes = vld1q_u8(p);
                    let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
                    [
                        vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                        vcvtq_f32_u32(vmovl_high_u16(low)),
                        vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                        vcvtq_f32_u32(vmovl_high_u16(high)),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn total(v: Self::I) -> i32 {
                // SAFETY: the trait's contract.
                unsafe { vaddvq_s32(vaddq_s32(vaddq_s32(v[0], v[1]), vaddq_s32(v[2], v[3]))) }
            }

            #[inline(always)]
            unsafe fn store_i8(p: *mut u8, v: Self::I) {
                // SAFETY: the trait's contract.
                unsafe {
                    let low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
                    let high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
                    vst1q_s8(p.cast(), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
                }
            }

            #[inline(always)]
            unsafe fn load_f16(p: *const u8) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe {
                    let (low, high) = (widen(vld1q_u8(p)), widen(vld1q_u8(p.add(16))));
                    [low[0], low[1], high[0], high[1]]
                }
            }

            #[inline(always)]
            unsafe fn splat(value: f32) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { [vdupq_n_f32(value); 4] }
            }

            #[inline(always)]
            unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vaddq_f32(a[i], b[i])) }
            }

            #[inline(always)]
            unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vmulq_f32(a[i], b[i])) }
            }

            #[inline(always)]
            unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vmaxq_f32(a[i], b[i])) }
            }

            #[inline(always)]
            unsafe fn abs(v: Self::F) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vabsq_f32(v[i])) }
            }

            #[inline(always)]
            unsafe fn largest(v: Self::F) -> f32 {
                // SAFETY: the trait's contract.
                unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3]))) }
            }

            #[inline(always)]
            unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
                // SAFETY: the trait's contract.
                unsafe { each!(i, vfmaq_f32(c[i], a[i], b[i])) }
            }
        }
    };
}

/// Eight half-precision floats as single-precision ones. Stable Rust has no function for the instructions, which every
/// processor with Advanced SIMD has.
///
/// # Safety
/// The processor has Advanced SIMD.
#[inline(always)]
unsafe fn widen(halves: uint8x16_t) -> [float32x4_t; 2] {
    let (low, high);
    // SAFETY: the function's contract; the instructions touch no memory and no flags.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            halves = in(vreg) halves, low = out(vreg) low, high = lateout(vreg) high,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    [low, high]
}

vector!(Neon, 1, multiply, sum_products);
vector!(NeonDot, 2, sdot, sum_dots);
vector!(NeonI8mm, 4, sdot, sum_dots);

/// Rows of half a panel, and pairs of them.
const HALF_ROWS: usize = PANEL_ROWS / 2;
const HALF_PAIRS: usize = HALF_ROWS / 2;

/// The kernels for many tokens with matrix products.
mod pairs {
    use super::*;

    /// # Safety
    /// As [`kernels::unpack_panel`].
    #[inline(always)]
    pub(super) unsafe fn unpack_panel<L: Vector, const B: usize, const PARTS: usize>(
        matrix: &Panels<'_>,
        panel: usize,
        buffer: &mut Buffer,
    ) {
        // SAFETY: passed on.
        unsafe { kernels::unpack_panel::<L, B, PARTS>(matrix, panel, buffer) }
        pair(buffer);
    }

    /// # Safety
    /// As [`kernels::transpose_half`].
    #[inline(always)]
    pub(super) unsafe fn transpose_half<L: Vector, const B: usize, const PARTS: usize>(
        matrix: &Panels<'_>,
        half: usize,
        buffer: &mut Buffer,
    ) {
        // SAFETY: passed on.
        unsafe { kernels::transpose_half::<L, B, PARTS>(matrix, half, buffer) }
        pair(buffer);
    }

    /// # Safety
    /// The task was checked; the buffer holds the blocks of its tokens, in pairs; the processor has matrix products.
    #[inline(always)]
    pub(super) unsafe fn tiles<L: Lanes, const PARTS: usize, const BITS: usize>(
        task: &mut Task<'_, '_>,
        index: usize,
        buffer: &Buffer,
    ) {
        let blocks = task.x.blocks();
        assert!(buffer.codes.len() >= blocks * BLOCK_BYTES, "codes of {blocks} blocks");
        assert!(buffer.scales.len() >= blocks * PARTS * 4 * PANEL_ROWS, "scales of {blocks} blocks");
        for (first, x) in task.x.tiles() {
            // SAFETY: the buffer has the tokens' blocks, in pairs, and the result their columns.
            unsafe {
                let place = kernels::place(task, index, first);
                match x.width {
                    1 => tile::<L, 1, 1, PARTS>(buffer, x, place),
                    2 => tile::<L, 2, 1, PARTS>(buffer, x, place),
                    4 => tile::<L, 4, 2, PARTS>(buffer, x, place),
                    width => unreachable!("a tile of {width} tokens"),
                }
            }
        }
    }
}

/// Brings an unpacked panel into the order of matrix products: of two quads, the eight columns of two rows after the
/// other; of scales and minima, those of two rows, each twice.
fn pair(buffer: &mut Buffer) {
    for quads in buffer.codes.as_chunks_mut::<128>().0 {
        // SAFETY: 128 bytes are two quads of four registers.
        unsafe {
            let p = quads.as_mut_ptr().cast::<u32>();
            let first = each!(i, vld1q_u32(p.add(4 * i)));
            let second = each!(i, vld1q_u32(p.add(16 + 4 * i)));
            for (i, (first, second)) in first.into_iter().zip(second).enumerate() {
                vst1q_u32(p.add(8 * i), vzip1q_u32(first, second));
                vst1q_u32(p.add(8 * i + 4), vzip2q_u32(first, second));
            }
        }
    }
    let n = buffer.scales.len() / 4;
    buffer.scales.resize(8 * n, 0.0);
    let p = buffer.scales.as_mut_ptr();
    for i in (0..n).rev() {
        // SAFETY: there are `2 n` times four floats; number `i` is read before `2 i` and `2 i + 1` are written, and
        // later turns read only what lies before.
        unsafe {
            let scales = vld1q_f32(p.add(4 * i));
            vst1q_f32(p.add(8 * i), vzip1q_f32(scales, scales));
            vst1q_f32(p.add(8 * i + 4), vzip2q_f32(scales, scales));
        }
    }
}

/// Sixteen columns of the result for a tile of `T` tokens, in `P` pairs.
///
/// # Safety
/// The buffer has the tile's blocks, in pairs, the tile is `T` wide, the place has its tokens; the processor has the
/// matrix products, and the caller is compiled for them.
#[inline(always)]
unsafe fn tile<L: Lanes, const T: usize, const P: usize, const PARTS: usize>(
    buffer: &Buffer,
    x: Tile<'_>,
    place: kernels::Place,
) {
    let mut out = [[0.0f32; PANEL_ROWS]; T];
    for half in 0..2 {
        // SAFETY: the function's contract.
        unsafe {
            let mut sums = [[vdupq_n_f32(0.0); P]; HALF_PAIRS];
            for block in 0..x.blocks {
                for part in 0..PARTS {
                    let mut acc = [[vdupq_n_s32(0); P]; HALF_PAIRS];
                    for oct in part * 4 / PARTS..(part + 1) * 4 / PARTS {
                        let x = octs::<T, P>(x.codes.as_ptr().add((block * 8 + 2 * oct) * T));
                        let p = buffer.codes.as_ptr().add(block * BLOCK_BYTES + 128 * oct + 64 * half);
                        for (rows, acc) in acc.iter_mut().enumerate() {
                            let v = vreinterpretq_s8_u8(vld1q_u8(p.add(16 * rows)));
                            for (acc, &x) in acc.iter_mut().zip(&x) {
                                *acc = smmla(*acc, v, x);
                            }
                        }
                    }
                    let at = block * T;
                    let (scales, minima) = factors::<T, P, PARTS>(&x, at, part);
                    let p = buffer.scales.as_ptr().add((block * PARTS + part) * 4 * PANEL_ROWS + 2 * HALF_ROWS * half);
                    for (rows, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                        let scale = vld1q_f32(p.add(4 * rows));
                        let min = vld1q_f32(p.add(2 * PANEL_ROWS + 4 * rows));
                        for i in 0..P {
                            let sum = vfmaq_f32(sums[i], min, minima[i]);
                            sums[i] = vfmaq_f32(sum, vcvtq_f32_s32(acc[i]), vmulq_f32(scale, scales[i]));
                        }
                    }
                }
            }
            for i in 0..P {
                for rows in 0..HALF_PAIRS / 2 {
                    let (a, b) = (sums[2 * rows][i], sums[2 * rows + 1][i]);
                    let at = HALF_ROWS * half + 4 * rows;
                    vst1q_f32(out[2 * i][at..].as_mut_ptr(), vuzp1q_f32(a, b));
                    if 2 * i + 1 < T {
                        vst1q_f32(out[2 * i + 1][at..].as_mut_ptr(), vuzp2q_f32(a, b));
                    }
                }
            }
        }
    }
    for (token, out) in out.iter().enumerate() {
        // SAFETY: the function's contract.
        unsafe { place.write::<L>(token, L::load_f(out.as_ptr())) }
    }
}

/// Eight columns of pairs of tokens, from two quads of `T` tokens. A single token's pair is twice the token.
///
/// # Safety
/// There are `2 T` quads; the processor has Advanced SIMD.
#[inline(always)]
unsafe fn octs<const T: usize, const P: usize>(p: *const u32) -> [int8x16_t; P] {
    // SAFETY: the function's contract.
    unsafe {
        let mut pairs = [vdupq_n_s8(0); P];
        if T == 1 {
            pairs[0] = vreinterpretq_s8_u64(vdupq_n_u64(p.cast::<u64>().read_unaligned()));
        } else if T == 2 {
            let quads = vld1q_u32(p);
            pairs[0] = vreinterpretq_s8_u32(vzip1q_u32(quads, vextq_u32::<2>(quads, quads)));
        } else {
            for i in 0..P / 2 {
                let (first, second) = (vld1q_u32(p.add(4 * i)), vld1q_u32(p.add(T + 4 * i)));
                pairs[2 * i] = vreinterpretq_s8_u32(vzip1q_u32(first, second));
                pairs[2 * i + 1] = vreinterpretq_s8_u32(vzip2q_u32(first, second));
            }
        }
        pairs
    }
}

/// Scales, and sums of codes, of pairs of tokens: each pair twice.
///
/// # Safety
/// The tile has `T` tokens' scales at `at`; the processor has Advanced SIMD.
#[inline(always)]
unsafe fn factors<const T: usize, const P: usize, const PARTS: usize>(
    x: &Tile<'_>,
    at: usize,
    part: usize,
) -> ([float32x4_t; P], [float32x4_t; P]) {
    // SAFETY: the function's contract.
    unsafe {
        let pairs = |p: *const f32| {
            core::array::from_fn(|i| match T {
                1 => vdupq_n_f32(*p),
                _ => vreinterpretq_f32_u64(vdupq_n_u64(p.add(2 * i).cast::<u64>().read_unaligned())),
            })
        };
        let minima = match (PARTS, T) {
            (1, _) => pairs(x.sums.as_ptr().add(at)),
            (_, 1) => pairs(x.halves.as_ptr().add(at).cast::<f32>().add(part)),
            _ => core::array::from_fn(|i| {
                let halves = vld1q_f32(x.halves.as_ptr().add(at + 2 * i).cast());
                if part == 0 { vuzp1q_f32(halves, halves) } else { vuzp2q_f32(halves, halves) }
            }),
        };
        (pairs(x.scales.as_ptr().add(at)), minima)
    }
}
