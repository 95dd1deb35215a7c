//! Products of prepared matrices with activations of 8 bits, by integer dot products.
//!
//! The kernels are written once, in `kernels`, over a small vocabulary of operations on 16 lanes of four bytes
//! ([`Vector`]) that each instruction set provides. For a panel of 16 rows, a token and a block of 32 columns,
//!
//! `sum_k w[r,k] x[k] = scale[r] xs sum_k q[r,k] xq[k] + min[r] xs sum_k xq[k]`:
//!
//! eight dot-product instructions, a conversion, and three multiplications per 512 weights.
//!
//! *Few tokens*: codes are unpacked in registers and used at once. *Many tokens*: a panel is unpacked into a buffer
//! that stays in the first-level cache and is used for a tile of tokens at a time, whose sums stay in registers.
//! *Backward* (`dX = dY W`): the sum runs over the rows, whose scales differ, so the codes of 32 rows and 32 columns are
//! rounded to 8 bits with a common scale (as in Jetfire, arXiv 2403.12422, section 4), transposed, and used in the same way; `dY`
//! is rounded to 8 bits per token and 32 rows.

mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
mod kernels;
mod low_rank;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
mod scalar;
#[cfg(test)]
mod tests;
mod tokens;

use super::Kernel;
pub(crate) use attend::{Attend, Elements, KEYS, softmax};
pub(crate) use kernels::{Part, Task};
pub(crate) use low_rank::LowRank;
use tokens::TileMut;
pub(crate) use tokens::Tokens8;

/// Bytes of an unpacked block of a panel: 32 columns of 16 rows.
const BLOCK_BYTES: usize = 512;

/// For a mask's byte, which of the next bytes goes to each of eight places; 128 where the bit is not set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static PLACES: [[u8; 8]; 256] = {
    let mut table = [[128; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut place, mut next) = (0, 0);
        while place < 8 {
            if mask >> place & 1 == 1 {
                table[mask][place] = next;
                next += 1;
            }
            place += 1;
        }
        mask += 1;
    }
    table
};

/// Evaluates an expression with the integer kernels of a [`Kernel`].
macro_rules! with_kernels {
    ($kernel:expr, $isa:ident => $body:expr) => {
        match $kernel {
            Kernel::Scalar($isa) => $body,
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon($isa) => $body,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot($isa) => $body,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm($isa) => $body,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2($isa) => $body,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(isa) => {
                let $isa = isa.avx2();
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni($isa) => $body,
        }
    };
}

impl Task<'_, '_> {
    /// Computes the task.
    ///
    /// # Panics
    /// If its shapes disagree.
    pub(crate) fn run(self, kernel: Kernel) {
        with_kernels!(kernel, isa => kernels::run(isa, self));
    }
}

impl Attend<'_> {
    /// Computes the attention.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub(crate) fn run(mut self, kernel: Kernel) {
        self.check();
        with_kernels!(kernel, isa => kernels::Entry::attend(isa, &mut self));
    }
}

impl LowRank<'_> {
    /// Computes the product.
    ///
    /// # Panics
    /// If the shapes disagree.
    pub(crate) fn run(mut self, kernel: Kernel) {
        self.check();
        with_kernels!(kernel, isa => kernels::Entry::low_rank(isa, &mut self));
    }
}

impl TileMut<'_> {
    fn fill(&mut self, kernel: Kernel, x: &[f32], cols: usize) {
        with_kernels!(kernel, isa => kernels::Entry::round_tile(isa, self, x, cols));
    }
}

/// Tokens of a tile, as [`Tokens8::new`] wants them for many tokens.
pub(crate) fn tile_width(kernel: Kernel) -> usize {
    fn of<L: Vector>(_: L) -> usize {
        L::TILE
    }
    with_kernels!(kernel, isa => of(isa))
}

/// The operations of an instruction set on sixteen lanes of four bytes, of one integer, or of one float.
///
/// # Safety
/// Functions may only be called where the processor has the instruction set, inside a function compiled for it.
/// Pointers must be valid for the bytes that each function names; no alignment is needed.
pub(super) unsafe trait Vector: Copy {
    /// Sixteen times four bytes.
    type V: Copy;
    /// Sixteen 32-bit integers.
    type I: Copy;
    /// Sixteen floats.
    type F: Copy;
    /// Tokens whose sums fit the registers.
    const TILE: usize;
    /// What `centre` subtracts from a byte.
    const BIAS: u32;

