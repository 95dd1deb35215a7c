//! What the tests of the command share: running the built binary in a folder of its own, on a tiny model.
#![allow(dead_code, reason = "every test file uses a part")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a tiny random model, texts and examples, in which the command is run.
pub(crate) struct Bench {
    folder: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        edgellm::model::testing::tiny_model_dir(&bench.path("model"), 0).unwrap();
        let text: String = (0..40).map(|i| format!("Line {i}: the quick brown fox sees {} dogs.\n", i * i)).collect();
        std::fs::write(bench.path("text.txt"), text).unwrap();
        let examples = |from: u32, to: u32| -> String {
            (from..to)
                .map(|i| format!("{{\"instruction\": \"Say {i}.\", \"output\": \"It is {i}, {i}.\"}}\n"))
                .collect()
        };
        std::fs::write(bench.path("train.jsonl"), examples(0, 12)).unwrap();
        std::fs::write(bench.path("heldout.jsonl"), examples(12, 16)).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command with these arguments; it runs in the folder, knows no store but its own and no proxy.
    pub(crate) fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgellm"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        command.env("EDGELLM_HOME", self.path("home")).env("HF_HOME", self.path("hf"));
        for name in ["HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "RUST_BACKTRACE"] {
            command.env_remove(name);
        }
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        command
    }

    pub(crate) fn output<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a command that succeeds.
    pub(crate) fn ok(&self, line: &str) -> String {
        succeeded(&self.output(line.split_whitespace()))
    }

    /// What a command that succeeds prints with `--json`.
    pub(crate) fn json(&self, line: &str) -> Value {
        let text = self.ok(&format!("{line} --json"));
        assert_eq!(text.lines().count(), 1, "more than one line of JSON: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// What a command that succeeds says on standard error.
    pub(crate) fn says(&self, line: &str) -> String {
        let output = self.output(line.split_whitespace());
        succeeded(&output);
        String::from_utf8(output.stderr).unwrap()
    }

    /// Runs a command that must fail with `code`; returns its message.
    pub(crate) fn fails(&self, line: &str, code: i32) -> String {
        failed(&self.output(line.split_whitespace()), code)
    }
}

pub(crate) fn succeeded(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn failed(output: &Output, code: i32) -> String {
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

/// Names in a folder that are left by unfinished work.
pub(crate) fn litter(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| n.ends_with(".tmp")).collect()
}

/// A device on which wider codes take longer, in nanoseconds for a weight.
pub(crate) fn profile(b: &Bench, name: &str, change: impl FnOnce(&mut Value)) {
    let rates = |threads: usize| {
        let rate = |bits: u8| {
            let name = if bits == 16 { "f16".into() } else { format!("q{bits}g32a") };
            json!({"format": name, "ns_per_weight": f64::from(bits) / threads as f64})
        };
        let formats = [2, 3, 4, 5, 6, 8, 16].map(rate);
        json!({
            "threads": threads, "block_us": 10.0, "block_value_ns": 0.0, "attention_ns": 0.0, "token_us": 5.0,
            "logit_ns": 0.0, "formats": formats,
        })
    };
    let mut value = json!({
        "format_version": 2, "name": "made up", "source": "made up",
        "cores": [{"name": "cores", "count": 2, "gmacs_f32": 10.0}], "read_gbps": [5.0, 8.0], "handover_us": 1.0,
        "usable_bytes": 1_000_000_000, "decode": [rates(1), rates(2)],
    });
    change(&mut value);
    std::fs::write(b.path(name), value.to_string()).unwrap();
}
