//! Plain values that the crates above exchange: formats, units, policies, measurements, device profiles.
//!
//! They are serde types with a format version, written as TOML or JSON by file extension, and contain nothing that
//! depends on the machine or the time: the same inputs and seed give the same bytes.

mod file;
mod format;
mod measurement;
mod policy;
mod profile;
mod unit;

pub use file::{Value, read_value, write_value};
pub use format::{LayerFormat, Pattern, Scales};
pub use measurement::{Measurement, UnitMeasurement};
pub use policy::{Budget, CompressionPolicy, UnitPolicy};
pub use profile::{CoreKind, DecodeRates, DeviceProfile, FormatRate, StorageRate};
pub use unit::{Granularity, MatrixShape, Projection, Unit};
