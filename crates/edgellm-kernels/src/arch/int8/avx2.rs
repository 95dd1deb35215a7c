//! AVX2: a vector is two registers.
//!
//! An instruction multiplies unsigned bytes with signed ones and adds pairs of products in 16 bits. Those of codes of
//! few bits are added in 16 bits as long as they fit, then by an instruction in 32 bits. Codes of 8 bits are centred
//! and lend the tokens their signs.

use core::arch::asm;
use core::arch::x86_64::*;

use super::kernels::{self, Source, Task, entries};
use super::{PLACES, Vector};
use crate::arch::avx2::Avx2;
use crate::panels::Panels;

entries!(Avx2, "avx2,fma,f16c,popcnt");

/// Puts the bytes of a 4 x 4 matrix in each half in the order of the transposed matrix.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn transpose_bytes(v: __m256i) -> __m256i {
    // SAFETY: the function's contract.
    unsafe {
        let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order))
    }
}

/// [`Vector::expand`] of 16 bytes, for the bytes of their mask.
///
/// # Safety
/// The processor has AVX2; 16 bytes at `p` are readable.
#[inline(always)]
unsafe fn expand16(p: *const u8, low: u8, high: u8, fill: __m128i) -> __m128i {
    // SAFETY: the function's contract.
    unsafe {
        let [first, second] = [low, high].map(|mask| u64::from_le_bytes(PLACES[usize::from(mask)]));
        let skip = u64::from(low.count_ones()) * 0x0101_0101_0101_0101;
        let places = _mm_set_epi64x((second + skip) as i64, first as i64);
        _mm_blendv_epi8(_mm_shuffle_epi8(_mm_loadu_si128(p.cast()), places), fill, places)
    }
}

/// Makes the compiler compute these sums before it loads what follows. Otherwise it starts on many quads at once and
/// runs out of registers, at half the speed.
#[target_feature(enable = "avx2")]
#[inline]
fn in_order<const T: usize>(sums: &mut [[__m256i; 2]; T]) {
    if T > 1 {
        for sum in sums {
            // SAFETY: no instructions.
            unsafe {
                asm!("/* {0} {1} */", inout(ymm_reg) sum[0], inout(ymm_reg) sum[1], options(nostack, preserves_flags));
            }
        }
    }
}