    /// Asks for a cache line, which need not exist.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}
    /// 64 bytes.
    unsafe fn load(p: *const u8) -> Self::V;
    /// 64 bytes.
    unsafe fn store(p: *mut u8, v: Self::V);
    /// Shifts by 0 to 7 bits, to the right or to the left, and masks every byte; bits that cross bytes are masked away.
    unsafe fn bits(v: Self::V, right: u32, left: u32, mask: u8) -> Self::V;
    /// Bitwise or.
    unsafe fn or(a: Self::V, b: Self::V) -> Self::V;
    /// Bytes of 0 to 255 as `dot` expects them: minus [`Self::BIAS`].
    unsafe fn centre(v: Self::V) -> Self::V;
    /// Adds to each lane the dot product of its four bytes with the four signed bytes at `x`. Bytes of `v` may use
    /// all 8 bits if `wide` (a constant after inlining); otherwise they are below 64.
    unsafe fn dot(acc: Self::I, v: Self::V, x: *const u32, wide: bool) -> Self::I;
    /// The dot products of `N` quads of a block, 8 or 4, from quad `first` on, with those of `T` tokens at `x`:
    /// `[quad][token]`. Quads are asked for once, in order. An instruction set that adds products of 16 bits can add
    /// several quads' there.
    #[inline(always)]
    unsafe fn sum<S: kernels::Source<Self>, const T: usize, const N: usize>(
        source: &S,
        block: usize,
        first: usize,
        x: *const u32,
    ) -> [Self::I; T] {
        macro_rules! step {
            ($acc:ident, $($quad:literal)*) => { $(
                let v = source.quad(block, first + $quad);
                for t in 0..T {
                    $acc[t] = Self::dot($acc[t], v, x.add($quad * T + t), S::BITS == 8);
                }
            )* };
        }
        // SAFETY: the trait's contract; the block exists.
        unsafe {
            let mut acc = [Self::zero(); T];
            step!(acc, 0 1 2 3);
            if N == 8 {
                step!(acc, 4 5 6 7);
            }
            acc
        }
    }
    /// The bytes from `p` on, in order, at the places of the mask's set bits, and `fill` elsewhere. 64 bytes at `p` are
    /// readable.
    #[inline(always)]
    unsafe fn expand(p: *const u8, mask: u64, fill: u8) -> Self::V {
        let mut bytes = [fill; 64];
        let (mut left, mut at) = (mask, p);
        while left != 0 {
            // SAFETY: the function's contract: at most 64 bits are set.
            unsafe {
                bytes[left.trailing_zeros() as usize] = *at;
                at = at.add(1);
            }
            left &= left - 1;
        }
        // SAFETY: 64 bytes, and the trait's contract.
        unsafe { Self::load(bytes.as_ptr()) }
    }
    /// Zeros.
    unsafe fn zero() -> Self::I;
    /// To floats.
    unsafe fn to_f(v: Self::I) -> Self::F;
    /// To the nearest integers.
    unsafe fn round(v: Self::F) -> Self::I;
    /// Sum of the lanes.
    unsafe fn total(v: Self::I) -> i32;
    /// Writes integers of -128 to 127 as sixteen bytes.
    unsafe fn store_i8(p: *mut u8, v: Self::I);
    /// Byte `i` of every lane, as 0 to 255.
    unsafe fn byte(v: Self::V, i: u32) -> Self::I;
    /// Lanes of four bytes from the low bytes of integers of 0 to 255.
    unsafe fn pack(v: [Self::I; 4]) -> Self::V;
    /// With `v[i]` lane `4 a + b` byte `c` the element of row `4 a + b`, column `4 i + c`: result `a` has it in lane
    /// `4 i + c`, byte `b`.
    unsafe fn transpose(v: [Self::V; 4]) -> [Self::V; 4];
    /// Sixteen floats.
    unsafe fn load_f(p: *const f32) -> Self::F;
    /// Sixteen floats.
    unsafe fn store_f(p: *mut f32, v: Self::F);
    /// Sixteen signed bytes, as floats.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// Sixteen bytes of 0 to 255, as floats.
    unsafe fn load_u8(p: *const u8) -> Self::F;
    /// Sixteen half-precision floats: 32 bytes.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// All lanes the same.
    unsafe fn splat(value: f32) -> Self::F;
    /// `a + b`.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// The larger one, lane by lane.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// Absolute values.
    unsafe fn abs(v: Self::F) -> Self::F;
    /// The largest lane.
    unsafe fn largest(v: Self::F) -> f32;
    /// `a * b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The same of one lane, rounded in the same way.
    #[inline(always)]
    fn fma_one(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}
