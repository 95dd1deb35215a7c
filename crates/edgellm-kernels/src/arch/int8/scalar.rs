//! Portable code: the reference of the integer kernels.

use core::array::from_fn;

use super::Vector;
use super::kernels::{self, Task};
use crate::arch::scalar::Scalar;
use crate::format::decode_f16;
use crate::panels::Panels;

impl kernels::Entry for Scalar {
    fn few<const B: usize, const PARTS: usize>(self, task: &mut Task<'_, '_>) {
        // SAFETY: needs no instruction set; the caller checked the task.
        unsafe { kernels::few::<Scalar, B, PARTS>(task) }
    }

    fn few_kept<const B: usize>(self, task: &mut Task<'_, '_>) {
        // SAFETY: needs no instruction set; the caller checked the task.
        unsafe { kernels::few_kept::<Scalar, B>(task) }
    }

    fn round_tile(self, tile: &mut super::TileMut<'_>, x: &[f32], cols: usize) {
        // SAFETY: needs no instruction set.
        unsafe { super::tokens::round::<Scalar>(tile, x, cols) }
    }

    fn low_rank(self, job: &mut super::LowRank<'_>) {
        // SAFETY: plain code; the caller checked the job.
        unsafe { super::low_rank::low_rank::<Self>(job) }
    }

    fn attend(self, job: &mut super::Attend<'_>) {
        // SAFETY: needs no instruction set; the caller checked the job.
        unsafe { super::attend::attend::<Scalar>(job) }
    }

    fn unpack<const B: usize, const PARTS: usize>(self, m: &Panels<'_>, panel: usize, buffer: &mut kernels::Buffer) {
        // SAFETY: needs no instruction set.
        unsafe { kernels::unpack_panel::<Scalar, B, PARTS>(m, panel, buffer) }
    }

    fn half_block<const B: usize, const PARTS: usize>(self, m: &Panels<'_>, half: usize, buffer: &mut kernels::Buffer) {
        // SAFETY: needs no instruction set.
        unsafe { kernels::transpose_half::<Scalar, B, PARTS>(m, half, buffer) }
    }

    fn tiles<const PARTS: usize, const BITS: usize>(
        self,
        task: &mut Task<'_, '_>,
        index: usize,
        buffer: &kernels::Buffer,
    ) {
        // SAFETY: needs no instruction set; the caller checked the task.
        unsafe { kernels::tiles::<Scalar, PARTS, BITS>(task, index, buffer) }
    }
}

// SAFETY: no intrinsics; pointers are read and written for the bytes that the trait names.
unsafe impl Vector for Scalar {
    type V = [[u8; 4]; 16];
    type I = [i32; 16];
    type F = [f32; 16];
    const TILE: usize = 4;
    const BIAS: u32 = 0;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[[u8; 4]; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(p: *mut u8, v: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[[u8; 4]; 16]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn bits(v: Self::V, right: u32, left: u32, mask: u8) -> Self::V {
        v.map(|lane| lane.map(|byte| ((byte >> right) << left) & mask))
    }

    #[inline(always)]
    unsafe fn or(a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| from_fn(|j| a[i][j] | b[i][j]))
    }

    #[inline(always)]
    unsafe fn centre(v: Self::V) -> Self::V {
        v
    }

    #[inline(always)]
    unsafe fn dot(acc: Self::I, v: Self::V, x: *const u32, _wide: bool) -> Self::I {
        // SAFETY: the trait's contract.
        unsafe {
            let x = x.read_unaligned().to_le_bytes();
            from_fn(|i| (0..4).fold(acc[i], |sum, j| sum + i32::from(v[i][j]) * i32::from(x[j] as i8)))
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::I {
        [0; 16]
    }

    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }

    #[inline(always)]
    unsafe fn round(v: Self::F) -> Self::I {
        v.map(|v| v.round_ties_even() as i32)
    }

    #[inline(always)]
    unsafe fn byte(v: Self::V, i: u32) -> Self::I {
        v.map(|lane| i32::from(lane[i as usize]))
    }

    #[inline(always)]
    unsafe fn pack(v: [Self::I; 4]) -> Self::V {
        from_fn(|lane| from_fn(|i| v[i][lane] as u8))
    }

    #[inline(always)]
    unsafe fn transpose(v: [Self::V; 4]) -> [Self::V; 4] {
        from_fn(|a| from_fn(|lane| from_fn(|b| v[lane / 4][4 * a + b][lane % 4])))
    }

    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_f(p: *mut f32, v: Self::F) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; 16]>().read_unaligned().map(f32::from) }
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u8; 16]>().read_unaligned().map(f32::from) }
    }

    #[inline(always)]
    unsafe fn total(v: Self::I) -> i32 {
        v.into_iter().sum()
    }

    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::I) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u8; 16]>().write_unaligned(v.map(|v| v as u8)) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u16; 16]>().read_unaligned().map(decode_f16) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i].max(b[i]))
    }

    #[inline(always)]
    unsafe fn abs(v: Self::F) -> Self::F {
        v.map(f32::abs)
    }

    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i] + c[i])
    }
    fn fma_one(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}
