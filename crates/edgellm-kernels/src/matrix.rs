//! Packed matrices on a device, and low-rank updates beside them.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType, Device, Int, Tensor, TensorData};

use crate::error::{KernelError, Result};
use crate::flex::Packed;
use crate::format::PackedLayout;
use crate::host::PackedHost;
use crate::ops;

/// A packed matrix on a device. Cloning shares the buffers.
///
/// Codes and scales are `u32` tensors of the shapes that the layout names. On the `flex` device they
/// wrap the host buffers (for example a memory map) without a copy. They are never tracked by autodiff and live on
/// the inner device.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    layout: PackedLayout,
    words: Tensor<2, Int>,
    scales: Tensor<2, Int>,
    device: Device,
    /// The buffers, on the CPU device.
    host: Option<Arc<Packed>>,
}

/// A low-rank update `scaling * B A` of a packed matrix (LoRA, arXiv 2106.09685, section 4.1).
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A`, `[rank, cols]`.
    pub a: Tensor<2>,
    /// `B`, `[rows, rank]`.
    pub b: Tensor<2>,
    /// `alpha / rank`.
    pub scaling: f32,
}

impl PackedHost {
    /// Puts the matrix on a device. An autodiff device stands for its inner device.
    ///
    /// # Panics
    /// If the public fields were changed so that the buffers no longer fit the layout.
    pub fn to_device(self, device: &Device) -> PackedMatrix {
        let device = if device.is_autodiff() { device.clone().inner() } else { device.clone() };
        let on_cpu = device == Device::flex();
        let this = if on_cpu { self } else { self.unprepare().expect("buffers that fit the layout") };
        let layout = this.layout;
        let words = u32_tensor(this.words, layout.words_shape(), &device);
        let scales = if layout.row_scale_words() == 0 {
            // Some devices have no empty buffers.
            u32_tensor(Bytes::from_elems(vec![0u32]), [1, 1], &device)
        } else {
            u32_tensor(this.scales, layout.scales_shape(), &device)
        };
        let host = on_cpu.then(|| {
            let primitive = |t: &Tensor<2, Int>| t.clone().try_into_primitive::<Flex>().expect("on the CPU device");
            Arc::new(Packed::new(primitive(&words), primitive(&scales), layout))
        });
        PackedMatrix { layout, words, scales, device, host }
    }
}

impl PackedMatrix {
    /// Shape and format.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// The (inner) device of the buffers.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// The buffers, if the matrix is on the CPU device.
    pub(crate) fn host(&self) -> Option<&Packed> {
        self.host.as_deref()
    }

    /// Copies the matrix back to the host.
    ///
    /// # Errors
    /// [`KernelError::ReadBack`] if the device fails.
    pub fn to_host(&self) -> Result<PackedHost> {
        let words = read_back(self.words.clone())?;
        let scales = if self.layout.row_scale_words() == 0 {
            Bytes::from_elems(Vec::<u32>::new())
        } else {
            read_back(self.scales.clone())?
        };
        PackedHost::from_parts(self.layout, words, scales)
    }

    /// The matrix on another device.
    ///
    /// # Errors
    /// [`KernelError::ReadBack`] if this matrix's device fails.
    pub fn to_device(&self, device: &Device) -> Result<PackedMatrix> {
        let target = if device.is_autodiff() { device.clone().inner() } else { device.clone() };
        if target == self.device {
            return Ok(self.clone());
        }
        Ok(self.to_host()?.to_device(&target))
    }

    /// All values, `[rows, cols]`, on the matrix's device.
    pub fn dequantize(&self) -> Tensor<2> {
        ops::dequantize(self)
    }

    pub(crate) fn parts(&self) -> (Tensor<2, Int>, Tensor<2, Int>) {
        (self.words.clone(), self.scales.clone())
    }
}

fn u32_tensor(bytes: Bytes, shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::from_bytes(bytes, shape, DType::U32), (device, DType::U32))
}

fn read_back(tensor: Tensor<2, Int>) -> Result<Bytes> {
    let data = tensor.try_into_data().map_err(|error| KernelError::ReadBack(error.to_string()))?;
    if data.dtype() != DType::U32 {
        return Err(KernelError::ReadBack(format!("expected u32 words, found {:?}", data.dtype())));
    }
    Ok(data.into_bytes())
}

#[cfg(test)]
mod tests {
    use burn::tensor::AllocationProperty;

    use super::*;
    use crate::Format;

    /// A matrix whose buffers are views into one shared buffer, as of a memory map.
    fn shared() -> (PackedHost, *const u8) {
        let layout = PackedLayout::new(3, 64, Format::parse("q4g32a").unwrap()).unwrap();
        let host = PackedHost::quantize(&[0.25; 192], layout).unwrap();
        let mut file = vec![0u8; 64];
        file.extend_from_slice(&host.words);
        file.extend_from_slice(&host.scales);
        let file = bytes::Bytes::from(file);
        let view = |range| Bytes::from_shared(file.slice(range), AllocationProperty::Native);
        let end = 64 + host.words.len();
        let host = PackedHost::from_parts(layout, view(64..end), view(end..file.len())).unwrap();
        (host, file[64..].as_ptr())
    }

    #[test]
    fn the_cpu_uses_shared_bytes_in_place() {
        let (host, address) = shared();
        let matrix = host.to_device(&Device::flex());
        let (words, _) = matrix.parts();
        let words = words.try_into_primitive::<Flex>().unwrap();
        assert_eq!(words.bytes().as_ptr(), address);
        assert_eq!(words.as_slice::<u32>().unwrap().len(), 3 * 8);
    }

    #[test]
    fn moving_between_devices() {
        let (host, _) = shared();
        let flex = Device::flex();
        let matrix = host.clone().to_device(&flex.clone().autodiff());
        assert_eq!(matrix.device(), flex, "the inner device");
        assert_eq!(matrix.to_device(&flex).unwrap().to_host().unwrap(), host);
        assert_eq!(matrix.layout(), host.layout);
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)]
        {
            let there = matrix.to_device(&Device::ndarray()).unwrap();
            assert_eq!(there.device(), Device::ndarray());
            assert_eq!(there.to_host().unwrap(), host);
        }
    }
}
