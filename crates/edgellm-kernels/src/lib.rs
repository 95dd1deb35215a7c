//! Tensor kernels of EdgeLLM: what packed low-bit weights mean, how to quantize and pack them, and the operators of
//! a decoder on them, for the CPU (SIMD) and the GPU, with gradients.
//!
//! - [`Format`], [`PackedLayout`], [`PackedHost`]: formats, and matrices on the host (quantize, pack, decode).
//! - [`PackedMatrix`]: a packed matrix on a Burn device.
//! - [`packed_linear`], [`packed_embedding`], [`rms_norm`], [`rope`], [`attention`], [`swiglu`],
//!   [`cross_entropy_head`]: the operators, on tensors of any device, plain or autodiff.
//! - [`kernels`], [`active_isa`], [`force_isa`]: which code runs.
//!
//! The operators are one Burn backend extension, [`EdgeOps`]. Its default bodies in Burn primitives define each
//! operator and run on every backend; the CPU backend `Flex` overrides them. Activations are `f32`.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use edgellm_kernels::{Format, PackedHost, PackedLayout, packed_linear};
//!
//! let device = Device::flex();
//! let values: Vec<f32> = (0..8 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let layout = PackedLayout::new(8, 64, Format::parse("q4g32a")?)?;
//! let weight = PackedHost::quantize(&values, layout)?.to_device(&device);
//!
//! let tracked = device.autodiff();
//! let x = Tensor::<2>::ones([2, 64], &tracked).require_grad();
//! let y = packed_linear(x.clone(), &weight, None);
//! assert_eq!(y.dims(), [2, 8]);
//! let grads = y.sum().backward();
//! assert_eq!(x.grad(&grads).unwrap().dims(), [2, 64]);
//! # Ok::<(), edgellm_kernels::KernelError>(())
//! ```

#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("packed words are little-endian on disk and are used in place");

#[allow(unsafe_code)]
mod arch;
mod error;
mod flex;
mod format;
mod host;
mod matrix;
mod ops;
mod panels;

pub use arch::pool::{set_threads, threads};
pub use arch::{Ceilings, Isa, active_isa, force_isa, measure_ceilings};
pub use error::{KernelError, Result};
pub use flex::{
    BlockCache, BlockGradients, BlockLinear, BlockScratch, BlockTape, BlockView, CacheType, Dropout, HEAD_CHUNK,
    HeadLoss, HeadView, KernelInfo, LoraGradient, decoder_block, decoder_block_backward, decoder_block_recorded,
    decoder_block_uncached, head_divergence, head_loss, kernels, log_softmax_row,
};
pub use format::{
    Arrangement, Compensation, FAMILIES, Family, Format, GroupValues, InputGram, PackedLayout, QuantFormat,
    RoundingGoal, ScaleType, SparsePattern, TrainableMatrix, prune_compensated,
};
pub use host::PackedHost;
pub use matrix::{Lora, PackedMatrix};
pub use ops::{
    AttentionParams, EdgeOps, attention, cross_entropy_head, dequantize, packed_embedding, packed_linear, rms_norm,
    rope, swiglu,
};
