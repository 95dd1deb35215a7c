//! Portable row kernels: eight lanes as an array.

use super::rows::{self, Job, Lanes, Tokens};
use crate::format::decode_f16;

/// Available everywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

impl Scalar {
    pub(super) fn decode(self, job: Job, out: &mut [f32]) {
        // SAFETY: needs no instruction set.
        unsafe { rows::decode::<Scalar>(job, out) }
    }

    pub(super) fn dot(self, job: Job, x: &Tokens, out: &mut [f32]) {
        // SAFETY: needs no instruction set.
        unsafe { rows::dot::<Scalar>(job, x, out) }
    }
}

// SAFETY: no intrinsics; pointers are read for the bytes that the trait names.
unsafe impl Lanes for Scalar {
    type F = [f32; 8];
    const N: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 8] {
        // SAFETY: eight readable floats, by contract.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, value: [f32; 8]) {
        // SAFETY: eight writable floats, by contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(value) }
    }

    /// Rounds twice: fused multiply-add without the instruction is a slow library call. Codes times scales are exact
    /// in `f32` for all formats but those with arbitrary `f32` scales, so decoded weights do not differ.
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        core::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    unsafe fn codes<const B: usize>(p: *const u8) -> [f32; 8] {
        // SAFETY: eight readable bytes, by contract.
        let bits = u64::from_le_bytes(unsafe { p.cast::<[u8; 8]>().read_unaligned() });
        core::array::from_fn(|i| ((bits >> (i * B)) & ((1 << B) - 1)) as f32)
    }

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> [f32; 8] {
        // SAFETY: sixteen readable bytes, by contract.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(decode_f16)
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> [f32; 8] {
        // SAFETY: sixteen readable bytes, by contract.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
}
