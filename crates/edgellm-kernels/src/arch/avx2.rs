//! Row kernels for AVX2 with FMA and F16C: eight lanes.
//!
//! Eight codes of `B` bits are `B` bytes: they are broadcast to both halves of a vector, a byte shuffle brings the two
//! bytes that can hold a lane's code to its lane, and a shift by lane and a mask leave the code.

use core::arch::x86_64::*;

use super::rows::{self, Job, Lanes, Tokens};

/// Proof that the processor has AVX2, FMA and F16C, and counts bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Avx2(()))
    }

    pub(super) fn decode(self, job: Job, out: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run(job: Job, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::decode::<Avx2>(job, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, out) }
    }

    pub(super) fn dot(self, job: Job, x: &Tokens, out: &mut [f32]) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn run(job: Job, x: &Tokens, out: &mut [f32]) {
            // SAFETY: compiled for the instruction set, and called where it exists.
            unsafe { rows::dot::<Avx2>(job, x, out) }
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { run(job, x, out) }
    }
}

/// Per width: which bytes a lane needs, and by how much they are shifted.
struct Table<const B: usize>;

impl<const B: usize> Table<B> {
    const SHUFFLE: [u8; 32] = {
        let mut table = [0x80; 32];
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
    const SHIFT: [u32; 8] = {
        let mut table = [0; 8];
        let mut lane = 0;
        while lane < 8 {
            table[lane] = (lane * B % 8) as u32;
            lane += 1;
        }
        table
    };
}

// SAFETY: every function uses only AVX2, FMA and F16C, and reads or writes the bytes that the trait names.
unsafe impl Lanes for Avx2 {
    type F = __m256;
    const N: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut f32, value: __m256) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(p, value) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    unsafe fn codes<const B: usize>(p: *const u8) -> __m256 {
        // SAFETY: eight readable bytes and the trait's contract; the tables hold 32 bytes.
        unsafe {
            let bytes = _mm256_set1_epi64x(p.cast::<i64>().read_unaligned());
            let spread = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256(Table::<B>::SHUFFLE.as_ptr().cast()));
            let shifted = _mm256_srlv_epi32(spread, _mm256_loadu_si256(Table::<B>::SHIFT.as_ptr().cast()));
            let codes = _mm256_and_si256(shifted, _mm256_set1_epi32((1 << B) - 1));
            _mm256_cvtepi32_ps(codes)
        }
    }

    #[inline(always)]
    unsafe fn f16(p: *const u8) -> __m256 {
        // SAFETY: sixteen readable bytes and the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn bf16(p: *const u8) -> __m256 {
        // SAFETY: sixteen readable bytes and the trait's contract.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}
