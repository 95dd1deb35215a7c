//! AVX-512 with VNNI: a vector is one register, a dot product one instruction.

use core::arch::x86_64::*;

use super::Vector;
use super::kernels::{self, Task, entries};
use crate::arch::avx512::Avx512;
use crate::panels::Panels;

/// Proof that the processor has AVX-512 F, BW, VL, DQ, VNNI, VBMI2 and VPOPCNTDQ (Ice Lake, Zen 4, and later).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Vnni(Avx512);

impl Avx512Vnni {
    pub(in crate::arch) fn new() -> Option<Self> {
        let rows = Avx512::new()?;
        let has = is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Avx512Vnni(rows))
    }

    /// The row kernels.
    pub(in crate::arch) fn rows(self) -> Avx512 {
        self.0
    }
}

entries!(Avx512Vnni, "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx512vpopcntdq,avx2,fma,f16c,popcnt");

// SAFETY: every function uses only the proven instruction sets, and reads or writes the bytes that the trait names.
unsafe impl Vector for Avx512Vnni {
    type V = __m512i;
    type I = __m512i;
    type F = __m512;
    const TILE: usize = 12;
    const BIAS: u32 = 0;

    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(p: *mut u8, v: __m512i) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }

    #[inline(always)]
    unsafe fn bits(v: __m512i, right: u32, left: u32, mask: u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm512_srl_epi16(v, _mm_cvtsi32_si128(right as i32));
            let v = _mm512_sll_epi16(v, _mm_cvtsi32_si128(left as i32));
            _mm512_and_si512(v, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn centre(v: __m512i) -> __m512i {
        v
    }

    #[inline(always)]
    unsafe fn dot(acc: __m512i, v: __m512i, x: *const u32, _wide: bool) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_dpbusd_epi32(acc, v, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn expand(p: *const u8, mask: u64, fill: u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let bytes = _mm512_loadu_si512(p.cast());
            _mm512_mask_expand_epi8(_mm512_set1_epi8(fill as i8), mask, bytes)
        }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn to_f(v: __m512i) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    unsafe fn round(v: __m512) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtps_epi32(v) }
    }

    #[inline(always)]
    unsafe fn byte(v: __m512i, i: u32) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm512_srl_epi32(v, _mm_cvtsi32_si128(8 * i as i32));
            if i == 3 { v } else { _mm512_and_si512(v, _mm512_set1_epi32(0xff)) }
        }
    }

    #[inline(always)]
    unsafe fn pack(v: [__m512i; 4]) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm512_or_si512(v[0], _mm512_slli_epi32::<8>(v[1]));
            let high = _mm512_or_si512(_mm512_slli_epi32::<16>(v[2]), _mm512_slli_epi32::<24>(v[3]));
            _mm512_or_si512(low, high)
        }
    }

    #[inline(always)]
    unsafe fn transpose(v: [__m512i; 4]) -> [__m512i; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            // 4 x 4 quarters, then 4 x 4 bytes in each quarter.
            let a = _mm512_shuffle_i32x4::<0x44>(v[0], v[1]);
            let b = _mm512_shuffle_i32x4::<0xee>(v[0], v[1]);
            let c = _mm512_shuffle_i32x4::<0x44>(v[2], v[3]);
            let d = _mm512_shuffle_i32x4::<0xee>(v[2], v[3]);
            let bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let bytes = _mm512_broadcast_i32x4(bytes);
            [
                _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0x88>(a, c), bytes),
                _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0xdd>(a, c), bytes),
                _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0x88>(b, d), bytes),
                _mm512_shuffle_epi8(_mm512_shuffle_i32x4::<0xdd>(b, d), bytes),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store_f(p: *mut f32, v: __m512) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn total(v: __m512i) -> i32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_epi32(v) }
    }

    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: __m512i) {
        // SAFETY: the trait's contract.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v)) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn abs(v: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_abs_ps(v) }
    }

    #[inline(always)]
    unsafe fn largest(v: __m512) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}
