//! Tuning runs that are interrupted go on to the same result.
#![cfg(unix)]

mod common;

use std::process::Stdio;
use std::time::{Duration, Instant};

use common::Bench;

const RUN: &str = "adapt -m model --data train.jsonl --max-len 64 --exits 2 --window 1 --batch 2 --order shuffled \
                   --exit-schedule adaptive --optimizer-state int8 --lr-schedule cosine --lr 1e-2 --checkpoint-every 5 -q";

/// The files of an adapter, by name.
fn files(b: &Bench, adapter: &str) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(b.path(adapter))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// Numbers between 0 and 1 (Knuth's multiplicative generator).
fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

#[test]
fn killed_at_twenty_moments_and_resumed_it_is_the_same_to_the_byte() {
    let b = Bench::new();
    let steps = 600;
    let start = Instant::now();
    b.ok(&format!("{RUN} --steps {steps} -o undisturbed"));
    let whole = start.elapsed().as_secs_f64();
    assert!(!b.path("undisturbed.checkpoints").exists(), "a run that is complete needs no checkpoints");

    let line = format!("{RUN} --steps {steps} -o disturbed --resume");
    let (mut kills, mut state) = (0, 7);
    while kills < 20 {
        let mut child = b.command(line.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(whole * 0.12 * random(&mut state)));
        if child.try_wait().unwrap().is_some() {
            // It was complete before its time: the last kills hit a run that starts again.
            std::fs::remove_dir_all(b.path("disturbed")).unwrap();
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    b.ok(&format!("{line} --threads 1"));
    assert_eq!(files(&b, "disturbed"), files(&b, "undisturbed"));
    assert!(!b.path("disturbed.checkpoints").exists());
}

#[test]
fn a_run_is_resumed_only_with_what_it_was_started_with() {
    let b = Bench::new();
    let child = b.command(format!("{RUN} --steps 1000000 -o a").split_whitespace()).spawn().unwrap();
    let mut started = Guard(child);
    let start = Instant::now();
    while !b.path("a.checkpoints").is_dir() || std::fs::read_dir(b.path("a.checkpoints")).unwrap().count() < 2 {
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint was written");
        std::thread::sleep(Duration::from_millis(20));
    }
    started.0.kill().unwrap();
    started.0.wait().unwrap();
    let other = b.fails(&format!("{RUN} --steps 1000000 --rank 4 -o a --resume"), 1);
    assert!(other.contains("rank"), "{other}");
    let data = b.fails(&format!("{} --steps 1000000 -o a --resume", RUN.replace("train.jsonl", "heldout.jsonl")), 1);
    assert!(data.contains("data"), "{data}");
    let fresh = b.fails(&format!("{RUN} --steps 10 -o a"), 2);
    assert!(fresh.contains("--resume") && fresh.contains("--force"), "{fresh}");
    let none = b
        .fails(&format!("{} --steps 10 -o a --resume", RUN.replace("--checkpoint-every 5", "--checkpoint-every 0")), 2);
    assert!(none.contains("--checkpoint-every 0"), "{none}");
    b.ok(&format!("{RUN} --steps 10 -o a --force"));
    assert!(!b.path("a.checkpoints").exists());
}

/// Ends a process that a failing test would leave.
struct Guard(std::process::Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_run_waits_while_its_pause_file_exists() {
    let b = Bench::new();
    std::fs::write(b.path("pause"), "").unwrap();
    let line = format!("{} --steps 3 -o a --pause-file pause", RUN.replace(" -q", ""));
    let mut child = Guard(b.command(line.split_whitespace()).stderr(Stdio::piped()).spawn().unwrap());
    std::thread::sleep(Duration::from_secs(3));
    assert!(child.0.try_wait().unwrap().is_none(), "it did not wait");
    std::fs::remove_file(b.path("pause")).unwrap();
    assert!(child.0.wait().unwrap().success());
    assert!(b.path("a/adapter_model.safetensors").exists());
}

#[test]
fn budgets_are_kept_or_refused() {
    let b = Bench::new();
    let line = "adapt -m model --data train.jsonl --exits 2 --batch 4 --steps 2 --json";
    let error = b.fails(&format!("{line} --max-memory 1MB -o a"), 1);
    assert!(error.contains("expected at least") && error.contains("--max-memory"), "{error}");
    let json = b.json(&format!("{} --max-memory 2GB -o a", line.replace(" --json", "")));
    let plan = &json["memory_plan"];
    assert!(plan["predicted_bytes"].as_u64().unwrap() <= 2_000_000_000, "{plan}");
    assert_eq!(plan["kept_blocks"], plan["window"]);
}
