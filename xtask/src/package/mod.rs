//! What packages share: archives that are the same bytes for the same contents, and the bindings that go into them.

mod ar;
mod bindings;
mod deb;
mod tar;

pub(crate) use bindings::{c_header, generate, kotlin_classes};
pub(crate) use deb::{Control, write_deb};
pub(crate) use tar::{Entry, tar_gz};
