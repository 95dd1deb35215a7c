//! Checkpoints survive kills at every write, full disks and damaged bytes; other runs' checkpoints are refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use edgellm_tune::checkpoint::{Buffer, CheckpointStore, Identity, TrainState};
use serde_json::{Map, json};

fn identity() -> Identity {
    Identity { settings: r#"{"rank":8,"learning_rate":0.001}"#.into(), data: "d1".into(), model: "m1".into() }
}

/// A state that can be told from every other step's; `values` floats.
fn state(step: u64, values: usize) -> TrainState {
    let floats = (0..values).map(|i| (i as f32 + 0.1) * (step as f32 + 1.0).sqrt()).collect();
    let tensors = BTreeMap::from([
        ("parameters/0.q.a".to_owned(), Buffer::F32(floats)),
        ("optimizer/0.q.a.first.codes".to_owned(), Buffer::U8((0..values).map(|i| (i as u64 * step) as u8).collect())),
        ("optimizer/0.q.a.updates".to_owned(), Buffer::U64(vec![step, u64::MAX])),
        ("nothing".to_owned(), Buffer::F32(vec![])),
    ]);
    let scalars = json!({"order": {"epoch": 1, "place": step}, "mean": 0.1 + step as f64, "exits": [[1.5, 2], null]});
    let scalars = scalars.as_object().cloned().unwrap_or_default();
    TrainState { step, tensors, scalars }
}

fn store(dir: &Path) -> CheckpointStore {
    CheckpointStore::new(dir, CheckpointStore::KEEP).unwrap()
}

fn save(dir: &Path, step: u64) -> PathBuf {
    store(dir).save(&state(step, 20), &identity()).unwrap()
}

/// The step that a run would go on from, and how many newer checkpoints were passed over; the state must be whole.
fn latest(dir: &Path, values: usize) -> Option<(u64, usize)> {
    let (found, skipped) = store(dir).latest(&identity()).unwrap()?;
    assert_eq!(found, state(found.step, values));
    Some((found.step, skipped.len()))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_last_ones_are_kept_and_come_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a/run");
    assert_eq!(store(&dir).latest(&identity()).unwrap(), None);
    for step in [5, 10, 15] {
        assert_eq!(save(&dir, step), dir.join(format!("step-{step:08}")));
        assert_eq!(latest(&dir, 20), Some((step, 0)));
    }
    assert_eq!(names(&dir), ["step-00000010", "step-00000015"]);
    assert_eq!(names(&dir.join("step-00000015")), ["SHA256SUMS", "checkpoint.json", "state.safetensors"]);
    // The same step once more takes the place of the old one.
    store(&dir).save(&state(15, 3), &identity()).unwrap();
    assert_eq!(latest(&dir, 3), Some((15, 0)));
    assert!(CheckpointStore::new(&dir, 0).is_err());
}

#[test]
fn floats_come_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    // Among them are many whose digits a fast parser reads as a neighbour.
    let floats: Vec<f64> = (1..3000).map(|i| (f64::from(i) * 0.7123).exp().sqrt().sin() * 1e-7).collect();
    let scalars =
        Map::from_iter([("floats".to_owned(), json!(floats)), ("deep".to_owned(), json!({"a": [{"b": 0.1}]}))]);
    let before = TrainState { step: 1, tensors: BTreeMap::new(), scalars };
    store(folder.path()).save(&before, &identity()).unwrap();
    let (after, _) = store(folder.path()).latest(&identity()).unwrap().unwrap();
    assert_eq!(after, before);
    let scalars = Map::from_iter([("a".to_owned(), json!({"$f64": 1}))]);
    let error = store(folder.path()).save(&TrainState { scalars, ..before }, &identity()).unwrap_err().to_string();
    assert!(error.contains("names other than '$f64'"), "{error}");
}

