//! `cargo xtask test`: everything CI runs, in order. A step that cannot run here says why and counts as skipped, never as
//! passed; a failed step does not keep the later ones from running.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use xshell::{Cmd, cmd};

use crate::browser::{self, Browser};
use crate::edgellm::{Edgellm, SMOLLM2};
use crate::toolchain::Toolchain;
use crate::{android, bindings, checks, cross, demo, device, golden, ios, jetson, repo, sweep};

/// Runs everything that CI runs.
#[derive(Args)]
pub(crate) struct Test {
    /// Only what needs no other toolchain, device, Python or download.
    #[arg(long)]
    quick: bool,
    /// Only the steps whose name contains this.
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
}

/// How a step ended, other than by an error.
pub(crate) enum Outcome {
    Passed(String),
    NotRun(String),
}

struct Step {
    name: &'static str,
    /// Part of `--quick`.
    quick: bool,
    run: fn() -> Result<Outcome>,
}

const NO_LAVAPIPE: &str = "no lavapipe (Debian: mesa-vulkan-drivers)";
const NO_GOLDEN: &str = "no ../shared/golden";

const STEPS: [Step; 40] = [
    Step { name: "format", quick: true, run: format },
    Step { name: "lints", quick: true, run: lints },
    Step { name: "tests", quick: true, run: tests },
    Step { name: "examples in the docs", quick: true, run: doc_tests },
    Step { name: "demo on the fixture", quick: true, run: demo_run },
    Step {
        name: "regression sweep",
        quick: true,
        run: || sweep::check(&Edgellm::build(&[])?.quietly()).map(Outcome::Passed),
    },
    Step { name: "report in a browser", quick: true, run: report_in_a_browser },
    Step { name: "bindings: C", quick: false, run: bindings::c },
    Step { name: "bindings: Python", quick: false, run: bindings::python },
    Step { name: "bindings: Kotlin", quick: false, run: bindings::kotlin },
    Step { name: "bindings: Swift", quick: false, run: bindings::swift },
    Step { name: "bindings: cold start", quick: false, run: bindings::cold_start },
    Step { name: "operators on ndarray and wgpu", quick: false, run: wgpu_operators },
    Step { name: "aarch64: build", quick: false, run: || on_aarch64(cross::build) },
    Step {
        name: "aarch64: kernels, -cpu max",
        quick: false,
        run: || on_aarch64(|| cross::kernel_tests("max", "neon+i8mm")),
    },
    Step {
        name: "aarch64: kernels, -cpu cortex-a76",
        quick: false,
        run: || on_aarch64(|| cross::kernel_tests("cortex-a76", "neon+dotprod")),
    },
    Step {
        name: "aarch64: kernels, -cpu cortex-a57",
        quick: false,
        run: || on_aarch64(|| cross::kernel_tests("cortex-a57", "neon")),
    },
    Step { name: "aarch64: the command", quick: false, run: || on_aarch64(|| cross::command("max")) },
    Step { name: "aarch64: demo, -cpu max", quick: false, run: || on_aarch64(|| cross::demo("max")) },
    Step { name: "aarch64: demo, -cpu cortex-a57", quick: false, run: || on_aarch64(|| cross::demo("cortex-a57")) },
    Step { name: "android arm64: compile", quick: false, run: || android_compile("arm64-v8a") },
    Step { name: "android x86_64: compile", quick: false, run: || android_compile("x86_64") },
    Step { name: "android: archive", quick: false, run: || android::check_archive().map(Outcome::Passed) },
    Step { name: "ios: compile, framework", quick: false, run: ios_compile },
    Step { name: "jetson: package, size of the library", quick: false, run: || on_aarch64(jetson::check_package) },
    Step { name: "devices: local", quick: false, run: || matrix_device("local").map(Outcome::Passed) },
    Step { name: "devices: qemu, -cpu max", quick: false, run: || on_aarch64(|| matrix_device("qemu-max")) },
    Step { name: "devices: qemu, -cpu cortex-a57", quick: false, run: || on_aarch64(|| matrix_device("qemu-a57")) },
    Step { name: "devices: ssh to this machine", quick: false, run: ssh_device },
    Step {
        name: "adapter layout",
        quick: false,
        run: || checks::adapter(&Edgellm::build(&[])?.quietly()).map(Outcome::Passed),
    },
    Step {
        name: "GGUF types",
        quick: false,
        run: || checks::gguf_types(&Edgellm::build(&[])?.quietly()).map(Outcome::Passed),
    },
    Step { name: "pull the real model", quick: false, run: pull },
    Step { name: "files of the real model", quick: false, run: real_model_tests },
    Step { name: "GGUF of the real model", quick: false, run: gguf_of_the_real_model },
    Step {
        name: "memory of the real model",
        quick: false,
        run: || checks::memory(&Edgellm::build(&[])?.quietly()).map(Outcome::Passed),
    },
    Step {
        name: "memory budgets of tuning",
        quick: false,
        run: || checks::budgets(&Edgellm::build(&[])?.quietly()).map(Outcome::Passed),
    },
    Step { name: "8-bit activations", quick: false, run: activations },
    Step { name: "parity on flex", quick: false, run: flex_parity },
    Step { name: "parity on ndarray", quick: false, run: ndarray_parity },
    Step { name: "parity on wgpu", quick: false, run: wgpu_parity },
];

