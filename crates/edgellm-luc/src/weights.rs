//! The f32 values of a model's weights on the host, whole matrices or a range of rows.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use edgellm_kernels::{InputGram, PackedHost};
use edgellm_model::decoder::{Block, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::traits::Compressor;
use edgellm_model::values::{LayerFormat, Projection};

use crate::error::{LucError, Result};

/// A weight matrix whose rows can be read on the host as f32.
pub(crate) enum HostWeight {
    Packed(PackedHost),
    Dense(Tensor<2>),
}

impl HostWeight {
    pub(crate) fn new(weight: &Weight) -> Result<Self> {
        Ok(match weight {
            Weight::Packed(matrix) => Self::Packed(matrix.to_host()?),
            Weight::Dense(tensor) => Self::Dense(tensor.clone()),
        })
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(host) => [host.layout.rows, host.layout.cols],
            Self::Dense(tensor) => tensor.dims(),
        }
    }

    /// The values of some rows, row-major.
    pub(crate) fn rows(&self, range: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Packed(host) if range == (0..host.layout.rows) => Ok(host.dequantize()),
            Self::Packed(host) => {
                let cols = host.layout.cols;
                let mut out = vec![0.0; range.len() * cols];
                for (row, out) in range.zip(out.chunks_mut(cols)) {
                    host.dequantize_row(row, out);
                }
                Ok(out)
            }
            Self::Dense(tensor) => Ok(to_vec(tensor.clone().narrow(0, range.start, range.len()))?),
        }
    }

    pub(crate) fn values(&self) -> Result<Vec<f32>> {
        self.rows(0..self.shape()[0])
    }
}

/// A matrix of host values as a tensor.
pub(crate) fn tensor(values: Vec<f32>, [rows, cols]: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, [rows, cols]), device)
}

/// A block whose projections are f32 tensors, with the same values on the host. Formats are compared on these, so that
/// the arithmetic of the packed kernels takes no part in the comparison.
pub(crate) struct DenseBlock {
    pub(crate) block: Block,
    pub(crate) values: [Vec<f32>; 7],
}

impl DenseBlock {
    pub(crate) fn new(block: &Block, device: &Device) -> Result<Self> {
        let mut block = block.clone();
        let mut values: [Vec<f32>; 7] = Default::default();
        for (linear, values) in block.linears.iter_mut().zip(&mut values) {
            let host = HostWeight::new(&linear.weight)?;
            *values = host.values()?;
            linear.weight = Weight::Dense(tensor(values.clone(), host.shape(), device));
        }
        Ok(Self { block, values })
    }

    /// Checks that no weight is NaN or infinite.
    pub(crate) fn check_finite(&self, index: usize) -> Result<()> {
        Projection::ALL.iter().zip(&self.values).try_for_each(|(p, values)| check_finite(&p.weight_name(index), values))
    }

    /// The block with the given projections compressed to `format`.
    pub(crate) fn with_format<'a>(
        &self,
        projections: &[Projection],
        format: &LayerFormat,
        compressor: &dyn Compressor,
        inputs: impl Fn(Projection) -> Option<&'a InputGram>,
        device: &Device,
    ) -> Result<Block> {
        let mut block = self.block.clone();
        for &projection in projections {
            let linear = block.linear_mut(projection);
            let [rows, cols] = linear.weight.shape();
            let packed =
                compressor.compress(&self.values[projection as usize], rows, cols, format, inputs(projection))?;
            linear.weight = Weight::Dense(tensor(packed.dequantize(), [rows, cols], device));
        }
        Ok(block)
    }
}

/// Checks the values of a tensor.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(LucError::Weights { tensor: tensor.to_owned(), at, value: values[at] }),
    }
}
