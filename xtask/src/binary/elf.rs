//! ELF programs and shared libraries: processor, page alignment, needed libraries, exported symbols, glibc floor.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use object::read::elf::{FileHeader, ProgramHeader, SectionTable};
use object::{Endianness, FileKind, elf};

/// A version of the GNU C library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Glibc(pub(crate) u32, pub(crate) u32);

impl fmt::Display for Glibc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Glibc {
    /// From a version's name, such as `GLIBC_2.34`; patch levels are ignored.
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("GLIBC_")?.split('.').map(|p| p.parse().ok());
        Some(Self(parts.next()??, parts.next()??))
    }
}

/// What an ELF file says about itself.
#[derive(Debug)]
pub(crate) struct Elf {
    /// The processor: `aarch64`, `x86-64`, `arm`, or its number.
    pub(crate) machine: String,
    /// Smallest alignment of a loaded segment, in bytes.
    pub(crate) page: u64,
    /// Names of the libraries that it is linked to.
    pub(crate) needed: Vec<String>,
    /// Names of the symbols that others may use.
    pub(crate) exported: Vec<String>,
    /// The oldest glibc that has everything it uses, if it uses any.
    pub(crate) glibc: Option<Glibc>,
    /// Size of the file in bytes.
    pub(crate) bytes: u64,
}

impl Elf {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let data = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&data).with_context(|| format!("{} is no ELF file that can be read", path.display()))
    }

    /// # Errors
    /// Bytes that are no ELF file, or one whose tables do not hold together.
    pub(crate) fn parse(data: &[u8]) -> Result<Self> {
        match FileKind::parse(data).map_err(|e| anyhow!("{e}"))? {
            FileKind::Elf32 => facts::<elf::FileHeader32<Endianness>>(data),
            FileKind::Elf64 => facts::<elf::FileHeader64<Endianness>>(data),
            other => Err(anyhow!("found {other:?}")),
        }
    }

    /// # Errors
    /// The processor is another one.
    pub(crate) fn expect_machine(&self, wanted: &str) -> Result<()> {
        ensure!(self.machine == wanted, "built for {}, expected {wanted}", self.machine);
        Ok(())
    }

    /// # Errors
    /// A loaded segment is aligned to less than `page` bytes.
    pub(crate) fn expect_page(&self, page: u64) -> Result<()> {
        ensure!(self.page >= page, "segments are aligned to {} bytes, expected {page} or more", self.page);
        Ok(())
    }

    /// # Errors
    /// It needs a library that is not among `allowed`.
    pub(crate) fn expect_needed(&self, allowed: &[&str]) -> Result<()> {
        let other = self.needed.iter().find(|name| !allowed.contains(&name.as_str()));
        ensure!(other.is_none(), "needs {}, expected only {}", other.map_or("", |s| s), allowed.join(", "));
        Ok(())
    }

    /// # Errors
    /// It exports no symbol that begins like this.
    pub(crate) fn expect_export(&self, start: &str) -> Result<()> {
        let n = self.exported.len();
        ensure!(
            self.exported.iter().any(|s| s.starts_with(start)),
            "none of its {n} exported symbols begins with {start}"
        );
        Ok(())
    }
}

fn facts<H: FileHeader<Endian = Endianness>>(data: &[u8]) -> Result<Elf> {
    let header = H::parse(data)?;
    let endian = header.endian()?;
    let machine = match header.e_machine(endian) {
        elf::EM_AARCH64 => "aarch64".to_owned(),
        elf::EM_X86_64 => "x86-64".to_owned(),
        elf::EM_ARM => "arm".to_owned(),
        other => format!("processor {other:?}"),
    };
    let segments = header.program_headers(endian, data)?;
    let loaded = segments.iter().filter(|s| s.p_type(endian) == elf::PT_LOAD);
    let page = loaded.map(|s| s.p_align(endian).into()).min().context("no segment is loaded")?;
    let sections = header.sections(endian, data)?;
    Ok(Elf {
        machine,
        page,
        needed: needed::<H>(&sections, endian, data)?,
        exported: exported::<H>(&sections, endian, data)?,
        glibc: glibc::<H>(&sections, endian, data)?,
        bytes: data.len() as u64,
    })
}

fn needed<H: FileHeader<Endian = Endianness>>(
    sections: &SectionTable<'_, H>,
    endian: Endianness,
    data: &[u8],
) -> Result<Vec<String>> {
    let table = sections.dynamic_table(endian, data)?;
    let wanted = table.iter().filter(|entry| entry.tag == elf::DT_NEEDED);
    wanted.map(|entry| Ok(String::from_utf8_lossy(table.string(entry)?).into_owned())).collect()
}

fn exported<H: FileHeader<Endian = Endianness>>(
    sections: &SectionTable<'_, H>,
    endian: Endianness,
    data: &[u8],
) -> Result<Vec<String>> {
    use object::read::elf::Sym;
    let table = sections.symbols(endian, data, elf::SHT_DYNSYM)?;
    let own = table.iter().filter(|s| s.st_shndx(endian) != elf::SHN_UNDEF && s.st_bind() != elf::STB_LOCAL);
    own.map(|s| Ok(String::from_utf8_lossy(s.name(endian, table.strings())?).into_owned())).collect()
}

fn glibc<H: FileHeader<Endian = Endianness>>(
    sections: &SectionTable<'_, H>,
    endian: Endianness,
    data: &[u8],
) -> Result<Option<Glibc>> {
    let Some((mut files, link)) = sections.gnu_verneed(endian, data)? else { return Ok(None) };
    let strings = sections.strings(endian, data, link)?;
    let mut floor = None;
    while let Some((_, mut versions)) = files.next()? {
        while let Some(version) = versions.next()? {
            let name = String::from_utf8_lossy(version.name(endian, strings)?).into_owned();
            floor = floor.max(Glibc::parse(&name));
        }
    }
    Ok(floor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number() {
        assert_eq!(Glibc::parse("GLIBC_2.2.5"), Some(Glibc(2, 2)));
        assert_eq!(Glibc::parse("GCC_3.0"), None);
        assert!(Glibc(2, 4) < Glibc(2, 34));
        assert_eq!(Glibc(2, 34).to_string(), "2.34");
    }

    #[test]
    fn this_program_says_what_it_is() {
        let facts = Elf::read(&std::env::current_exe().unwrap()).unwrap();
        facts.expect_machine(if cfg!(target_arch = "x86_64") { "x86-64" } else { "aarch64" }).unwrap();
        assert!(facts.needed.iter().any(|n| n.starts_with("libc.so")), "{:?}", facts.needed);
        assert!(facts.glibc.unwrap() >= Glibc(2, 2));
        facts.expect_page(4096).unwrap();
        assert!(facts.expect_page(1 << 30).unwrap_err().to_string().contains("expected 1073741824"));
        assert!(facts.expect_needed(&["libz.so"]).is_err());
    }

    #[test]
    fn damaged_files_are_errors() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for data in [&b""[..], b"text", &whole[..64], &whole[..whole.len() / 2]] {
            assert!(Elf::parse(data).is_err());
        }
    }
}