impl Test {
    pub(crate) fn run(&self) -> Result<()> {
        let mut rows = Vec::new();
        for (i, step) in STEPS.iter().enumerate() {
            if self.only.as_ref().is_some_and(|word| !step.name.contains(word.as_str())) {
                continue;
            }
            println!("\n=== {}/{} {} ===", i + 1, STEPS.len(), step.name);
            let start = Instant::now();
            let skip = self.quick && !step.quick;
            let outcome = if skip { Ok(Outcome::NotRun("--quick".to_owned())) } else { (step.run)() };
            if let Err(error) = &outcome {
                eprintln!("error: {error:#}");
            }
            rows.push((step.name, start.elapsed(), outcome));
        }
        report(&rows)
    }
}

/// The closing table and line.
fn report(rows: &[(&str, Duration, Result<Outcome>)]) -> Result<()> {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    println!("\n{:<36} {:>6}  result", "step", "time");
    for (name, time, outcome) in rows {
        let (count, word, detail) = match outcome {
            Ok(Outcome::Passed(detail)) => (&mut passed, "passed", detail.clone()),
            Ok(Outcome::NotRun(reason)) => (&mut skipped, "not run", reason.clone()),
            Err(error) => (&mut failed, "FAILED", first_line(&format!("{error:#}"))),
        };
        *count += 1;
        let colon = if detail.is_empty() { "" } else { ": " };
        println!("{name:<36} {:>6}  {word}{colon}{detail}", clock(*time));
    }
    for (name, _, outcome) in rows {
        if let Err(error) = outcome {
            println!("\nFAILED {name}: {error:#}");
        }
    }
    println!("\nsteps: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 || passed == 0 {
        std::process::exit(1);
    }
    Ok(())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// "3:07".
fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

fn passed() -> Result<Outcome> {
    Ok(Outcome::Passed(String::new()))
}

fn format() -> Result<Outcome> {
    let shell = repo::shell()?;
    cmd!(shell, "cargo fmt --all --check").quiet().run()?;
    passed()
}

fn lints() -> Result<Outcome> {
    let shell = repo::shell()?;
    // With a feature that no other step compiles.
    cmd!(shell, "cargo clippy --workspace --all-targets --features edgellm/prometheus -- -D warnings").quiet().run()?;
    passed()
}

/// Installs the test runner where it is missing.
fn nextest() -> Result<()> {
    let shell = repo::shell()?;
    if cmd!(shell, "cargo nextest --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        cmd!(shell, "cargo install cargo-nextest --locked").quiet().run()?;
    }
    Ok(())
}

fn tests() -> Result<Outcome> {
    let shell = repo::shell()?;
    nextest()?;
    cmd!(shell, "cargo nextest run --release --workspace --no-fail-fast").quiet().run()?;
    passed()
}

fn doc_tests() -> Result<Outcome> {
    let shell = repo::shell()?;
    cmd!(shell, "cargo test --doc --release --workspace --no-fail-fast").quiet().run()?;
    passed()
}

fn demo_run() -> Result<Outcome> {
    demo::on_fixture().map(Outcome::Passed)
}

fn report_in_a_browser() -> Result<Outcome> {
    let Some(browser) = Browser::find()? else { return Ok(Outcome::NotRun("no chromium".to_owned())) };
    browser::check(&Edgellm::build(&[])?.quietly(), &browser).map(Outcome::Passed)
}

/// Mesa's software Vulkan driver, which is the same everywhere, so that wgpu's results do not depend on the machine.
fn lavapipe() -> Result<Option<PathBuf>> {
    for folder in ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"] {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("lvp_icd") {
                return Ok(Some(entry.path()));
            }
        }
    }
    Ok(None)
}

