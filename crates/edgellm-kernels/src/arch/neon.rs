//! Row kernels for ARM's Advanced SIMD: eight lanes in two vectors.
//!
//! Eight codes of `B` bits are `B` bytes: a table lookup brings the two bytes that can hold a lane's code to its
//! lane, a shift by lane (to the left by a negative count) and a mask leave the code. Half-precision floats are converted with
//! integer operations, because the conversion instruction is not available to stable Rust on every core: exponent and
//! mantissa are moved into place and scaled by 2^112, which is exact for subnormals too; infinities and NaN get the
//! largest exponent.

use core::arch::aarch64::*;

use super::rows::{self, Job, Lanes, Tokens};

/// Proof that the processor has Advanced SIMD.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(super) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    pub(super) fn decode(self, job: Job, out: &mut [f32]) {
        #[target_feature(enable = "neon")]
        fn run(job: Job, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::decode::<Neon>(job, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, out) }
    }

    pub(super) fn dot(self, job: Job, x: &Tokens, out: &mut [f32]) {
        #[target_feature(enable = "neon")]
        fn run(job: Job, x: &Tokens, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::dot::<Neon>(job, x, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, x, out) }
    }
}

/// Per width: which bytes a lane needs, and by how much they are shifted (to the left).
struct Table<const B: usize>;

impl<const B: usize> Table<B> {
    const LOOKUP: [u8; 32] = {
        let mut table = [0xff; 32];
        let mut lane = 0;
        while lane < 8 {
            let byte = lane * B / 8;
            table[4 * lane] = byte as u8;
            if byte + 1 < 8 {
                table[4 * lane + 1] = byte as u8 + 1;
            }
            lane += 1;
        }
        table
    };
    const SHIFT: [i32; 8] = {
        let mut table = [0; 8];
        let mut lane = 0;
        while lane < 8 {
            table[lane] = -((lane * B % 8) as i32);
            lane += 1;
        }
        table
    };
}

/// Four half-precision floats, one in the low bits of each lane.
///
/// # Safety
/// Advanced SIMD.
#[inline(always)]
unsafe fn widen(bits: uint32x4_t) -> float32x4_t {
    // SAFETY: the function's contract.
    unsafe {
        let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff));
        let scale = vdupq_n_f32(f32::from_bits((127 + 112) << 23));
        let value = vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<13>(magnitude)), scale);
        let largest = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00));
        let exponent = vandq_u32(largest, vdupq_n_u32(0x7f80_0000));
        let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(value), exponent), sign))
    }
}

// SAFETY: every function uses only Advanced SIMD, and reads or writes the bytes that the trait names.
unsafe impl Lanes for Neon {
    type F = [float32x4_t; 2];
    const N: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [vdupq_n_f32(value); 2] }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4))] }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, value: Self::F) {
        // SAFETY: the trait's contract.
        unsafe {
            vst1q_f32(p, value[0]);
            vst1q_f32(p.add(4), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn sum(value: Self::F) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { vaddvq_f32(vaddq_f32(value[0], value[1])) }
    }

    #[inline(always)]
    unsafe fn codes<const B: usize>(p: *const u8) -> Self::F {
        // SAFETY: eight readable bytes and the trait's contract; the tables hold two vectors.
        unsafe {
            let bytes = vcombine_u8(vld1_u8(p), vdup_n_u8(0));
            let mask = vdupq_n_u32((1 << B) - 1);
            let (lookup, shift) = (Table::<B>::LOOKUP.as_ptr(), Table::<B>::SHIFT.as_ptr());
            let low = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(lookup)));
            let high = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(lookup.add(16))));
            let low = vandq_u32(vshlq_u32(low, vld1q_s32(shift)), mask);
            let high = vandq_u32(vshlq_u32(high, vld1q_s32(shift.add(4))), mask);
            [vcvtq_f32_u32(low), vcvtq_f32_u32(high)]
        }
    }

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> Self::F {
        // SAFETY: sixteen readable bytes and the trait's contract.
        unsafe {
            let bits = vreinterpretq_u16_u8(vld1q_u8(p));
            [widen(vmovl_u16(vget_low_u16(bits))), widen(vmovl_u16(vget_high_u16(bits)))]
        }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> Self::F {
        // SAFETY: sixteen readable bytes and the trait's contract.
        unsafe {
            let bits = vreinterpretq_u16_u8(vld1q_u8(p));
            let low = vshll_n_u16::<16>(vget_low_u16(bits));
            let high = vshll_n_u16::<16>(vget_high_u16(bits));
            [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
        }
    }
}
