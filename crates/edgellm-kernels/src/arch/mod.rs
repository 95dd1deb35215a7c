//! Kernels for instruction sets, and the choice between them.
//!
//! The row kernels (decode a tile of rows; dot a few token vectors with rows) are written once, in `rows`, over a
//! small vocabulary of vector operations that each instruction set provides. An instruction set is available as a value that can only be made
//! where the processor has it; the best one is chosen at first use, [`kernels`] tells which, and [`force_isa`]
//! changes it for tests and comparisons.
//!
//! | instruction set | row kernels: vector | unpack codes with | integer kernels: products of bytes |
//! |---|---|---|---|
//! | `scalar` | 8 floats as an array | shifts of a 64-bit word | one by one |
//! | `neon` | 2 x 4 floats | table lookup, shift by lane | `smlal`, in 16 bits |
//! | `neon+dotprod` | as `neon` | as `neon` | `sdot` |
//! | `neon+i8mm` | as `neon` | as `neon` | `sdot`; for many tokens `smmla` |
//! | `avx2` (with FMA, F16C and POPCNT) | 8 floats | byte shuffle, shift by lane | `vpmaddubsw`, in 16 bits |
//! | `avx512` (F and BW) | 16 floats | byte shuffle, shift by lane | as `avx2` |
//! | `avx512vnni` (with VL, DQ, VBMI2 and VPOPCNTDQ) | as `avx512` | as `avx512` | `vpdpbusd` |
//!
//! This module tree is the crate's only unsafe code: intrinsics, the call into the `gemm` crate, and handing out
//! disjoint columns of one buffer to several threads.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod ceiling;
mod int8;
pub(crate) mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod pool;
mod rows;
mod scalar;

use core::sync::atomic::{AtomicU8, Ordering};

use crate::error::{KernelError, Result};

pub use ceiling::{Ceilings, measure_ceilings};
pub(crate) use int8::{Attend, Elements, KEYS, LowRank, Part, Task, Tokens8, softmax};
pub(crate) use rows::{PackedRows, Tokens};

/// An instruction set that row kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Isa {
    /// Portable code.
    Scalar = 0,
    /// ARM's Advanced SIMD.
    Neon = 1,
    /// Advanced SIMD with dot products of bytes.
    NeonDot = 2,
    /// Advanced SIMD with dot products and matrix products of bytes.
    NeonI8mm = 3,
    /// AVX2 with FMA and F16C.
    Avx2 = 4,
    /// AVX-512 F and BW.
    Avx512 = 5,
    /// AVX-512 with VNNI.
    Avx512Vnni = 6,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Isa; 7] =
        [Isa::Scalar, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni];

    /// Those of this processor and build, slowest first.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|&isa| Kernel::new(isa).is_some()).collect()
    }

    /// `scalar`, `neon`, `neon+dotprod`, `neon+i8mm`, `avx2`, `avx512` or `avx512vnni`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon+dotprod",
            Isa::NeonI8mm => "neon+i8mm",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
        }
    }
}

impl core::fmt::Display for Isa {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of row kernels that this processor can run: each variant holds the proof.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernel {
    Scalar(scalar::Scalar),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(int8::neon::NeonDot),
    #[cfg(target_arch = "aarch64")]
    NeonI8mm(int8::neon::NeonI8mm),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(int8::avx512::Avx512Vnni),
}

/// No choice has been made yet.
const UNSET: u8 = u8::MAX;
static ACTIVE: AtomicU8 = AtomicU8::new(UNSET);

impl Kernel {
    /// The kernels of an instruction set, if the processor has it.
    fn new(isa: Isa) -> Option<Kernel> {
        match isa {
            Isa::Scalar => Some(Kernel::Scalar(scalar::Scalar)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Neon::new().map(Kernel::Neon),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => int8::neon::NeonDot::new().map(Kernel::NeonDot),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => int8::neon::NeonI8mm::new().map(Kernel::NeonI8mm),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::new().map(Kernel::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::new().map(Kernel::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => int8::avx512::Avx512Vnni::new().map(Kernel::Avx512Vnni),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }

    /// The kernels in use.
    pub(crate) fn active() -> Kernel {
        let chosen = ACTIVE.load(Ordering::Relaxed);
        let chosen = Isa::ALL.into_iter().find(|&isa| isa as u8 == chosen).and_then(Kernel::new);
        chosen.unwrap_or_else(|| {
            let best = Isa::ALL.into_iter().rev().find_map(Kernel::new).unwrap_or(Kernel::Scalar(scalar::Scalar));
            ACTIVE.store(best.isa() as u8, Ordering::Relaxed);
            best
        })
    }

    /// The instruction set.
    pub(crate) fn isa(self) -> Isa {
        match self {
            Kernel::Scalar(_) => Isa::Scalar,
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon(_) => Isa::Neon,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot(_) => Isa::NeonDot,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm(_) => Isa::NeonI8mm,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni(_) => Isa::Avx512Vnni,
        }
    }
}

/// Code that the compiler would leave out of line as a closure.
pub(crate) trait Vectorized {
    /// The result.
    type Output;

    /// Does the work. Implementations, and what they call, are `#[inline(always)]`.
    fn run(self) -> Self::Output;
}

/// As [`vectorized`], for longer code.
pub(crate) fn run_vectorized<W: Vectorized>(kernel: Kernel, work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512<W: Vectorized>(work: W) -> W::Output {
            work.run()
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<W: Vectorized>(work: W) -> W::Output {
            work.run()
        }
        match kernel {
            // SAFETY: the variant proves the instruction sets.
            Kernel::Avx512Vnni(_) => return unsafe { avx512(work) },
            // SAFETY: the variants prove AVX2, FMA and F16C.
            Kernel::Avx2(_) | Kernel::Avx512(_) => return unsafe { avx2(work) },
            Kernel::Scalar(_) => {}
        }
    }
    // Elsewhere the baseline has vectors.
    let _ = kernel;
    work.run()
}

/// Runs plain code compiled for the active instruction set, so that the compiler vectorizes its loops with it.
pub(crate) fn vectorized<R>(kernel: Kernel, f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        fn avx512<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        match kernel {
            // SAFETY: the variant proves the instruction sets.
            Kernel::Avx512Vnni(_) => return unsafe { avx512(f) },
            // SAFETY: the variants prove AVX2, FMA and F16C.
            Kernel::Avx2(_) | Kernel::Avx512(_) => return unsafe { avx2(f) },
            Kernel::Scalar(_) => {}
        }
    }
    // Elsewhere the baseline has vectors.
    let _ = kernel;
    f()
}

/// The instruction set in use: the best of this processor, unless [`force_isa`] chose another.
pub fn active_isa() -> Isa {
    Kernel::active().isa()
}

/// Uses an instruction set from now on, in the whole process. For tests and comparisons.
///
/// # Errors
/// [`KernelError::IsaUnavailable`] if this processor or build does not have it; nothing changes then.
pub fn force_isa(isa: Isa) -> Result<()> {
    if Kernel::new(isa).is_none() {
        let available: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        return Err(KernelError::IsaUnavailable { name: isa.name(), available: available.join(", ") });
    }
    ACTIVE.store(isa as u8, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests;
