//! What a device can do, as measured or published figures.

use serde::{Deserialize, Serialize};

use super::Value;

/// Cores of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoreKind {
    /// Name, such as `performance` or `efficiency`.
    pub name: String,
    /// Number of cores.
    pub count: usize,
    /// f32 multiply-adds per second of one core, in units of 1e9.
    pub gmacs_f32: f64,
}

/// A device profile: the cost model's only knowledge of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// Version of this file format.
    pub format_version: u32,
    /// Name of the device.
    pub name: String,
    /// Where the figures come from: `measured by edgellm` or a citation.
    pub source: String,
    /// Cores by kind, fastest first.
    pub cores: Vec<CoreKind>,
    /// Read bandwidth of main memory with 1, 2, ... threads, in GB/s (1e9 bytes).
    pub read_gbps: Vec<f64>,
    /// Time to start and join one parallel region, in microseconds.
    pub handover_us: f64,
    /// Memory that a process may use, in bytes.
    pub usable_bytes: u64,
}

impl Value for DeviceProfile {
    const KIND: &'static str = "device profile";
    const VERSION: u32 = 1;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}