#[test]
fn another_run_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1);
    let check = |other: Identity, expected: &str| {
        let error = store(folder.path()).latest(&other).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let settings = r#"{"rank":16,"learning_rate":0.001}"#.to_owned();
    check(
        Identity { settings: settings.clone(), ..identity() },
        "of a run with other settings: expected rank 16, found rank 8; use the same or",
    );
    check(Identity { data: "d2".into(), ..identity() }, "other data: expected data d2, found data d1");
    check(
        Identity { settings, model: "m2".into(), ..identity() },
        "other settings and model: expected rank 16, model m2, found rank 8, model m1",
    );
    check(Identity { settings: "plain".into(), ..identity() }, r#"expected settings plain, found settings {"rank""#);
}

/// Changes each file of the newest checkpoint in every way that `damage` gives; each must be seen.
fn every_damage_is_seen(damage: impl Fn(&[u8]) -> Vec<Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    save(dir, 1);
    let newest = save(dir, 2);
    for name in names(&newest) {
        let path = newest.join(&name);
        let good = fs::read(&path).unwrap();
        let variants = damage(&good);
        assert!(variants.len() >= 20, "{name}");
        for bytes in variants {
            fs::write(&path, &bytes).unwrap();
            assert_eq!(latest(dir, 20), Some((1, 1)), "{name} with {} of {} bytes", bytes.len(), good.len());
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(latest(dir, 20), Some((1, 1)), "without {name}");
        fs::write(&path, &good).unwrap();
        assert_eq!(latest(dir, 20), Some((2, 0)));
    }
}

#[test]
fn every_flipped_byte_is_seen() {
    every_damage_is_seen(|good| {
        let flip = |i: usize| {
            let mut bytes = good.to_vec();
            bytes[i] ^= 1 << (i % 8);
            bytes
        };
        (0..good.len()).map(flip).collect()
    });
}

#[test]
fn every_truncation_is_seen() {
    every_damage_is_seen(|good| (0..good.len()).step_by(7).map(|len| good[..len].to_vec()).collect());
}

#[test]
fn a_damaged_checkpoint_is_named_and_later_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    save(dir, 10);
    let newest = save(dir, 20);
    fs::write(newest.join("state.safetensors"), "x").unwrap();
    let (_, skipped) = store(dir).latest(&identity()).unwrap().unwrap();
    assert_eq!(skipped[0].path, newest);
    assert!(skipped[0].reason.contains("state.safetensors: expected the digests"), "{}", skipped[0].reason);
    // The run goes on from step 10; what it writes next is the newest from then on.
    save(dir, 15);
    assert_eq!(names(dir), ["step-00000010", "step-00000015"]);
    for step in [10, 15] {
        fs::remove_file(dir.join(format!("step-{step:08}/SHA256SUMS"))).unwrap();
    }
    let error = store(dir).latest(&identity()).unwrap_err().to_string();
    assert!(error.contains("none of 2 checkpoints is complete"), "{error}");
    // A checkpoint under another step's name is not that step's.
    save(dir, 15);
    fs::rename(dir.join("step-00000015"), dir.join("step-00000016")).unwrap();
    assert!(store(dir).latest(&identity()).unwrap_err().to_string().contains("name: expected step-00000015"));
}

#[test]
fn a_run_does_not_write_behind_a_newer_one() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 20);
    let error = store(folder.path()).save(&state(5, 20), &identity()).unwrap_err().to_string();
    assert!(error.contains("expected none after step 5") && error.contains("found step-00000020"), "{error}");
    assert_eq!(latest(folder.path(), 20), Some((20, 0)));
}

#[test]
fn leftovers_are_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for step in [1, 2] {
        save(dir, step);
    }
    // A write, an exchange and a removal that were killed, and what is none of our business.
    for name in [".step-00000003.123.4.tmp", ".step-00000002.9.0.tmp", ".step-00000000.old.tmp", "step-7", "notes"] {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("state.safetensors"), "half").unwrap();
    }
    assert_eq!(latest(dir, 20), Some((2, 0)));
    save(dir, 3);
    assert_eq!(names(dir), ["notes", "step-00000002", "step-00000003", "step-7"]);
    // Killed after the new one took its place, before the old ones were removed.
    let _ = CheckpointStore::new(dir, 9).unwrap().save(&state(4, 20), &identity()).unwrap();
    assert_eq!(latest(dir, 20), Some((4, 0)));
    save(dir, 5);
    assert_eq!(names(dir), ["notes", "step-00000004", "step-00000005", "step-7"]);
}

#[cfg(unix)]
mod processes {
    #![allow(clippy::print_stdout, reason = "tells the parent process, and says what was not run")]

    use std::io::{Read, Write};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    const TASK: &str = "EDGELLM_TEST_TASK";
    const TARGET: &str = "EDGELLM_TEST_TARGET";
    /// Floats of a state: about 25 KB.
    const VALUES: usize = 5000;

