//! The exponential, written so that the compiler vectorizes loops over it.
//!
//! `e^x = 2^n e^r` with `n` the nearest integer to `x / ln 2` and `|r| <= ln 2 / 2`; `e^r` by its Taylor polynomial of
//! degree 7 (remainder below 4e-9 relative). `ln 2` is split in two, so that `r` is exact to rounding (Cody and
//! Waite). Arguments are clamped to the range of normal results: the smallest result is `2^-126`, not 0.

/// `e^x` for finite `x`, with a relative error below 3e-7; at most about `1.7e38`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: the sum's low mantissa bits are the rounded integer
    let x = x.clamp(-87.3, 88.0);
    let shifted = x * core::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn relative_error() {
        let mut worst = 0.0f64;
        for i in -87_000..=87_900 {
            let x = i as f32 * 1e-3;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "{worst:e}");
    }

    #[test]
    fn edges() {
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) > 0.0 && exp(-1e30) < 2e-38);
        assert!(exp(1e30).is_finite());
    }
}
