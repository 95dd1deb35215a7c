//! What the machine allows, to judge kernels by: how fast memory is read, and how many multiply-adds the widest
//! instructions give.
//!
//! The loops of multiply-adds are assembly where an instruction set has one, so that no compiler moves anything out of
//! them: independent sums stay in registers, so many (6 to 16) that none is waited for. The measurements run on every
//! thread of the current `rayon` pool at once; the best of some rounds counts.

use std::hint::black_box;
use std::time::Instant;

/// Bytes that are read: more than caches hold.
const BUFFER_BYTES: usize = 256 << 20;
/// Rounds of which the best counts.
const ROUNDS: usize = 6;
/// Turns of a loop of multiply-adds in a round.
const TURNS: u64 = 1 << 22;

/// The limits of a machine, with as many threads as the pool has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes read from memory in a second.
    pub read_bytes_per_second: f64,
    /// 8-bit multiply-adds in a second; `None` without vector instructions for them.
    pub int8_macs_per_second: Option<f64>,
    /// Single-precision multiply-adds in a second.
    pub f32_macs_per_second: f64,
}

/// Measures the limits on all threads of the current pool. Takes about a second, in which nothing else should run.
pub fn measure_ceilings() -> Ceilings {
    // Not zeros, which the system might back with one shared page.
    let buffer: Vec<u64> = (0..(BUFFER_BYTES / 8) as u64).collect();
    let part = buffer.len().div_ceil(rayon::current_num_threads());
    let seconds = best_round(|thread| {
        let end = buffer.len().min((thread + 1) * part);
        black_box(read(&buffer[(thread * part).min(end)..end]));
    });
    drop(buffer);
    let (f32_loop, f32_macs) = f32_loop();
    Ceilings {
        read_bytes_per_second: BUFFER_BYTES as f64 / seconds,
        int8_macs_per_second: int8_loop().map(|(run, macs)| macs_per_second(run, macs)),
        f32_macs_per_second: macs_per_second(f32_loop, f32_macs),
    }
}

/// A loop of some turns, at least one. It gives one of its sums, which shows that every turn was done: 4 a turn for
/// integers, 0.5 and 0.25 a turn for floats.
type Loop = fn(u64) -> f64;

/// The rate of a loop with `macs` multiply-adds a turn.
fn macs_per_second(run: Loop, macs: u64) -> f64 {
    let seconds = best_round(|_| {
        black_box(run(black_box(TURNS)));
    });
    (macs * TURNS) as f64 * rayon::current_num_threads() as f64 / seconds
}

/// The shortest time in which every thread did its work, given its index.
fn best_round(work: impl Fn(usize) + Sync) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        rayon::broadcast(|context| work(context.index()));
        best = best.min(start.elapsed().as_secs_f64());
    }
    best.max(1e-9)
}

/// The exclusive or of all values, with the widest loads.
fn read(values: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instruction set.
            return unsafe { x86::read_avx512(values) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instruction set.
            return unsafe { x86::read_avx2(values) };
        }
    }
    // Elsewhere the base instruction set has the widest loads, and the compiler uses them.
    read_portable::<32>(values)
}

/// The exclusive or in `LANES` lanes, which compilers turn into vectors.
#[inline(always)]
fn read_portable<const LANES: usize>(values: &[u64]) -> u64 {
    let mut lanes = [0u64; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane ^= value;
        }
    }
    chunks.remainder().iter().chain(&lanes).fold(0, |sum, value| sum ^ value)
}

/// The best loop of f32 multiply-adds here, with its multiply-adds a turn.
fn f32_loop() -> (Loop, u64) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instruction set.
            return (|turns| unsafe { x86::fma_avx512(turns) }, 16 * 16);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has the instruction set.
            return (|turns| unsafe { x86::fma_avx2(turns) }, 12 * 8);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        // SAFETY: the processor has the instruction set.
        return (|turns| unsafe { arm::fmla(turns) }, 16 * 4);
    }
    #[allow(unreachable_code)]
    (portable_f32, 32)
}

/// The best loop of 8-bit multiply-adds here, with its multiply-adds a turn.
fn int8_loop() -> Option<(Loop, u64)> {
    every_int8_loop().into_iter().next()
}

/// Those that this processor has, the best first.
fn every_int8_loop() -> Vec<(Loop, u64)> {
    #[allow(unused_mut)]
    let mut loops: Vec<(Loop, u64)> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instruction set.
            loops.push((|turns| unsafe { x86::dpbusd_avx512(turns) }, 16 * 64));
        }
        if is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instruction set.
            loops.push((|turns| unsafe { x86::dpbusd_avx2(turns) }, 12 * 32));
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instruction set.
            loops.push((|turns| unsafe { x86::maddubs_avx2(turns) }, 6 * 32));
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            // SAFETY: the processor has the instruction set.
            loops.push((|turns| unsafe { arm::sdot(turns) }, 16 * 16));
        }
        if std::arch::is_aarch64_feature_detected!("neon") {
            // SAFETY: the processor has the instruction set.
            loops.push((|turns| unsafe { arm::smull(turns) }, 8 * 16));
        }
    }
    loops
}

