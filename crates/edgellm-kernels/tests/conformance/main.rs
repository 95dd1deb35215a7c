//! One suite for every device: each operator, on every packed format of the registry and on ragged shapes, forward
//! and gradient, against an independent double-precision reference on the host. Gradients are compared with central
//! finite differences of that reference.
//!
//! `devices()` decides what is present; `cargo test -- --nocapture` shows which devices ran and which did not, and
//! why.
#![allow(clippy::print_stderr)]

mod check;
mod devices;
mod gradients;
mod layers;
mod packed;
mod reference;
mod threads;
