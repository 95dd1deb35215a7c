//! Static libraries: what processor and system their objects are for.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use object::read::archive::ArchiveFile;
use object::read::macho::{LoadCommandVariant, MachHeader};
use object::{Endianness, FileKind, Object, ObjectSymbol, macho};

/// What an object file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Platform {
    Ios,
    IosSimulator,
    MacOs,
    /// Another Apple system.
    OtherApple,
    /// Mach-O that names no system.
    Unnamed,
    Elf,
}

/// What a static library says about itself.
#[derive(Debug)]
pub(crate) struct Archive {
    /// Objects in it.
    pub(crate) objects: usize,
    /// Processors of its objects, as `object` names them.
    pub(crate) machines: BTreeSet<String>,
    pub(crate) platforms: BTreeSet<Platform>,
    /// Names of global symbols that it defines, without Mach-O's underscore.
    pub(crate) exported: BTreeSet<String>,
    /// Size of the file in bytes.
    pub(crate) bytes: u64,
}

impl Archive {
    /// # Errors
    /// No archive, or one with members that are no objects (compiler metadata is passed over).
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let data = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&data).with_context(|| format!("{} is no static library that can be read", path.display()))
    }

    fn parse(data: &[u8]) -> Result<Self> {
        let file = ArchiveFile::parse(data).map_err(|e| anyhow!("{e}"))?;
        let mut facts = Self {
            objects: 0,
            machines: BTreeSet::new(),
            platforms: BTreeSet::new(),
            exported: BTreeSet::new(),
            bytes: data.len() as u64,
        };
        for member in file.members() {
            let member = member?;
            let name = String::from_utf8_lossy(member.name()).into_owned();
            if name.ends_with(".rmeta") {
                continue;
            }
            facts.add(member.data(data)?).with_context(|| format!("its member {name}"))?;
        }
        ensure!(facts.objects > 0, "it has no objects");
        Ok(facts)
    }

    fn add(&mut self, data: &[u8]) -> Result<()> {
        let platform = match FileKind::parse(data)? {
            FileKind::MachO64 => platform(data)?,
            FileKind::Elf32 | FileKind::Elf64 => Platform::Elf,
            other => return Err(anyhow!("found {other:?}, expected Mach-O or ELF")),
        };
        let object = object::File::parse(data)?;
        self.objects += 1;
        self.platforms.insert(platform);
        self.machines.insert(format!("{:?}", object.architecture()).to_lowercase());
        for symbol in object.symbols().filter(|s| s.is_global() && !s.is_undefined()) {
            let name = symbol.name()?;
            let plain = if platform == Platform::Elf { name } else { name.strip_prefix('_').unwrap_or(name) };
            self.exported.insert(plain.to_owned());
        }
        Ok(())
    }

    /// # Errors
    /// An object is for another processor or system, or no symbol begins with `start`.
    pub(crate) fn expect(&self, machine: &str, platform: Platform, start: &str) -> Result<()> {
        ensure!(self.machines.iter().eq([machine]), "objects for {:?}, expected {machine} only", self.machines);
        // Compiler helpers written in assembly name no system.
        let other = self.platforms.iter().find(|p| **p != platform && **p != Platform::Unnamed);
        ensure!(
            other.is_none() && self.platforms.contains(&platform),
            "objects for {:?}, expected {platform:?}",
            self.platforms
        );
        ensure!(self.exported.iter().any(|s| s.starts_with(start)), "no symbol begins with {start}");
        Ok(())
    }
}

/// The system that a Mach-O object names.
fn platform(data: &[u8]) -> Result<Platform> {
    let header = macho::MachHeader64::<Endianness>::parse(data, 0)?;
    let endian = header.endian()?;
    let mut commands = header.load_commands(endian, data, 0)?;
    while let Some(command) = commands.next()? {
        match command.variant()? {
            LoadCommandVariant::BuildVersion(version, _) => {
                return Ok(match version.platform.get(endian) {
                    macho::PLATFORM_IOS => Platform::Ios,
                    macho::PLATFORM_IOSSIMULATOR => Platform::IosSimulator,
                    macho::PLATFORM_MACOS => Platform::MacOs,
                    _ => Platform::OtherApple,
                });
            }
            LoadCommandVariant::VersionMin(_) if command.cmd() == macho::LC_VERSION_MIN_IPHONEOS => {
                return Ok(Platform::Ios);
            }
            _ => {}
        }
    }
    Ok(Platform::Unnamed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_errors() {
        for data in [&b""[..], b"!<arch>\n", b"!<arch>\nabc", b"text"] {
            assert!(Archive::parse(data).is_err(), "{data:?}");
        }
    }
}
