//! The aarch64 build and its tests under qemu's user-mode emulation. Debian's own toolchain has a prebuilt standard
//! library for that target, so no target has to be downloaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xshell::{Cmd, Shell, cmd};

use crate::edgellm::{Edgellm, arg, number};
use crate::{demo, repo};

pub(crate) const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
pub(crate) const EMULATOR: &str = "qemu-aarch64-static";
/// qemu 7.2 hangs when a dynamically linked program starts a thread; what is tested is the same either way.
const STATIC: &str = "-C target-feature=+crt-static";
/// Seconds that one emulated test program may take.
const LIMIT: &str = "1200";
/// Where the emulated program finds its C library.
pub(crate) const SYSROOT: &str = "/usr/aarch64-linux-gnu";
const CARGO: &str = "/usr/bin/cargo";
const RUSTC: &str = "/usr/bin/rustc";

/// What is missing on this machine for the cross build, if anything.
pub(crate) fn missing() -> Option<String> {
    let shell = repo::shell().ok()?;
    let absent = |program: &str| cmd!(shell, "which {program}").quiet().ignore_stdout().ignore_stderr().run().is_err();
    let library = format!("/usr/lib/rustlib/{TARGET}/lib");
    [CARGO, RUSTC, LINKER, EMULATOR]
        .into_iter()
        .find(|program| absent(program))
        .or_else(|| [SYSROOT, library.as_str()].into_iter().find(|path| !Path::new(path).exists()).map(|_| SYSROOT))
        .map(|what| format!("no {what}"))
}

/// Builds the tests of the kernels and the model, and the command, for aarch64.
pub(crate) fn build() -> Result<String> {
    let tests = test_programs()?;
    let binary = binary()?;
    ensure!(binary.exists(), "no {}", binary.display());
    Ok(format!("{} test programs and the command", tests.len()))
}

/// Runs the kernels' tests as the given processor, whose best instruction set must be `best`.
pub(crate) fn kernel_tests(cpu: &str, best: &str) -> Result<String> {
    let shell = repo::shell()?;
    let programs = test_programs()?;
    let kernels: Vec<_> = programs.iter().filter(|(package, _)| package.contains("edgellm-kernels")).collect();
    ensure!(!kernels.is_empty(), "the kernels have no test programs");
    let _folder = shell.push_dir("crates/edgellm-kernels");
    for (_, program) in &kernels {
        cmd!(shell, "timeout {LIMIT} {EMULATOR} -cpu {cpu} -L {SYSROOT} {program}").quiet().run()?;
    }
    // The suites pass whatever is present, so that what ran must be read off.
    let suites = conformance_in(&programs)?;
    let ran = cmd!(shell, "timeout {LIMIT} {EMULATOR} -cpu {cpu} -L {SYSROOT} {suites} --nocapture swiglu");
    let ran = ran.quiet().ignore_stdout().read_stderr()?;
    ensure!(ran.contains(&format!("flex ({best}) ran, ndarray")), "{best} is not the best that ran on {cpu}: {ran}");
    Ok(format!("{} test programs on {cpu}, up to {best}", kernels.len()))
}

/// Runs the command on the fixture as the given processor; its perplexity must be this machine's.
pub(crate) fn command(cpu: &str) -> Result<String> {
    let model = repo::root()?.join("fixtures/model");
    let text = repo::root()?.join("fixtures/text/heldout.txt");
    let eval = ["eval", "-m", arg(&model)?, "--text", arg(&text)?, "--context", "128", "--windows", "2"];
    let run = ["run", "-m", arg(&model)?, "-p", "Where does Mara live?", "--temp", "0", "-n", "12"];
    let native = Edgellm::build(&[])?.quietly();
    let emulated = Edgellm::at(repo::shell()?, binary()?).quietly().under(&[EMULATOR, "-cpu", cpu, "-L", SYSROOT]);
    let (here, there) = (number(&native.json(eval)?, "perplexity")?, number(&emulated.json(eval)?, "perplexity")?);
    ensure!((there / here - 1.0).abs() < 1e-3, "perplexity {there} on aarch64, {here} here");
    let answer = emulated.json(run)?;
    ensure!(answer["text"].as_str().is_some_and(|t| !t.trim().is_empty()), "no answer on aarch64: {answer}");
    Ok(format!("perplexity {there:.4} on {cpu}, {here:.4} here"))
}

/// The short demo on the fixture as the given processor; tuning must lower the loss there too.
pub(crate) fn demo(cpu: &str) -> Result<String> {
    let edgellm = Edgellm::at(repo::shell()?, binary()?).quietly().under(&[EMULATOR, "-cpu", cpu, "-L", SYSROOT]);
    demo::short(edgellm, cpu)
}

/// Debian's cargo on the packages that are built for aarch64, always the same ones, so that features agree.
fn cargo<'a>(shell: &'a Shell, task: &str) -> Result<Cmd<'a>> {
    let folder = repo::target()?.join("cross");
    Ok(cmd!(
        shell,
        "{CARGO} {task} --release --target {TARGET} --target-dir {folder}
            -p edgellm-kernels -p edgellm-model -p edgellm --no-default-features"
    )
    .env("RUSTC", RUSTC)
    .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
    .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", STATIC)
    .quiet())
}

/// The command's binary, built where it is not up to date.
pub(crate) fn binary() -> Result<PathBuf> {
    cargo(&repo::shell()?, "build")?.arg("--quiet").run()?;
    Ok(repo::target()?.join("cross").join(TARGET).join("release/edgellm"))
}

/// The kernels' conformance tests, built where they are not up to date.
pub(crate) fn conformance() -> Result<PathBuf> {
    conformance_in(&test_programs()?).map(Path::to_owned)
}

fn conformance_in(programs: &[(String, PathBuf)]) -> Result<&Path> {
    let suites = |(package, program): &&(String, PathBuf)| {
        package.contains("edgellm-kernels") && program.to_string_lossy().contains("conformance")
    };
    let found = programs.iter().find(suites).context("the kernels have no conformance tests")?;
    Ok(&found.1)
}

/// The test programs with their packages, built where they are not up to date.
fn test_programs() -> Result<Vec<(String, PathBuf)>> {
    let shell = repo::shell()?;
    let kind = ["--no-run", "--lib", "--tests", "--message-format", "json-render-diagnostics"];
    let messages = cargo(&shell, "test")?.args(kind).read()?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).with_context(|| format!("cargo printed {line:.200}"))?;
        let package = message["package_id"].as_str().unwrap_or_default();
        if let (Some(program), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool()) {
            programs.push((package.to_owned(), PathBuf::from(program)));
        }
    }
    ensure!(!programs.is_empty(), "cargo built no test programs for {TARGET}");
    Ok(programs)
}
