//! Choosing the device by name: which Burn backend runs the decoder, and in which form weights are placed on it.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
use edgellm_model::decoder::{Activations, LoadOptions};

use crate::EdgeError;

/// A device as it is named on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best device of this build: `flex`, whose kernels read packed weights directly.
    #[default]
    Auto,
    /// The CPU through Burn's `flex` backend and this project's SIMD kernels (also called `cpu`).
    Flex,
    /// The CPU through Burn's `ndarray` backend: an independent second implementation (Cargo feature `ndarray`).
    NdArray,
    /// A GPU through wgpu (Cargo feature `wgpu`).
    Wgpu,
}

impl DeviceChoice {
    /// All devices that can be asked for by name, whether they are in this build or not.
    pub const ALL: [DeviceChoice; 3] = [DeviceChoice::Flex, DeviceChoice::NdArray, DeviceChoice::Wgpu];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DeviceChoice::Auto => "auto",
            DeviceChoice::Flex => "flex",
            DeviceChoice::NdArray => "ndarray",
            DeviceChoice::Wgpu => "wgpu",
        }
    }

    /// Whether this build contains the backend.
    pub fn is_compiled_in(self) -> bool {
        match self {
            DeviceChoice::Auto | DeviceChoice::Flex => true,
            DeviceChoice::NdArray => cfg!(feature = "ndarray"),
            DeviceChoice::Wgpu => cfg!(feature = "wgpu"),
        }
    }

    /// The device.
    ///
    /// # Errors
    /// The backend is not in this build, or it finds no device.
    pub fn device(self) -> Result<Device, EdgeError> {
        match self {
            DeviceChoice::Auto | DeviceChoice::Flex => Ok(Device::flex()),
            DeviceChoice::NdArray => ndarray(),
            DeviceChoice::Wgpu => wgpu(),
        }
    }

    /// How a decoder is loaded for this device: packed where the kernels read packed weights fast (flex), expanded to
    /// f32 elsewhere.
    ///
    /// # Errors
    /// See [`DeviceChoice::device`].
    pub fn load_options(self, activations: Activations) -> Result<LoadOptions, EdgeError> {
        let expand = !matches!(self, DeviceChoice::Auto | DeviceChoice::Flex);
        Ok(LoadOptions { device: self.device()?, expand, activations })
    }
}

#[cfg(feature = "ndarray")]
#[allow(deprecated, reason = "kept as an independent second implementation")]
fn ndarray() -> Result<Device, EdgeError> {
    Ok(Device::ndarray())
}

#[cfg(not(feature = "ndarray"))]
fn ndarray() -> Result<Device, EdgeError> {
    Err(EdgeError::DeviceNotBuilt { device: "ndarray" })
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Result<Device, EdgeError> {
    let found = Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec();
    if found.is_empty() {
        return Err(EdgeError::NoDevice { device: "wgpu" });
    }
    Ok(Device::wgpu(burn::tensor::DeviceKind::default()))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu() -> Result<Device, EdgeError> {
    Err(EdgeError::DeviceNotBuilt { device: "wgpu" })
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(DeviceChoice::Auto),
            "flex" | "cpu" => Ok(DeviceChoice::Flex),
            "ndarray" => Ok(DeviceChoice::NdArray),
            "wgpu" => Ok(DeviceChoice::Wgpu),
            other => Err(format!("'{other}' is no device; expected auto, flex (or cpu), ndarray or wgpu")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for choice in DeviceChoice::ALL {
            assert_eq!(choice.name().parse(), Ok(choice));
        }
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Flex));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert!("gpu".parse::<DeviceChoice>().unwrap_err().contains("expected auto, flex"));
    }

    #[test]
    fn a_device_that_is_not_built_names_its_feature() {
        for choice in DeviceChoice::ALL.into_iter().filter(|c| !c.is_compiled_in()) {
            let error = choice.device().unwrap_err().to_string();
            assert!(error.contains(&format!("--features {}", choice.name())), "{error}");
        }
        assert!(!DeviceChoice::Auto.load_options(Activations::Int8).unwrap().expand);
    }
}
