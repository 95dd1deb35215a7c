//! Row kernels for AVX-512 F and BW: sixteen lanes.
//!
//! Sixteen codes of `B` bits are `2 B` bytes: they are broadcast to the four quarters of a vector and then treated
//! as with AVX2.

use core::arch::x86_64::*;

use super::avx2::Avx2;
use super::rows::{self, Job, Lanes, Tokens};

/// Proof that the processor has AVX-512 F and BW, and AVX2 with FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    pub(super) fn new() -> Option<Self> {
        let avx2 = Avx2::new()?;
        let has = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        has.then_some(Avx512(avx2))
    }

    /// AVX2, which comes with it.
    pub(super) fn avx2(self) -> Avx2 {
        self.0
    }

    pub(super) fn decode(self, job: Job, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        fn run(job: Job, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::decode::<Avx512>(job, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, out) }
    }

    pub(super) fn dot(self, job: Job, x: &Tokens, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        fn run(job: Job, x: &Tokens, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::dot::<Avx512>(job, x, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, x, out) }
    }
}

/// Per width: which bytes a lane needs, and by how much they are shifted.
struct Table<const B: usize>;

impl<const B: usize> Table<B> {
    const SHUFFLE: [u8; 64] = {
        let mut table = [0x80; 64];
        let mut lane = 0;
        while lane < 16 {
            let byte = lane * B / 8;
            table[4 * lane] = byte as u8;
            if byte + 1 < 16 {
                table[4 * lane + 1] = byte as u8 + 1;
            }
            lane += 1;
        }
        table
    };
    const SHIFT: [u32; 16] = {
        let mut table = [0; 16];
        let mut lane = 0;
        while lane < 16 {
            table[lane] = (lane * B % 8) as u32;
            lane += 1;
        }
        table
    };
}

// SAFETY: every function uses only the proven instruction sets, and reads or writes the bytes that the trait names.
unsafe impl Lanes for Avx512 {
    type F = __m512;
    const N: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, value: __m512) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(p, value) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    unsafe fn codes<const B: usize>(p: *const u8) -> __m512 {
        // SAFETY: sixteen readable bytes and the trait's contract; the tables hold 64 bytes.
        unsafe {
            let bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
            let spread = _mm512_shuffle_epi8(bytes, _mm512_loadu_si512(Table::<B>::SHUFFLE.as_ptr().cast()));
            let shifted = _mm512_srlv_epi32(spread, _mm512_loadu_si512(Table::<B>::SHIFT.as_ptr().cast()));
            let codes = _mm512_and_si512(shifted, _mm512_set1_epi32((1 << B) - 1));
            _mm512_cvtepi32_ps(codes)
        }
    }

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes and the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m512 {
        // SAFETY: 32 readable bytes and the trait's contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
}