    /// Runs one test of this file in another process with a task; `prepare` is a line of shell that goes before it.
    fn child(task: &str, target: &Path, prepare: &str) -> Command {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("{prepare} exec \"$0\" --exact processes::child_process --nocapture"))
            .arg(program);
        command.env(TASK, task).env(TARGET, target);
        command
    }

    fn save_large(dir: &Path, step: u64) -> Result<PathBuf, edgellm_tune::TuneError> {
        store(dir).save(&state(step, VALUES), &identity())
    }

    /// A save that must fail for want of room, with an error that names the checkpoint, and change nothing.
    fn save_fails(dir: &Path) {
        let before = names(dir);
        let error = save_large(dir, 3).unwrap_err().to_string();
        assert!(error.contains("step-00000003") && error.contains("cannot"), "{error}");
        assert_eq!(names(dir), before);
        assert_eq!(latest(dir, VALUES), Some((2, 0)));
    }

    /// What the child processes do; without a task, there is nothing to do.
    #[test]
    fn child_process() {
        let Ok(task) = std::env::var(TASK) else { return };
        let target = PathBuf::from(std::env::var_os(TARGET).expect("a target"));
        match task.as_str() {
            "save" => drop(save_large(&target, 3).unwrap()),
            "fail" => save_fails(&target),
            "loop" => {
                for step in 1.. {
                    save_large(&target, step).unwrap();
                    let mut out = std::io::stdout();
                    writeln!(out, "saved {step}").and_then(|()| out.flush()).unwrap();
                }
            }
            other => panic!("no task '{other}'"),
        }
    }

    fn two_checkpoints() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            save_large(folder.path(), step).unwrap();
        }
        folder
    }

    #[test]
    fn a_kill_at_every_write_leaves_the_old_checkpoints() {
        let folder = two_checkpoints();
        let mut killed = 0;
        // The system kills the process at the write that goes beyond the limit, in blocks of 512 or 1024 bytes by the shell.
        for blocks in 0..200 {
            let status =
                child("save", folder.path(), &format!("ulimit -c 0; ulimit -f {blocks};")).output().unwrap().status;
            if status.success() {
                assert_eq!(latest(folder.path(), VALUES), Some((3, 0)));
                assert_eq!(names(folder.path()), ["step-00000002", "step-00000003"]);
                break;
            }
            killed += 1;
            assert_eq!(status.code(), None, "killed by a signal");
            assert_eq!(names(folder.path()).len(), 3, "what the write left is there");
            assert_eq!(latest(folder.path(), VALUES), Some((2, 0)), "with {blocks} blocks");
        }
        assert!((20..199).contains(&killed), "{killed} writes were killed, and then one was not");
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_checkpoints() {
        let folder = two_checkpoints();
        for blocks in [0, 1, 5, 20] {
            let limit = format!("trap '' XFSZ; ulimit -f {blocks};");
            let output = child("fail", folder.path(), &limit).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn a_full_disk_leaves_the_old_checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=80k", "tmpfs"]).arg(folder.path()).output();
        if !mount.is_ok_and(|m| m.status.success()) {
            println!("not run: a small file system cannot be mounted here");
            return;
        }
        let result = std::panic::catch_unwind(|| {
            for step in [1, 2] {
                save_large(folder.path(), step).unwrap();
            }
            save_fails(folder.path());
            let read_only = Command::new("mount").args(["-o", "remount,ro"]).arg(folder.path()).status().unwrap();
            assert!(read_only.success());
            save_fails(folder.path());
        });
        Command::new("umount").arg(folder.path()).status().unwrap();
        result.unwrap();
    }

    #[test]
    fn a_kill_at_any_moment_leaves_a_whole_checkpoint() {
        let mut left = 0;
        for round in 0..12 {
            let folder = tempfile::tempdir().unwrap();
            let mut child = child("loop", folder.path(), "").stdout(Stdio::piped()).spawn().unwrap();
            let mut out = child.stdout.take().unwrap();
            let (mut told, mut chunk) = (String::new(), [0; 256]);
            while told.matches("saved").count() < 3 {
                let n = out.read(&mut chunk).unwrap();
                assert!(n > 0, "the child ended too early: {told}");
                told += &String::from_utf8_lossy(&chunk[..n]);
            }
            std::thread::sleep(Duration::from_micros(700 * round));
            child.kill().unwrap();
            child.wait().unwrap();
            out.read_to_string(&mut told).unwrap();
            left += usize::from(names(folder.path()).iter().any(|name| name.starts_with('.')));
            let saved = told.lines().filter_map(|line| line.strip_prefix("saved ")?.parse::<u64>().ok()).max().unwrap();
            let (step, skipped) = latest(folder.path(), VALUES).unwrap();
            assert_eq!(skipped, 0);
            assert!(step >= saved, "step {saved} was reported as saved, and step {step} is there");
            save_large(folder.path(), step + 1).unwrap();
            assert!(names(folder.path()).iter().all(|name| name.starts_with("step-")));
        }
        println!("{left} of 12 kills came in the middle of a write");
    }
}
