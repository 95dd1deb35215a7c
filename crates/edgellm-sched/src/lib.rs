//! Hardware scheduler: what a device can do ([`measure_profile`]), what a unit of a model costs on it ([`Roofline`]), and
//! running a model that is larger than memory ([`stream`]).
//!
//! The profile is a plain value, [`DeviceProfile`](edgellm_model::values::DeviceProfile), measured on the device itself or
//! written from published figures; the cost model knows nothing else of the device.
//!
//! ```
//! use edgellm_model::traits::{CostModel, Workload};
//! use edgellm_model::values::{CoreKind, DeviceProfile, LayerFormat, MatrixShape, Value};
//! use edgellm_sched::Roofline;
//!
//! let profile = DeviceProfile {
//!     format_version: DeviceProfile::VERSION,
//!     name: "a phone".into(),
//!     source: "made up".into(),
//!     measured_on: None,
//!     cores: vec![CoreKind { name: "performance".into(), count: 4, gmacs_f32: 10.0 }],
//!     read_gbps: vec![8.0, 12.0, 16.0, 16.0],
//!     handover_us: 5.0,
//!     usable_bytes: 4_000_000_000,
//!     decode: Vec::new(),
//!     storage: Vec::new(),
//! };
//! let model = Roofline::new(profile)?;
//! let matrix = [MatrixShape { name: "w".into(), rows: 2048, cols: 2048 }];
//! let four = model.cost(&matrix, &LayerFormat::quantized(4, 32, false), Workload::Forward { tokens: 1 })?;
//! let eight = model.cost(&matrix, &LayerFormat::quantized(8, 32, false), Workload::Forward { tokens: 1 })?;
//! assert!(four.milliseconds < eight.milliseconds && four.bytes < eight.bytes);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod decode;
mod error;
mod measure;
mod probe;
mod roofline;
mod storage;
pub mod stream;
mod system;

pub use error::{Result, SchedError};
pub use measure::{ProfileRequest, measure_profile};
pub use roofline::{Roofline, buffer_bytes};
pub use system::{device_name, usable_bytes};
