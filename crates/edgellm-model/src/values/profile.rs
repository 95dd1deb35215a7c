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

/// The time of products of one token with packed weights of one format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FormatRate {
    /// Name of the packed format, such as `q4g32a`.
    pub format: String,
    /// Nanoseconds for a weight (a pruned one counts too), reading included.
    pub ns_per_weight: f64,
}

/// How a number of threads decodes: what a token costs in products with packed weights, and beside them.
///
/// `ms = sum over matrices of weights * ns_per_weight + blocks * (block_us + block_value_ns * values +
/// attention_ns * query size * context) + token_us + logit_ns * vocabulary`, in one unit of time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecodeRates {
    /// Threads.
    pub threads: usize,
    /// Of a block, whatever its size: parallel regions and calls, in microseconds.
    pub block_us: f64,
    /// Of a block, for each value of its activations, in nanoseconds: norms, rotation, rounding, gating.
    pub block_value_ns: f64,
    /// Of a block's attention, for each query value and cached token, in nanoseconds.
    pub attention_ns: f64,
    /// Of a token, outside blocks, in microseconds.
    pub token_us: f64,
    /// Of a token, for each entry of the vocabulary, in nanoseconds.
    pub logit_ns: f64,
    /// Products, by format.
    pub formats: Vec<FormatRate>,
}

/// How fast storage is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StorageRate {
    /// Requests at once.
    pub requests: usize,
    /// Sequential reads of 4 MiB past the system's cache, in GB/s (1e9 bytes).
    pub gbps: f64,
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
    /// Decoding with 1, 2, ... threads; empty if only published figures are known.
    #[serde(default)]
    pub decode: Vec<DecodeRates>,
    /// Reading from storage; empty if it was not measured, or the system does not read past its cache.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub storage: Vec<StorageRate>,
}

impl Value for DeviceProfile {
    const KIND: &'static str = "device profile";
    const VERSION: u32 = 2;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}
