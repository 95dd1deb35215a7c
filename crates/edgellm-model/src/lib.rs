//! Model I/O and the decoder.
//!
//! [`files::ModelFiles`] opens a Hugging Face directory, a compressed directory or a GGUF file by memory map;
//! [`decoder::Decoder`] runs it: one implementation for every Llama-like architecture, with early exits, a key-value
//! cache and low-rank adapters. [`values`] and [`traits`] are where the crates above meet.
#![deny(unsafe_code)]

pub mod adapter;
pub mod arch;
pub mod chat;
pub mod config;
pub mod data;
pub mod decoder;
mod error;
pub mod files;
pub mod generate;
pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
pub mod io;
pub mod rope;
pub mod safetensors;
pub mod sample;
pub mod save;
pub mod spans;
pub mod synth;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;
pub mod traits;
pub mod values;

pub use error::{ModelError, Result};