/// A command with what wgpu needs to find the driver.
fn with_driver<'a>(command: Cmd<'a>, driver: &Path) -> Result<Cmd<'a>> {
    Ok(command.env("VK_ICD_FILENAMES", driver).env("XDG_RUNTIME_DIR", repo::scratch("runtime")?))
}

/// The features change all of Burn, so this build has its own folder, and the dev profile, which is quicker to build. The
/// command is selected as well, for the parity step: one selection of packages is one build of Burn.
fn wgpu_operators() -> Result<Outcome> {
    let Some(driver) = lavapipe()? else { return Ok(Outcome::NotRun(NO_LAVAPIPE.to_owned())) };
    nextest()?;
    let (shell, folder) = (repo::shell()?, repo::target()?.join("wgpu"));
    let selected = cmd!(
        shell,
        "cargo nextest run -p edgellm-kernels -p edgellm --features edgellm/ndarray,edgellm/wgpu --target-dir {folder}
            --no-fail-fast --success-output immediate -E package(edgellm-kernels)"
    );
    let output = with_driver(selected, &driver)?.quiet().ignore_status().output()?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // Only then: tests that expect a panic print one, and would hide what really failed.
        eprint!("{log}");
        bail!("cargo nextest ended with {}", output.status);
    }
    // A suite without an adapter passes as well, so that the devices which ran must be read off.
    let ran = |device: &str| log.lines().filter(|line| line.contains(&format!("{device} ran"))).count();
    let (ndarray, wgpu) = (ran("ndarray"), ran("wgpu"));
    ensure!(ndarray > 0 && wgpu == ndarray, "{ndarray} suites ran on ndarray, {wgpu} on wgpu");
    Ok(Outcome::Passed(format!("{wgpu} suites on each")))
}

/// The command that the conformance step built, with the features of every device.
fn with_every_device() -> Result<Edgellm> {
    let binary = repo::target()?.join("wgpu/debug/edgellm");
    ensure!(binary.exists(), "the step with the operators built no {}", binary.display());
    Ok(Edgellm::at(repo::shell()?, binary).quietly())
}

fn activations() -> Result<Outcome> {
    let Some(data) = repo::shared("data")? else { return Ok(Outcome::NotRun("no ../shared/data".to_owned())) };
    let edgellm = Edgellm::build(&[])?.quietly();
    edgellm.pull(SMOLLM2).context("the model could not be pulled")?;
    checks::activations(&edgellm, &data.join("wiki.test.raw")).map(Outcome::Passed)
}

fn flex_parity() -> Result<Outcome> {
    parity(&Edgellm::build(&[])?.quietly().in_f32(), "flex", golden::Parts::All)
}

/// Logits only, as on wgpu: this build is not optimized for speed, and the logits decide the rest.
fn ndarray_parity() -> Result<Outcome> {
    parity(&with_every_device()?.on("ndarray"), "ndarray", golden::Parts::Prompts)
}

