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
    /// What the system calls the device that it was measured on; none where figures were published, or in older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_on: Option<String>,
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

impl DeviceProfile {
    /// `source` of profiles that were measured.
    pub const MEASURED: &str = "measured by edgellm";

    /// Why times that are predicted with it may not be those of the device that is called `here`; `None` if it was measured
    /// there, or if nobody can tell.
    pub fn doubt(&self, here: &str) -> Option<String> {
        match &self.measured_on {
            Some(there) if there == here => None,
            Some(there) => {
                Some(format!("measured on '{there}', and this is '{here}': the times are those of '{there}'"))
            }
            None if self.source == Self::MEASURED => None,
            None => Some(format!("its figures were not measured by us ({}): the times are estimates", self.source)),
        }
    }
}

impl Value for DeviceProfile {
    const KIND: &'static str = "device profile";
    const VERSION: u32 = 2;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_of_another_device_is_doubted() {
        let profile = |source: &str, measured_on: Option<&str>| DeviceProfile {
            format_version: DeviceProfile::VERSION,
            name: "mine".into(),
            source: source.into(),
            measured_on: measured_on.map(str::to_owned),
            cores: Vec::new(),
            read_gbps: Vec::new(),
            handover_us: 0.0,
            usable_bytes: 0,
            decode: Vec::new(),
            storage: Vec::new(),
        };
        let doubt = |source: &str, on: Option<&str>| profile(source, on).doubt("phone");
        assert_eq!(doubt(DeviceProfile::MEASURED, Some("phone")), None);
        assert_eq!(doubt(DeviceProfile::MEASURED, None), None, "an older file");
        assert!(
            doubt(DeviceProfile::MEASURED, Some("laptop"))
                .unwrap()
                .contains("measured on 'laptop', and this is 'phone'")
        );
        assert!(doubt("a data sheet", None).unwrap().contains("not measured by us (a data sheet)"));
    }
}
