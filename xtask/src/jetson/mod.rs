//! `cargo xtask build-jetson`: the command and the shared library for Linux on aarch64, tuned for Orin's processor, as a
//! tarball and as a Debian package, with the oldest glibc that they need.

#[cfg(test)]
mod tests;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, ValueEnum};
use xshell::cmd;

use crate::android::{FFI, FFI_SYMBOLS};
use crate::binary::{Elf, Glibc};
use crate::package::{Control, Entry, c_header, tar_gz, write_deb};
use crate::repo;
use crate::repo::has_program;
use crate::toolchain::{Build, HOST, Profile};

pub(crate) use crate::cross::TARGET;
use crate::cross::{EMULATOR, SYSROOT};
pub(crate) const LINKER: &str = "aarch64-linux-gnu-gcc";
const LIBRARY: &str = "libedgellm_ffi.so";
/// Bytes of the stripped library without a GPU, at most.
const LIBRARY_BYTES: u64 = 12_000_000;
/// What JetPack 6 has.
const NEWEST_GLIBC: &str = "2.35";
/// The system's libraries that ours may need, and the packages that hold them.
const SYSTEM: [(&str, &str); 6] = [
    ("libc.so.6", "libc6"),
    ("libm.so.6", "libc6"),
    ("libdl.so.2", "libc6"),
    ("libpthread.so.0", "libc6"),
    ("ld-linux-aarch64.so.1", "libc6"),
    ("libgcc_s.so.1", "libgcc-s1"),
];

/// Which processors the whole program may assume; our kernels choose by what is present in any case.
#[derive(Clone, Copy, ValueEnum)]
enum Cpu {
    /// Orin and later (Cortex-A78AE): dot products and half precision
    Orin,
    /// Every 64-bit ARM, such as the first Jetson Nano
    Generic,
}

/// Builds the command and the library for Jetson boards and other Linux on aarch64.
#[derive(Args)]
pub(crate) struct BuildJetson {
    /// The processor that is assumed
    #[arg(long, value_enum, default_value = "orin")]
    cpu: Cpu,
    /// Also compute on the GPU, through Vulkan
    #[arg(long)]
    gpu: bool,
    /// The newest glibc that may be needed; JetPack 6 has 2.35
    #[arg(long, value_name = "VERSION", default_value = NEWEST_GLIBC)]
    glibc: String,
    /// Build quickly instead of for shipping
    #[arg(long)]
    fast: bool,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = "dist/jetson")]
    out: PathBuf,
}

/// What was built.
struct Built {
    library: Elf,
    floor: Glibc,
    deb: PathBuf,
}

impl BuildJetson {
    pub(crate) fn run(&self) -> Result<()> {
        let limit = parse(&self.glibc).unwrap_or_else(|error| crate::usage(&error));
        self.make(limit).map(drop)
    }

    /// Builds, checks and packs; the files may need no glibc later than `limit`.
    fn make(&self, limit: Glibc) -> Result<Built> {
        let build = self.build()?;
        println!("{TARGET}: {}", build.toolchain.describe());
        let out = repo::root()?.join(&self.out);
        fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
        let command = keep(&build.binary("edgellm")?, &out.join("edgellm"))?;
        let library = keep(&build.library(FFI, "cdylib")?, &out.join(LIBRARY))?;
        let (of_command, of_library) = (check(&command)?, check(&library)?);
        of_library.expect_export(FFI_SYMBOLS)?;
        let floor = of_command.glibc.max(of_library.glibc).context("neither file needs any glibc")?;
        ensure!(
            floor <= limit,
            "the result needs glibc {floor}, more than {limit}; build on a system with an older glibc, or say --glibc {floor}"
        );
        for (path, elf) in [(&command, &of_command), (&library, &of_library)] {
            let (mb, needs) = (elf.bytes as f64 / 1e6, elf.needed.join(" "));
            println!("  {}: {mb:.1} MB, needs {needs}", path.display());
        }
        println!("  needs glibc {floor} or later (JetPack 6 has 2.35, JetPack 5 has 2.31)");
        let deb = self.pack(&out, floor, &fs::read(&command)?, &fs::read(&library)?)?;
        Ok(Built { library: of_library, floor, deb })
    }