/// Logits only: the driver computes on the CPU, many times slower than our kernels there.
fn wgpu_parity() -> Result<Outcome> {
    let Some(driver) = lavapipe()? else { return Ok(Outcome::NotRun(NO_LAVAPIPE.to_owned())) };
    let edgellm = with_every_device()?.on("wgpu");
    let edgellm = edgellm.with_env("VK_ICD_FILENAMES", driver).with_env("XDG_RUNTIME_DIR", repo::scratch("runtime")?);
    parity(&edgellm, "wgpu", golden::Parts::Prompts)
}

fn on_aarch64(step: impl Fn() -> Result<String>) -> Result<Outcome> {
    match cross::missing() {
        Some(reason) => Ok(Outcome::NotRun(reason)),
        None => step().map(Outcome::Passed),
    }
}

/// Where no toolchain can compile for a target, nothing was run.
fn with_toolchain(target: &str, step: impl Fn() -> Result<String>) -> Result<Outcome> {
    match Toolchain::find(target) {
        Err(reason) => Ok(Outcome::NotRun(format!("{reason:#}"))),
        Ok(_) => step().map(Outcome::Passed),
    }
}

fn android_compile(abi: &str) -> Result<Outcome> {
    with_toolchain(android::Abi::find(abi)?.target, || android::check_without_ndk(abi))
}

fn ios_compile() -> Result<Outcome> {
    with_toolchain(ios::DEVICE.target, ios::check)
}

/// A device of the repository's matrix.
fn matrix_device(name: &str) -> Result<String> {
    device::check(&repo::root()?.join("docs/devices.toml"), name)
}

fn ssh_device() -> Result<Outcome> {
    match device::sshd::missing() {
        Some(reason) => Ok(Outcome::NotRun(reason)),
        None => device::sshd::check().map(Outcome::Passed),
    }
}

fn pull() -> Result<Outcome> {
    let path = Edgellm::build(&[])?.quietly().pull(SMOLLM2)?;
    Ok(Outcome::Passed(path.display().to_string()))
}

/// The model crate's tests on the real file, which the plain tests leave out.
fn real_model_tests() -> Result<Outcome> {
    let Some(folder) = golden::folder()? else { return Ok(Outcome::NotRun(NO_GOLDEN.to_owned())) };
    let path = Edgellm::build(&[])?.quietly().pull(SMOLLM2)?;
    let file = if path.is_dir() { gguf_in(&path)? } else { path };
    let shell = repo::shell()?;
    cmd!(shell, "cargo nextest run --release --workspace -E binary(real_model)")
        .env("EDGELLM_TEST_MODEL", file)
        .env("EDGELLM_TEST_GOLDEN", folder)
        .quiet()
        .run()?;
    passed()
}

fn gguf_of_the_real_model() -> Result<Outcome> {
    let edgellm = Edgellm::build(&[])?.quietly();
    let path = edgellm.pull(SMOLLM2)?;
    let file = if path.is_dir() { gguf_in(&path)? } else { path };
    checks::gguf_file(&edgellm, &file).map(Outcome::Passed)
}

fn gguf_in(folder: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "gguf") {
            return Ok(path);
        }
    }
    bail!("no GGUF file in {}", folder.display())
}

fn parity(edgellm: &Edgellm, device: &str, parts: golden::Parts) -> Result<Outcome> {
    let Some(folder) = golden::folder()? else { return Ok(Outcome::NotRun(NO_GOLDEN.to_owned())) };
    edgellm.pull(SMOLLM2).context("the model could not be pulled")?;
    golden::compare(edgellm, &folder, golden::tolerance(device), parts).map(Outcome::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_secs(187)), "3:07");
        assert_eq!(clock(Duration::from_millis(900)), "0:00");
    }

    #[test]
    fn steps_have_different_names_that_fit_the_table() {
        for (i, step) in STEPS.iter().enumerate() {
            assert!(step.name.len() <= 36, "{}", step.name);
            assert!(STEPS[..i].iter().all(|other| other.name != step.name), "{}", step.name);
        }
    }
}
