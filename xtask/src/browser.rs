//! The report in a browser: headless Chromium opens what `edgellm report` writes and serves.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::json;

use crate::edgellm::{Edgellm, arg};
use crate::repo;

/// Steps of the long run.
const STEPS: u32 = 10_000;
/// What its page may weigh, and how long writing and opening it may take.
const MOST_BYTES: u64 = 2_000_000;
const MOST_TIME: Duration = Duration::from_secs(1);
/// Times that are measured at most, of which the least counts: others work on this machine too.
const TRIES: usize = 5;
/// A name that would run if it were not escaped.
const HOSTILE: &str = "<script>document.title='it ran'</script><img src=x onerror=\"document.title='it ran'\">";

/// Opens reports in headless Chromium: no console errors, small enough, fast enough; leaves screenshots.
#[derive(Args)]
pub(crate) struct CheckReport {}

impl CheckReport {
    pub(crate) fn run(&self) -> Result<()> {
        let browser = Browser::find()?.context("expected chromium, found none")?;
        println!("{}", check(&Edgellm::build(&[])?.quietly(), &browser)?);
        Ok(())
    }
}

/// Chromium, under one of its names.
pub(crate) struct Browser {
    program: &'static str,
    profile: PathBuf,
}

impl Browser {
    pub(crate) fn find() -> Result<Option<Self>> {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let profile = repo::scratch("browser")?.join("profile");
        Ok(names.into_iter().find(|name| repo::has_program(name)).map(|program| Self { program, profile }))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        // Root has no sandbox; only our own pages are opened.
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]);
        command.arg(format!("--user-data-dir={}", self.profile.display())).stdin(Stdio::null());
        command
    }

    /// What a page has become, and what its console said.
    fn open(&self, address: &str) -> Result<(String, Vec<String>)> {
        self.open_with(address, &[])
    }

    fn open_with(&self, address: &str, more: &[&str]) -> Result<(String, Vec<String>)> {
        let output = self.command().args(more).args(["--dump-dom", address]).output()?;
        ensure!(output.status.success(), "{} {address}: {}", self.program, output.status);
        let log = String::from_utf8_lossy(&output.stderr);
        let console = log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect();
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), console))
    }

    fn screenshot(&self, address: &str, path: &Path, size: (u32, u32), more: &[&str]) -> Result<()> {
        let mut command = self.command();
        command.arg(format!("--screenshot={}", path.display())).arg(format!("--window-size={},{}", size.0, size.1));
        let output = command.args(more).arg(address).output()?;
        ensure!(output.status.success() && path.is_file(), "{} wrote no {}", self.program, path.display());
        Ok(())
    }
}

/// The whole check; one line that sums it up.
pub(crate) fn check(edgellm: &Edgellm, browser: &Browser) -> Result<String> {
    let folder = repo::scratch("browser")?;
    errors_are_seen(browser, &folder)?;
    let (bytes, took) = long_run(edgellm, browser, &folder)?;
    let everything = everything(edgellm, &folder)?;
    let (dom, console) = browser.open(&address(&everything))?;
    ensure!(console.is_empty(), "the console says: {}", console.join("; "));
    ensure!(!dom.contains("<title>it ran"), "a name was run as a script");
    ensure!(dom.contains("id=\"theme\">"), "expected the page's script to show the button of the theme");
    for section in ["recommendations", "pareto", "layers", "loss", "time", "memory", "figures"] {
        ensure!(dom.contains(&format!("<section id=\"{section}\">")), "expected a section '{section}' in the page");
    }
    pictures(browser, &folder, &everything)?;
    live(edgellm, browser, &folder)?;
    Ok(format!(
        "no console errors; {STEPS} steps: {:.0} kB, written and opened in {:.2} s; screenshots in {}",
        bytes as f64 / 1e3,
        took.as_secs_f64(),
        folder.display()
    ))
}