    fn build(&self) -> Result<Build<'static>> {
        let profile = if self.fast { Profile::Release } else { Profile::Dist };
        let mut build = Build::new(TARGET, profile)?;
        if HOST != TARGET {
            ensure!(
                has_program(LINKER),
                "no {LINKER}, which links for {TARGET}; on Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
            );
            build = build.target_env("LINKER", LINKER);
        }
        if let Cpu::Orin = self.cpu {
            build = build.target_env("RUSTFLAGS", "-Ctarget-feature=+dotprod,+fp16,+lse,+rcpc");
        }
        if self.gpu {
            build = build.features(&["edgellm/vulkan"]);
        }
        Ok(build)
    }

    /// Writes the tarball and the Debian package; returns the package.
    fn pack(&self, out: &Path, floor: Glibc, command: &[u8], library: &[u8]) -> Result<PathBuf> {
        let version = env!("CARGO_PKG_VERSION");
        let name = match self.cpu {
            Cpu::Orin => format!("edgellm-{version}-aarch64-orin"),
            Cpu::Generic => format!("edgellm-{version}-aarch64"),
        };
        let tarball = out.join(format!("{name}.tar.gz"));
        fs::write(&tarball, tar_gz(&tree(&name, "lib", &format!("{name}/share/edgellm"), command, library)?)?)
            .with_context(|| format!("cannot write {}", tarball.display()))?;
        let deb = out.join(format!("{name}.deb"));
        let entries = tree("./usr", "lib/aarch64-linux-gnu", "./usr/share/doc/edgellm", command, library)?;
        write_deb(&deb, &control(version, floor, self.cpu), &entries)?;
        println!("  {}\n  {}", tarball.display(), deb.display());
        Ok(deb)
    }
}

/// Files below `root`, the library in `lib` of it and the licences in `docs`.
fn tree(root: &str, lib: &str, docs: &str, command: &[u8], library: &[u8]) -> Result<Vec<Entry>> {
    let mut entries = vec![
        Entry::program(format!("{root}/bin/edgellm"), command),
        Entry::file(format!("{root}/{lib}/{LIBRARY}"), library),
        Entry::file(format!("{root}/include/edgellm.h"), c_header()?),
    ];
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        entries.push(Entry::file(format!("{docs}/{licence}"), fs::read(repo::root()?.join(licence))?));
    }
    Ok(entries)
}

fn control(version: &'static str, floor: Glibc, cpu: Cpu) -> Control<'static> {
    let description = match cpu {
        Cpu::Orin => {
            "compress, adapt and run language models on the device\n\
             For Jetson Orin and other processors with dot products and half precision (ARMv8.2)."
        }
        Cpu::Generic => {
            "compress, adapt and run language models on the device\n\
             For every 64-bit ARM processor."
        }
    };
    let depends = format!("libc6 (>= {floor}), libgcc-s1");
    Control { package: "edgellm", version, architecture: "arm64", depends, description }
}

/// "2.35".
fn parse(version: &str) -> Result<Glibc> {
    let numbers = version.split_once('.').and_then(|(a, b)| Some(Glibc(a.parse().ok()?, b.parse().ok()?)));
    numbers.ok_or_else(|| anyhow!("--glibc {version:?}: expected a version such as {NEWEST_GLIBC}"))
}

fn keep(built: &Path, path: &Path) -> Result<PathBuf> {
    fs::copy(built, path).with_context(|| format!("cannot copy {} to {}", built.display(), path.display()))?;
    Ok(path.to_owned())
}

/// What each file must be.
fn check(path: &Path) -> Result<Elf> {
    let elf = Elf::read(path)?;
    elf.expect_machine("aarch64")
        .and_then(|()| elf.expect_needed(&SYSTEM.map(|(library, _)| library)))
        .with_context(|| format!("{} is not usable on a board", path.display()))?;
    Ok(elf)
}

/// CI's check: builds as for shipping; the library is small enough; and what the package installs runs under the emulator,
/// where there is one.
pub(crate) fn check_package() -> Result<String> {
    let out = repo::scratch("jetson")?;
    let task =
        BuildJetson { cpu: Cpu::Orin, gpu: false, glibc: NEWEST_GLIBC.to_owned(), fast: false, out: out.clone() };
    let Built { library, floor, deb } = task.make(parse(&task.glibc)?)?;
    ensure!(library.bytes <= LIBRARY_BYTES, "the library has {} bytes, more than {LIBRARY_BYTES}", library.bytes);
    let facts = format!("library {:.1} MB stripped, glibc {floor} or later", library.bytes as f64 / 1e6);
    if !has_program("dpkg-deb") || !has_program(EMULATOR) {
        return Ok(format!("{facts}; the package was not unpacked and run (no dpkg-deb or no {EMULATOR})"));
    }
    let (shell, installed) = (repo::shell()?, out.join("installed"));
    if installed.exists() {
        fs::remove_dir_all(&installed).with_context(|| format!("cannot clear {}", installed.display()))?;
    }
    cmd!(shell, "dpkg-deb -x {deb} {installed}").quiet().run()?;
    let command = installed.join("usr/bin/edgellm");
    let version = cmd!(shell, "{EMULATOR} -cpu max -L {SYSROOT} {command} --version").quiet().read()?;
    let expected = concat!("edgellm ", env!("CARGO_PKG_VERSION"));
    ensure!(version.starts_with(expected), "the packaged command says {version:?}, expected {expected:?}");
    Ok(format!("{facts}; the packaged command runs under the emulator"))
}