// SAFETY: every function uses only the proven instruction sets, and reads or writes the bytes that the trait names.
unsafe impl Vector for Avx2 {
    type V = [__m256i; 2];
    type I = [__m256i; 2];
    type F = [__m256; 2];
    const TILE: usize = 2;
    const BIAS: u32 = 128;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }

    #[inline(always)]
    unsafe fn store(p: *mut u8, v: Self::V) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_si256(p.cast(), v[0]);
            _mm256_storeu_si256(p.add(32).cast(), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn bits(v: Self::V, right: u32, left: u32, mask: u8) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe {
            let one = |v: __m256i| {
                let v = _mm256_srl_epi16(v, _mm_cvtsi32_si128(right as i32));
                let v = _mm256_sll_epi16(v, _mm_cvtsi32_si128(left as i32));
                _mm256_and_si256(v, _mm256_set1_epi8(mask as i8))
            };
            [one(v[0]), one(v[1])]
        }
    }

    #[inline(always)]
    unsafe fn or(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn centre(v: Self::V) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe {
            let bias = _mm256_set1_epi8(-128);
            [_mm256_xor_si256(v[0], bias), _mm256_xor_si256(v[1], bias)]
        }
    }

    #[inline(always)]
    unsafe fn dot(acc: Self::I, v: Self::V, x: *const u32, wide: bool) -> Self::I {
        // SAFETY: the trait's contract.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let one = |acc: __m256i, v: __m256i| {
                // In 16 bits, pairs are at most 2 * 128 * 127.
                let pairs = if wide {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v))
                } else {
                    _mm256_maddubs_epi16(v, x)
                };
                _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
            [one(acc[0], v[0]), one(acc[1], v[1])]
        }
    }

    #[inline(always)]
    unsafe fn sum<S: Source<Self>, const T: usize, const N: usize>(
        source: &S,
        block: usize,
        first: usize,
        x: *const u32,
    ) -> [Self::I; T] {
        macro_rules! step {
            ($acc:ident, [$($quad:literal)*]) => {
                if S::BITS == 8 {
                    $(
                        let v = source.quad(block, first + $quad);
                        for t in 0..T {
                            $acc[t] = <Self as Vector>::dot($acc[t], v, x.add($quad * T + t), true);
                        }
                        in_order(&mut $acc);
                    )*
                } else {
                    let mut pairs = [[_mm256_setzero_si256(); 2]; T];
                    $(
                        let v = source.quad(block, first + $quad);
                        for t in 0..T {
                            let x = _mm256_set1_epi32(x.add($quad * T + t).cast::<i32>().read_unaligned());
                            pairs[t][0] = _mm256_add_epi16(pairs[t][0], _mm256_maddubs_epi16(v[0], x));
                            pairs[t][1] = _mm256_add_epi16(pairs[t][1], _mm256_maddubs_epi16(v[1], x));
                        }
                        in_order(&mut pairs);
                    )*
                    let ones = _mm256_set1_epi16(1);
                    for t in 0..T {
                        $acc[t][0] = _mm256_add_epi32($acc[t][0], _mm256_madd_epi16(pairs[t][0], ones));
                        $acc[t][1] = _mm256_add_epi32($acc[t][1], _mm256_madd_epi16(pairs[t][1], ones));
                    }
                }
            };
        }
        // SAFETY: the trait's contract; the block exists. In 16 bits, 8 pairs of products with codes of 4 bits are at
        // most 8 * 2 * 15 * 127, 4 of 5 bits 4 * 2 * 31 * 127, 2 of 6 bits 2 * 2 * 63 * 127.
        unsafe {
            let mut acc = [Self::zero(); T];
            match (S::BITS, N) {
                (..=4, 8) => step!(acc, [0 1 2 3 4 5 6 7]),
                (..=5, _) => {
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
            acc
        }
    }

    #[inline(always)]
    unsafe fn expand(p: *const u8, mask: u64, fill: u8) -> Self::V {
        // SAFETY: the trait's contract: before the last 16 places, at most 48 bytes are used.
        unsafe {
            let ([a, b, c, d, e, f, g, h], fill) = (mask.to_le_bytes(), _mm_set1_epi8(fill as i8));
            let after = |p: *const u8, low: u8, high: u8| p.add((low.count_ones() + high.count_ones()) as usize);
            let (p, a) = (after(p, a, b), expand16(p, a, b, fill));
            let (p, b) = (after(p, c, d), expand16(p, c, d, fill));
            let (p, c) = (after(p, e, f), expand16(p, e, f, fill));
            let d = expand16(p, g, h, fill);
            [_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)]
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::I {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    unsafe fn to_f(v: Self::I) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }

    #[inline(always)]
    unsafe fn round(v: Self::F) -> Self::I {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])] }
    }

    #[inline(always)]
    unsafe fn byte(v: Self::V, i: u32) -> Self::I {
        // SAFETY: the trait's contract.
        unsafe {
            let one = |v: __m256i| {
                let v = _mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * i as i32));
                _mm256_and_si256(v, _mm256_set1_epi32(0xff))
            };
            [one(v[0]), one(v[1])]
        }
    }

    #[inline(always)]
    unsafe fn pack(v: [Self::I; 4]) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe {
            let one = |a, b, c, d| {
                let low = _mm256_or_si256(a, _mm256_slli_epi32::<8>(b));
                let high = _mm256_or_si256(_mm256_slli_epi32::<16>(c), _mm256_slli_epi32::<24>(d));
                _mm256_or_si256(low, high)
            };
            [one(v[0][0], v[1][0], v[2][0], v[3][0]), one(v[0][1], v[1][1], v[2][1], v[3][1])]
        }
    }

    #[inline(always)]
    unsafe fn transpose(v: [Self::V; 4]) -> [Self::V; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            // 4 x 4 quarters, then 4 x 4 bytes in each quarter.
            let low = |a, b| transpose_bytes(_mm256_permute2x128_si256::<0x20>(a, b));
            let high = |a, b| transpose_bytes(_mm256_permute2x128_si256::<0x31>(a, b));
            [
                [low(v[0][0], v[1][0]), low(v[2][0], v[3][0])],
                [high(v[0][0], v[1][0]), high(v[2][0], v[3][0])],
                [low(v[0][1], v[1][1]), low(v[2][1], v[3][1])],
                [high(v[0][1], v[1][1]), high(v[2][1], v[3][1])],
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f(p: *const f32) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }

    #[inline(always)]
    unsafe fn store_f(p: *mut f32, v: Self::F) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe {
            let (low, high) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        }
    }

    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe {
            let (low, high) = (_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(8).cast()));
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))]
        }
    }

    #[inline(always)]
    unsafe fn total(v: Self::I) -> i32 {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm256_add_epi32(v[0], v[1]);
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_hadd_epi32(v, v);
            _mm_cvtsi128_si32(_mm_hadd_epi32(v, v))
        }
    }

    #[inline(always)]
    unsafe fn store_i8(p: *mut u8, v: Self::I) {
        // SAFETY: the trait's contract.
        unsafe {
            let words = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(v[0], v[1]));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(p.cast(), bytes);
        }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))] }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn abs(v: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, v[0]), _mm256_andnot_ps(sign, v[1])]
        }
    }

    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        // SAFETY: the trait's contract.
        unsafe {
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}
