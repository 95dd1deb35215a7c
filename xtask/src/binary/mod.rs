//! What a built file says about itself, for the checks of packages: ELF programs and libraries, archives of Mach-O and ELF
//! objects. Read with the `object` crate; nothing is run.

mod archive;
mod elf;

pub(crate) use archive::{Archive, Platform};
pub(crate) use elf::{Elf, Glibc};