/// 32 sums. The second factor changes with every turn, so that no product can be kept, and the compiler knows neither.
fn portable_f32(turns: u64) -> f64 {
    let [half, sign] = black_box([0.5f32, 1.0]);
    let mut factor = half;
    let mut sums = black_box([0.5f32; 32]);
    for _ in 0..turns.max(1) {
        for sum in &mut sums {
            *sum += half * factor;
        }
        factor *= sign;
    }
    f64::from(black_box(sums)[0])
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::asm;
    use core::arch::x86_64::*;

    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn read_avx512(values: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        let (blocks, rest) = values.as_chunks::<64>();
        for block in blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a block has 64 values, of which eight from `8 * i` on are read.
                let loaded = unsafe { _mm512_loadu_si512(block.as_ptr().add(8 * i).cast()) };
                *sum = _mm512_xor_si512(*sum, loaded);
            }
        }
        let mut lanes = [0u64; 64];
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: there are 64 lanes, of which eight from `8 * i` on are written.
            unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().add(8 * i).cast(), sum) };
        }
        rest.iter().chain(&lanes).fold(0, |sum, value| sum ^ value)
    }

    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn read_avx2(values: &[u64]) -> u64 {
        super::read_portable::<32>(values)
    }

    /// Repeats an instruction with two inputs on each of the sums, `turns` times.
    macro_rules! repeat {
        ($turns:expr, $class:ident, $x:expr, $y:expr, $zero:expr, $op:literal, [$($sum:ident)*]) => {{
            $(let mut $sum = $zero;)*
            // SAFETY: only the registers that are named are used, no memory and no stack; the caller has the
            // instruction set; there is at least one turn.
            unsafe {
                asm!(
                    "2:",
                    $(concat!($op, " {", stringify!($sum), "}, {x}, {y}"),)*
                    "dec {turns}",
                    "jnz 2b",
                    x = in($class) $x,
                    y = in($class) $y,
                    turns = inout(reg) u64::max($turns, 1) => _,
                    $($sum = inout($class) $sum,)*
                    options(nostack, nomem, pure)
                );
            }
            [$($sum),*][0]
        }};
    }

    /// Sixteen sums of sixteen floats.
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn fma_avx512(turns: u64) -> f64 {
        let half = _mm512_set1_ps(0.5);
        let sum = repeat!(turns, zmm_reg, half, half, half, "vfmadd231ps", [a b c d e f g h i j k l m n o p]);
        f64::from(_mm512_cvtss_f32(sum))
    }

    /// Twelve sums of eight floats.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn fma_avx2(turns: u64) -> f64 {
        let half = _mm256_set1_ps(0.5);
        let sum = repeat!(turns, ymm_reg, half, half, half, "vfmadd231ps", [a b c d e f g h i j k l]);
        f64::from(_mm256_cvtss_f32(sum))
    }

    /// Sixteen sums, each of 64 products of bytes.
    ///
    /// # Safety
    /// The processor has AVX-512 F and VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn dpbusd_avx512(turns: u64) -> f64 {
        let (ones, zero) = (_mm512_set1_epi8(1), _mm512_setzero_si512());
        let sum = repeat!(turns, zmm_reg, ones, ones, zero, "vpdpbusd", [a b c d e f g h i j k l m n o p]);
        f64::from(_mm512_cvtsi512_si32(sum))
    }

    /// Twelve sums, each of 32 products of bytes.
    ///
    /// # Safety
    /// The processor has AVX2 and AVX-VNNI.
    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) unsafe fn dpbusd_avx2(turns: u64) -> f64 {
        let (ones, zero) = (_mm256_set1_epi8(1), _mm256_setzero_si256());
        let sum = repeat!(turns, ymm_reg, ones, ones, zero, "{{vex}} vpdpbusd", [a b c d e f g h i j k l]);
        f64::from(_mm256_cvtsi256_si32(sum))
    }

    /// Six sums, each of 32 products of bytes: products to 16 bits, pairs to 32 bits, sum.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn maddubs_avx2(turns: u64) -> f64 {
        let (bytes, words, zero) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1), _mm256_setzero_si256());
        macro_rules! turn {
            ([$($sum:ident $part:ident)*]) => {{
                $(let mut $sum = zero;)*
                // SAFETY: only the registers that are named are used, no memory and no stack; the caller has the
                // instruction set; there is at least one turn.
                unsafe {
                    asm!(
                        "2:",
                        $(concat!("vpmaddubsw {", stringify!($part), "}, {bytes}, {bytes}"),)*
                        $(concat!("vpmaddwd {", stringify!($part), "}, {", stringify!($part), "}, {words}"),)*
                        $(concat!(
                            "vpaddd {", stringify!($sum), "}, {", stringify!($sum), "}, {", stringify!($part), "}"
                        ),)*
                        "dec {turns}",
                        "jnz 2b",
                        bytes = in(ymm_reg) bytes,
                        words = in(ymm_reg) words,
                        turns = inout(reg) u64::max(turns, 1) => _,
                        $($sum = inout(ymm_reg) $sum, $part = out(ymm_reg) _,)*
                        options(nostack, nomem, pure)
                    );
                }
                [$($sum),*][0]
            }};
        }
        f64::from(_mm256_cvtsi256_si32(turn!([a at b bt c ct d dt e et f ft])))
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use core::arch::aarch64::*;
    use core::arch::asm;

    /// Repeats an instruction with two inputs on each of the sums, `turns` times.
    macro_rules! repeat {
        ($turns:expr, $x:expr, $y:expr, $zero:expr, $op:literal, $to:literal, $from:literal, [$($sum:ident)*]) => {{
            $(let mut $sum = $zero;)*
            // SAFETY: only the registers that are named are used, no memory and no stack; the caller has the
            // instruction set; there is at least one turn.
            unsafe {
                asm!(
                    "2:",
                    $(concat!($op, " {", stringify!($sum), ":v}", $to, ", {x:v}", $from, ", {y:v}", $from),)*
                    "subs {turns}, {turns}, #1",
                    "b.ne 2b",
                    x = in(vreg) $x,
                    y = in(vreg) $y,
                    turns = inout(reg) u64::max($turns, 1) => _,
                    $($sum = inout(vreg) $sum,)*
                    options(nostack, nomem, pure)
                );
            }
            [$($sum),*][0]
        }};
    }

    /// Sixteen sums of four floats.
    ///
    /// # Safety
    /// The processor has NEON.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn fmla(turns: u64) -> f64 {
        let half = vdupq_n_f32(0.5);
        let sum = repeat!(turns, half, half, half, "fmla", ".4s", ".4s", [a b c d e f g h i j k l m n o p]);
        f64::from(vgetq_lane_f32::<0>(sum))
    }

    /// Sixteen sums, each of sixteen products of bytes.
    ///
    /// # Safety
    /// The processor has NEON with dot products.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) unsafe fn sdot(turns: u64) -> f64 {
        let (ones, zero) = (vdupq_n_s8(1), vdupq_n_s32(0));
        let sum = repeat!(turns, ones, ones, zero, "sdot", ".4s", ".16b", [a b c d e f g h i j k l m n o p]);
        f64::from(vgetq_lane_s32::<0>(sum))
    }

    /// Eight sums, each of sixteen products of bytes: products to 16 bits in two halves, pairs to 32 bits.
    ///
    /// # Safety
    /// The processor has NEON.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn smull(turns: u64) -> f64 {
        let (ones, zero) = (vdupq_n_s8(1), vdupq_n_s32(0));
        macro_rules! turn {
            ([$($sum:ident $part:ident)*]) => {{
                $(let mut $sum = zero;)*
                // SAFETY: only the registers that are named are used, no memory and no stack; the caller has the
                // instruction set; there is at least one turn.
                unsafe {
                    asm!(
                        "2:",
                        $(concat!("smull {", stringify!($part), ":v}.8h, {ones:v}.8b, {ones:v}.8b"),)*
                        $(concat!("smlal2 {", stringify!($part), ":v}.8h, {ones:v}.16b, {ones:v}.16b"),)*
                        $(concat!("sadalp {", stringify!($sum), ":v}.4s, {", stringify!($part), ":v}.8h"),)*
                        "subs {turns}, {turns}, #1",
                        "b.ne 2b",
                        ones = in(vreg) ones,
                        turns = inout(reg) u64::max(turns, 1) => _,
                        $($sum = inout(vreg) $sum, $part = out(vreg) _,)*
                        options(nostack, nomem, pure)
                    );
                }
                [$($sum),*][0]
            }};
        }
        f64::from(vgetq_lane_s32::<0>(turn!([a at b bt c ct d dt e et f ft g gt h ht])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_read() {
        for len in [0usize, 1, 31, 63, 64, 65, 1000] {
            let values: Vec<u64> = (0..len as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
            let expected = values.iter().fold(0, |sum, value| sum ^ value);
            assert_eq!(read(&values), expected, "{len} values");
            assert_eq!(read_portable::<32>(&values), expected, "{len} values");
        }
    }

    #[test]
    fn the_loops_do_every_turn() {
        for turns in [1u64, 2, 1000] {
            let floats = 0.5 + 0.25 * turns as f64;
            assert_eq!((f32_loop().0)(turns), floats);
            assert_eq!(portable_f32(turns), floats);
            for (run, _) in every_int8_loop() {
                assert_eq!(run(turns), 4.0 * turns as f64);
            }
        }
    }
}