fn address(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// A page that fails must be seen to fail, or the check says nothing.
fn errors_are_seen(browser: &Browser, folder: &Path) -> Result<()> {
    let path = folder.join("failing.html");
    fs::write(&path, "<!doctype html><title>fails</title><script>throw new Error('on purpose')</script>")?;
    let (_, console) = browser.open(&address(&path))?;
    ensure!(console.iter().any(|line| line.contains("on purpose")), "expected an error on the console, found none");
    Ok(())
}

/// The size of the page of a long run, and the time to write it and open it, without the browser's own start.
fn long_run(edgellm: &Edgellm, browser: &Browser, folder: &Path) -> Result<(u64, Duration)> {
    let (metrics, page, empty) = (folder.join("long.jsonl"), folder.join("long.html"), folder.join("empty.html"));
    fs::write(&metrics, long_metrics())?;
    fs::write(&empty, "<!doctype html><title>empty</title>")?;
    let mut least: [Option<Duration>; 3] = [None; 3];
    for _ in 0..TRIES {
        let program = edgellm.binary()?;
        let mut write = Command::new(program);
        write.args(["report", arg(&metrics)?, "-o", arg(&page)?, "--quiet"]).stdout(Stdio::null());
        let mut works: [&mut dyn FnMut() -> Result<()>; 3] = [
            &mut || {
                let status = write.status()?;
                ensure!(status.success(), "edgellm report: {status}");
                Ok(())
            },
            &mut || browser.open(&address(&page)).map(|(_, console)| drop(console)),
            &mut || browser.open(&address(&empty)).map(drop),
        ];
        for (least, work) in least.iter_mut().zip(&mut works) {
            let start = Instant::now();
            work()?;
            let took = start.elapsed();
            *least = Some(least.map_or(took, |known| known.min(took)));
        }
        let [Some(written), Some(opened), Some(started)] = least else { continue };
        let took = written + opened.saturating_sub(started);
        if took < MOST_TIME {
            let bytes = fs::metadata(&page)?.len();
            ensure!(bytes < MOST_BYTES, "expected less than {MOST_BYTES} bytes, found {bytes}");
            return Ok((bytes, took));
        }
    }
    bail!("expected to write and open the page of {STEPS} steps in less than {MOST_TIME:?}, found {least:?}")
}

/// Metrics as a run of some hours leaves them, with a last line that was cut short.
fn long_metrics() -> String {
    let mut text = String::new();
    for step in 0..STEPS {
        let noise = f64::from(step * 7919 % 1013) / 1013.0;
        let time = 0.9 * f64::from(step);
        let event = json!({
            "event": "step", "time_s": time, "step": step, "exit": 8 * (1 + step % 4), "tokens": 512, "seconds": 0.9,
            "loss": 1.2 + 2.0 * (-f64::from(step) / 900.0).exp() + 0.2 * noise, "grad_norm": 0.3 + noise,
            "learning_rate": 1e-3, "response_tokens": 300, "skipped": false,
            "stage_seconds": {"prefix": 0.2, "window": 0.3, "head": 0.1, "backward": 0.25, "update": 0.05},
        });
        let memory =
            json!({"event": "memory", "time_s": time, "rss_bytes": 2e8 + 1e7 * noise, "peak_rss_bytes": 2.6e8});
        let _ = writeln!(text, "{event}\n{memory}");
        if step % 10 == 0 {
            let layer =
                |index: u32| json!({"index": index, "ms": 3.0 + noise, "operators": {"qkv": 1.0, "gate_up": 2.0}});
            let layers: Vec<_> = (0..30).map(layer).collect();
            let _ = writeln!(text, "{}", json!({"event": "layers", "time_s": time, "pass": "tune", "layers": layers}));
        }
    }
    text + "{\"event\":\"st"
}

/// A page with all sections: a short run of the fixture, a measurement of it, and records with hostile names.
fn everything(edgellm: &Edgellm, folder: &Path) -> Result<PathBuf> {
    let root = repo::root()?;
    let (model, data) = (root.join("fixtures/model"), root.join("fixtures/instruct"));
    let (run, page) = (folder.join("run.jsonl"), folder.join("everything.html"));
    match fs::remove_file(&run) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let (train, heldout) = (data.join("train.jsonl"), data.join("heldout.jsonl"));
    let adapt = ["adapt", "-m", arg(&model)?, "--data", arg(&train)?, "--eval-data", arg(&heldout)?, "--steps", "40"];
    let adapter = folder.join("adapter");
    let options = ["--max-len", "128", "--window", "4", "-o", arg(&adapter)?, "--force", "--metrics", arg(&run)?];
    edgellm.json(adapt.into_iter().chain(options))?;
    let records = folder.join("sweep.records.jsonl");
    fs::write(&records, sweep_records())?;
    let report = ["report", arg(&run)?, arg(&records)?, "-o", arg(&page)?, "--title", HOSTILE];
    edgellm.json(report)?;
    Ok(page)
}

/// Records of three policies at four sizes, with layers.
fn sweep_records() -> String {
    let mut text = String::new();
    for (policy, factor) in [("uniform", 1.6), (HOSTILE, 1.2), ("solve", 1.0)] {
        for (budget, kl, megabytes) in [("2.5", 0.9, 46.0), ("3", 0.31, 53.0), ("3.5", 0.14, 61.0), ("4", 0.07, 69.0)] {
            let kl = kl * factor;
            let layer = |i: u32| {
                let cost = if i == 3 || i == 27 { 0.03 } else { 0.002 };
                json!({"name": format!("block.{i}"), "bits": 3.0, "sparsity": 0.0, "sensitivity": cost, "bytes": 100_000})
            };
            let record = json!({
                "version": 1, "id": format!("{policy:.3}{budget}"), "sweep": "made up", "seconds": 1.0, "ended": 0,
                "case": {"model": "m", "policy": policy, "budget": budget, "task": "text"},
                "figures": {
                    "model_bytes": {"value": megabytes * 1e6, "unit": "bytes", "better": "lower"},
                    "second_half_kl": {"value": kl, "interval": [0.95 * kl, 1.05 * kl], "n": 40, "unit": "nats", "better": "lower"},
                },
                "layers": (0..30).map(layer).collect::<Vec<_>>(), "environment": {"cpu": HOSTILE, "threads": "2"},
            });
            let _ = writeln!(text, "{record}");
        }
    }
    text
}

/// Light, dark, on a phone, on paper: for people to look at.
fn pictures(browser: &Browser, folder: &Path, page: &Path) -> Result<()> {
    let address = address(page);
    browser.screenshot(&address, &folder.join("light.png"), (1100, 6000), &[])?;
    browser.screenshot(
        &address,
        &folder.join("dark.png"),
        (1100, 6000),
        &["--blink-settings=preferredColorScheme=0"],
    )?;
    // Windows have a least width, so that a frame is the phone.
    let frame = folder.join("phone.html");
    let name = page.file_name().and_then(|name| name.to_str()).context("a name")?;
    fs::write(&frame, format!("<!doctype html><iframe src=\"{name}\" style=\"width:375px;height:3900px\"></iframe>"))?;
    browser.screenshot(&self::address(&frame), &folder.join("phone.png"), (500, 4000), &[])?;
    let pdf = folder.join("print.pdf");
    let output = browser.command().arg(format!("--print-to-pdf={}", pdf.display())).arg(&address).output()?;
    ensure!(output.status.success() && pdf.is_file(), "{} printed no {}", browser.program, pdf.display());
    Ok(())
}

/// A child that ends with the check.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The page that follows a run.
fn live(edgellm: &Edgellm, browser: &Browser, folder: &Path) -> Result<()> {
    let mut command = Command::new(edgellm.binary()?);
    command.args(["report", arg(&folder.join("run.jsonl"))?, "--live", "--quiet"]).stdout(Stdio::piped());
    let mut child = Ended(command.spawn()?);
    let mut address = String::new();
    BufReader::new(child.0.stdout.take().context("an output")?).read_line(&mut address)?;
    // Long enough, in the page's time, that it fetches itself again some times.
    let (dom, console) = browser.open_with(address.trim(), &["--virtual-time-budget=10000"])?;
    ensure!(console.is_empty(), "the console of the live page says: {}", console.join("; "));
    ensure!(dom.contains("<section id=\"loss\">"), "expected the loss on the live page, found: {dom:.300}");
    Ok(())
}
