//! A full disk, a folder that cannot be written, and a kill in the middle of writing leave the old file whole.
#![allow(clippy::print_stdout, reason = "says what was not run")]
#![cfg(unix)]

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use edgellm_model::ModelError;
use edgellm_model::io::{AtomicDir, AtomicFile, atomic_write};
use edgellm_model::safetensors::{Dtype, Safetensors, SafetensorsWriter, TensorSpec};

const OLD: &[u8] = b"the old content";
/// What a child process is to do, and where.
const TASK: &str = "EDGELLM_TEST_TASK";
const TARGET: &str = "EDGELLM_TEST_TARGET";

/// Writes a safetensors file of `megabytes`, a tensor each.
fn write_safetensors(path: &Path, megabytes: usize, mut after_each: impl FnMut(usize)) -> Result<(), ModelError> {
    let specs: Vec<_> = (0..megabytes).map(|i| TensorSpec::new(format!("t{i}"), Dtype::U8, [1 << 20])).collect();
    let mut writer = SafetensorsWriter::create(path, &specs)?;
    for (i, spec) in specs.iter().enumerate() {
        writer.write(&spec.name, &vec![i as u8; 1 << 20])?;
        after_each(i);
    }
    writer.finish()
}

fn write_dir(target: &Path, content: &[u8]) -> Result<(), ModelError> {
    let dir = AtomicDir::create(target)?;
    let path = dir.path().join("f");
    fs::write(&path, content).map_err(|e| ModelError::io(&path, e))?;
    dir.commit(true)
}

/// The three ways to replace `target`, each with more than `limit` bytes, must fail and leave the folder as it was.
fn all_writes_fail(folder: &Path) {
    let before = tree(folder);
    let large = vec![1u8; 4 << 20];
    let check = |result: Result<(), ModelError>, name: &str| {
        let error = result.expect_err(name).to_string();
        assert!(error.contains(name), "{error} does not name {name}");
        assert_eq!(tree(folder), before, "after writing {name}");
    };
    check(atomic_write(&folder.join("file"), &large), "file");
    check(write_safetensors(&folder.join("m.safetensors"), 4, |_| {}), "m.safetensors");
    check(write_dir(&folder.join("dir"), &large), "dir");
}

/// Every file below a folder with its content.
fn tree(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(tree(&path));
        } else {
            files.push((path.display().to_string(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

/// A folder with an old file of each kind.
fn fill(folder: &Path) {
    atomic_write(&folder.join("file"), OLD).unwrap();
    atomic_write(&folder.join("m.safetensors"), OLD).unwrap();
    write_dir(&folder.join("dir"), OLD).unwrap();
}

/// Runs one test of this file in another process with a task; `prepare` is a line of shell that goes before it.
fn child(task: &str, target: &Path, prepare: &str) -> Command {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{prepare} exec \"$0\" --exact child_process --nocapture")).arg(program);
    command.env(TASK, task).env(TARGET, target);
    command
}

/// What the child processes do; without a task, there is nothing to do.
#[test]
fn child_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let target = std::env::var_os(TARGET).expect("a target");
    let target = Path::new(&target);
    let tell = |what: &str| {
        let mut out = std::io::stdout();
        writeln!(out, "{what}").and_then(|()| out.flush()).unwrap();
    };
    match task.as_str() {
        "fail" => all_writes_fail(target),
        "safetensors" => write_safetensors(target, 64, |i| {
            tell(&format!("wrote {i}"));
            std::thread::sleep(Duration::from_millis(100));
        })
        .unwrap(),
        "directory" => {
            for round in 0u64.. {
                write_dir(target, &round.to_le_bytes().repeat(1 << 13)).unwrap();
                tell("wrote");
            }
        }
        other => panic!("no task '{other}'"),
    }
}

#[test]
fn a_file_size_limit_leaves_the_old_files() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    // 512 blocks of 512 or 1024 bytes, by the shell: less than the 4 MB that are written. The signal is ignored, so
    // that writing fails with an error.
    let output = child("fail", folder.path(), "trap '' XFSZ; ulimit -f 512;").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), OLD);
}

#[test]
fn a_full_disk_leaves_the_old_files() {
    let folder = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).output();
    if !mount.is_ok_and(|m| m.status.success()) {
        println!("not run: a small file system cannot be mounted here");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        fill(folder.path());
        all_writes_fail(folder.path());
        let read_only = Command::new("mount").args(["-o", "remount,ro"]).arg(folder.path()).status().unwrap();
        assert!(read_only.success());
        all_writes_fail(folder.path());
    });
    Command::new("umount").arg(folder.path()).status().unwrap();
    result.unwrap();
}

#[test]
fn a_folder_that_is_none_or_cannot_be_written_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a-file"), OLD).unwrap();
    let below = folder.path().join("a-file/below");
    assert!(atomic_write(&below, b"x").unwrap_err().to_string().contains("cannot create a file beside"));
    assert!(AtomicFile::create(&folder.path().join("no-folder/f")).is_err());
    assert!(write_dir(&below, b"x").unwrap_err().to_string().contains("cannot create a folder beside"));
    assert!(write_safetensors(&below, 1, |_| {}).is_err());
    assert_eq!(fs::read(folder.path().join("a-file")).unwrap(), OLD);
    assert!(atomic_write(Path::new("/"), b"x").unwrap_err().to_string().contains("expected a file name"));
}

/// Starts a child, waits until it has written, and kills it.
fn kill_while_writing(task: &str, target: &Path) {
    let mut child = child(task, target, "").stdout(Stdio::piped()).spawn().unwrap();
    let mut told = String::new();
    let mut out = child.stdout.take().unwrap();
    let mut chunk = [0; 256];
    while told.matches("wrote").count() < 3 {
        let n = out.read(&mut chunk).unwrap();
        assert!(n > 0, "the child ended too early: {told}");
        told += &String::from_utf8_lossy(&chunk[..n]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_kill_in_the_middle_of_a_file_leaves_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m.safetensors");
    write_safetensors(&target, 1, |_| {}).unwrap();
    let old = fs::read(&target).unwrap();
    kill_while_writing("safetensors", &target);
    assert!(fs::read_dir(folder.path()).unwrap().count() > 1, "the child was in the middle");
    assert_eq!(fs::read(&target).unwrap(), old);
    assert_eq!(Safetensors::open(&target).unwrap().names().count(), 1);
}

#[test]
fn a_kill_while_a_directory_is_replaced_leaves_a_whole_one() {
    for _ in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        write_dir(&target, &0u64.to_le_bytes().repeat(1 << 13)).unwrap();
        kill_while_writing("directory", &target);
        let content = fs::read(target.join("f")).unwrap();
        assert_eq!(content.len(), 8 << 13);
        assert_eq!(content, content[..8].repeat(1 << 13), "one round's content, whole");
    }
}
