//! What goes wrong: one clear sentence, the right exit code, and nothing half-written.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Bench, failed, litter, succeeded};

#[test]
fn usage_errors_exit_with_2() {
    let b = Bench::new();
    b.ok("compress -m model --format q8g32a -o taken");
    std::fs::create_dir(b.path("stuff")).unwrap();
    std::fs::write(b.path("stuff/file"), "mine").unwrap();
    for (line, message) in [
        ("", "Usage"),
        ("dance", "unrecognized subcommand"),
        ("run -m model", "required"),
        ("run -m model -p x --chat", "cannot be used"),
        ("run -m model -p x --raw --system y", "cannot be used"),
        ("run -m model -p x --temp -1", "temperature: expected"),
        ("run -m model -p x --temp 1000", "temperature: expected"),
        ("run -m model -p x --top-p 0", "top-p: expected"),
        ("run -m model -p x --vote loudest", "expected last, max"),
        ("run -m model -p x --dump-logits none/x.safetensors", "the folder none does not exist"),
        ("run -m model --raw -f empty.txt", "at least one token"),
        ("run -m model -p x --device toaster", "expected auto, flex"),
        ("run -m model -p x --threads 0", "--threads"),
        ("measure -m model -o m.json --bits 7", "bit width"),
        ("measure -m model -o m.json --calibrate-windows 0", "--calibrate-windows"),
        ("measure -m model -o m.json --granularity tensor", "expected block or linear"),
        ("measure -m model -o none/m.json", "the folder none does not exist"),
        ("plan --measurement m.json -o p.toml", "required"),
        ("plan --measurement m.json --solver solve --bits 4 -o p.toml", "--target-bpw"),
        ("plan --measurement m.json --target-bpw 0 -o p.toml", "above 0"),
        ("plan --measurement m.json --target-size 60XB -o p.toml", "is no size"),
        ("plan --measurement m.json --target-bpw 5 --pattern 2:4 -o p.toml", "--pattern goes with"),
        ("plan --measurement m.json --solver uniform --bits 4 --pattern 1:4 -o p.toml", "is no pattern"),
        ("plan --measurement m.json --solver uniform --bits 4 --pattern unstructured -o p.toml", "--target-sparsity"),
        (
            "plan --measurement m.json --solver uniform --bits 4 --pattern 2:4 --target-sparsity 0.3 -o p.toml",
            "half of the weights",
        ),
        ("compress -m model -o small", "required"),
        ("compress -m model --format q4g32s-b90 -o small", "not smaller than q4g32s"),
        ("compress -m model --format q7g32a -o small", "--format"),
        ("compress -m model --format q4g32a -o taken", "--force"),
        ("compress -m model --format q4g32a -o stuff --force", "this folder is none"),
        ("compress -m taken --format q4g32a -o taken --force", "another folder than the model"),
        ("adapt -m model --data train.jsonl -o a --weight-decay -1", "--weight-decay"),
        ("adapt -m model --data train.jsonl -o a --steps 0", "--steps"),
        ("adapt -m model --data train.jsonl -o a --exits 9", "number of exits: expected from 1 to 4"),
        ("adapt -m model --data train.jsonl -o a --rank 0", "LoRA rank"),
        ("adapt -m model --data train.jsonl -o a --window 0", "window"),
        ("adapt -m model --data train.jsonl -o a --lr 0", "learning rate"),
        ("adapt -m model --data train.jsonl -o a --targets w_proj", "is no projection"),
        ("adapt -m model --data train.jsonl -o a --exit-schedule random", "expected sequential"),
        ("adapt -m model --data train.jsonl -o taken --force", "replaces an adapter only"),
        ("adapt -m model --data train.jsonl -o a --val-split 0", "is no split; expected a part between 0 and 1"),
        ("adapt -m model --data train.jsonl -o a --val-split 1.5", "is no split"),
        ("adapt -m model --data train.jsonl -o a --val-split -1", "is no split"),
        ("adapt -m model --data train.jsonl -o a --val-split 12", "expected from 1 to 11 of the examples"),
        ("adapt -m model --data train.jsonl --eval-data heldout.jsonl -o a --val-split 2", "cannot be used with"),
        ("adapt -m model --data train.jsonl -o a --data-format xml", "expected jsonl, csv or text"),
        ("adapt -m model --data model -o a", "expected a name that ends with .jsonl, .csv, .txt or .md"),
        ("adapt -m model --data train.jsonl --eval-data model -o a", "expected a name that ends with"),
        ("eval -m model --data model", "expected a name that ends with"),
        ("eval -m model", "required"),
        ("eval -m model --text text.txt --context 2", "--context"),
        ("eval -m model --text text.txt --context 2000", "at most 1024"),
        ("eval -m model --base model --data heldout.jsonl", "--text"),
        ("pull nothing", "expected smollm2-135m-instruct or a Hugging Face id"),
        ("pull ../x/y", "expected smollm2-135m-instruct or a Hugging Face id"),
    ] {
        std::fs::write(b.path("empty.txt"), "").unwrap();
        let errors = b.fails(line, 2);
        assert!(errors.contains(message), "`{line}` said: {errors}");
    }
    assert_eq!(std::fs::read_to_string(b.path("stuff/file")).unwrap(), "mine");
    assert!(!b.path("a").exists() && !b.path("small").exists() && !b.path("m.json").exists());
    assert!(litter(&b.path("")).is_empty());
}

#[test]
#[cfg(not(any(feature = "ndarray", feature = "wgpu")))]
fn devices_that_are_not_built_name_their_feature() {
    let b = Bench::new();
    for device in ["ndarray", "wgpu"] {
        let errors = b.fails(&format!("run -m model -p x --device {device}"), 2);
        assert!(errors.contains(&format!("--features {device}")), "{errors}");
    }
}

#[test]
fn failures_are_one_line_and_exit_with_1() {
    let b = Bench::new();
    let write = |name: &str, content: &str| std::fs::write(b.path(name), content).unwrap();
    write("bad.json", "{\"solver\":");
    write("bad.toml", "solver = \n");
    write("bad.jsonl", "{\"instruction\": \"x\"}\n");
    write("lines.jsonl", "{\"prompt\": \"a\", \"response\": \"b\"}\n\n{\"prompt\": \"a\"}\n");
    write("header.csv", "question;answer\na;b\n");
    write("row.csv", "prompt,response\na,\"b\nb\"\nc\n");
    write("quote.csv", "prompt,response\na,b\nc,\"d\n");
    write("cut.jsonl", &format!("{{\"prompt\": \"{}\", \"response\": \"b\"}}\n", "a".repeat(300)));
    std::fs::write(b.path("latin.txt"), b"a\nna\xefve\n").unwrap();
    write("bad.gguf", "not a model");
    write("short.txt", "abc");
    for (line, message) in [
        ("run -m nowhere -p x", "no file, no folder and no stored model"),
        ("run -m smollm2-135m-instruct -p x", "run `edgellm pull smollm2-135m-instruct` first"),
        ("run -m bad.gguf -p x", "bad.gguf"),
        ("run -m model -f none.txt", "none.txt"),
        ("run -m model -p x --adapter model", "adapter_config.json"),
        ("run -m model --messages bad.json", "chat messages: expected"),
        ("inspect bad.json", "expected JSON"),
        ("inspect bad.toml", "expected TOML"),
        ("inspect text.txt", "text.txt"),
        ("plan --measurement bad.json --target-bpw 4 -o p.toml", "bad.json"),
        ("plan --measurement none.json --target-bpw 4 -o p.toml", "none.json"),
        ("compress -m model --policy bad.toml -o small", "bad.toml"),
        ("adapt -m model --data bad.jsonl -o a", "bad.jsonl line 1: expected a text as 'output'"),
        ("adapt -m model --data none.jsonl -o a", "none.jsonl"),
        ("adapt -m model --data lines.jsonl -o a", "lines.jsonl line 3: expected a text as 'response', found nothing"),
        ("adapt -m model --data header.csv -o a", "header.csv line 1: expected a header row with the columns"),
        ("adapt -m model --data header.csv -o a --skip-bad-lines", "found the columns [question;answer]"),
        ("adapt -m model --data row.csv -o a", "row.csv line 4: expected 2 fields, as in the header, found 1"),
        ("adapt -m model --data quote.csv -o a --skip-bad-lines", "quote.csv line 3: expected a quote that ends"),
        ("adapt -m model --data latin.txt -o a", "latin.txt line 2: expected UTF-8, found other bytes at offset 2"),
        ("adapt -m model --data cut.jsonl -o a", "expected a response within the first 256 tokens of some example"),
        ("adapt -m model --data bad.jsonl -o a --skip-bad-lines", "found none: 1 without the fields of an example"),
        ("adapt -m model --data train.jsonl -o a --data-format csv", "train.jsonl line 1: expected a header row"),
        ("eval -m model --data row.csv", "row.csv line 4: expected 2 fields"),
        ("eval -m model --text short.txt --context 512", "expected at least 512, found 3"),
    ] {
        let errors = b.fails(line, 1);
        assert!(errors.contains(message), "`{line}` said: {errors}");
        let lines: Vec<&str> = errors.lines().collect();
        assert!(lines.len() == 1 && lines[0].starts_with("error: "), "`{line}` said: {errors}");
    }
    assert!(!b.path("a").exists() && !b.path("small").exists() && !b.path("p.toml").exists());
    assert!(litter(&b.path("")).is_empty());
}

#[test]
fn a_truncated_model_is_refused_by_name() {
    let b = Bench::new();
    let weights = std::fs::read(b.path("model/model.safetensors")).unwrap();
    for len in [0, 4, 100, weights.len() / 2, weights.len() - 1] {
        std::fs::write(b.path("model/model.safetensors"), &weights[..len]).unwrap();
        for line in ["run -m model -p x", "inspect model", "compress -m model --format q4g32a -o small"] {
            assert!(b.fails(line, 1).contains("model.safetensors"), "{len} bytes");
        }
    }
    assert!(!b.path("small").exists());
    std::fs::write(b.path("model/model.safetensors"), &weights).unwrap();
    b.ok("run -m model -p x -n 1");
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let b = Bench::new();
    std::fs::write(b.path("long.txt"), "x".repeat(1100)).unwrap();
    assert!(b.fails("run -m model --raw -f long.txt -n 1", 1).contains("at most 1024 tokens"));
    // Generation ends at the context.
    std::fs::write(b.path("long.txt"), "x".repeat(1020)).unwrap();
    let ids = b.json("run -m model --raw -f long.txt -n 100")["token_ids"].as_array().unwrap().len();
    assert!(ids <= 4, "{ids}");
}

#[test]
fn verbose_shows_causes_and_quiet_shows_nothing_but_errors() {
    let b = Bench::new();
    let quiet = b.output(["run", "-m", "model", "-p", "x", "-n", "2", "-q"]);
    succeeded(&quiet);
    assert!(quiet.stderr.is_empty(), "{}", String::from_utf8_lossy(&quiet.stderr));
    let errors = failed(&b.output(["-q", "run", "-m", "nowhere", "-p", "x"]), 1);
    assert!(errors.starts_with("error: "), "{errors}");
    assert!(b.fails("run -m model -p x -q -v", 2).contains("cannot be used"));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let b = Bench::new();
    for line in ["devices -v", "run -m model -p x -n 50", "inspect model -v", "--help"] {
        let mut command = b.command(line.split(' '));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{line}");
        assert_eq!(output.status.code(), Some(0), "{line}");
    }
}

#[test]
fn pulling_without_python_says_what_to_install() {
    let b = Bench::new();
    let output = b.command(["pull", "smollm2-135m-instruct"]).env("PATH", b.path("")).output().unwrap();
    let errors = failed(&output, 1);
    assert!(errors.contains("install Python 3 with pip"), "{errors}");
    assert!(litter(&b.path("home")).is_empty());
}

/// Starts a long tuning run and waits until it has done some steps.
#[cfg(unix)]
fn long_run(b: &Bench, more: &[&str]) -> Child {
    let args = ["adapt", "-m", "model", "--data", "train.jsonl", "-o", "adapter", "--steps", "1000000"];
    let args = args.iter().chain(&["--exits", "2", "--batch", "1", "--metrics", "metrics.jsonl", "--json"]).chain(more);
    let child = b.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while std::fs::read_to_string(b.path("metrics.jsonl")).unwrap_or_default().lines().count() < 3 {
        assert!(start.elapsed() < Duration::from_secs(120), "no step was done");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
#[cfg(unix)]
fn ctrl_c_keeps_what_was_learned() {
    let b = Bench::new();
    let child = long_run(&b, &[]);
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    let errors = failed(&output, 130);
    assert!(errors.contains("stopped after"), "{errors}");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["stopped"], true);
    assert!(json["steps"].as_u64().unwrap() >= 3);
    b.ok("run -m model --adapter adapter -p x -n 2");
    assert!(litter(&b.path("")).is_empty());
}

#[test]
#[cfg(unix)]
fn a_killed_run_leaves_the_old_adapter() {
    let b = Bench::new();
    b.ok("adapt -m model --data train.jsonl -o adapter --steps 2 --exits 2 --batch 1");
    let old = std::fs::read(b.path("adapter/adapter_model.safetensors")).unwrap();
    let mut child = long_run(&b, &["--force"]);
    signal(&child, "-KILL");
    child.wait().unwrap();
    assert_eq!(std::fs::read(b.path("adapter/adapter_model.safetensors")).unwrap(), old);
    b.ok("run -m model --adapter adapter -p x -n 2");
}

#[test]
#[cfg(unix)]
fn a_measurement_that_was_stopped_or_killed_goes_on() {
    let b = Bench::new();
    let flags = "--granularity linear --bits 2,4 --text text.txt --calibrate-context 128 --calibrate-windows 8";
    b.ok(&format!("measure -m model -o whole.json {flags}"));
    for (name, code) in [("-INT", Some(130)), ("-KILL", None)] {
        let command = format!("measure -m model -o m.json {flags}");
        let mut child = b.command(command.split(' ')).stderr(Stdio::null()).spawn().unwrap();
        while !b.path("m.json.partial").exists() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), code);
        assert!(!b.path("m.json").exists());
        let said = b.command(command.split(' ')).output().unwrap();
        assert!(String::from_utf8_lossy(&said.stderr).contains("going on after"), "{said:?}");
        let read = |name: &str| std::fs::read(b.path(name)).unwrap();
        assert_eq!(read("m.json"), read("whole.json"));
        assert!(!b.path("m.json.partial").exists());
        std::fs::remove_file(b.path("m.json")).unwrap();
    }
    assert!(litter(&b.path("")).is_empty());
}

/// A small file system of its own, unmounted at the end. `None` where this user may not mount one.
#[cfg(target_os = "linux")]
struct SmallDisk<'a>(&'a Path);

#[cfg(target_os = "linux")]
impl<'a> SmallDisk<'a> {
    fn mount(path: &'a Path, size: &str) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let option = format!("size={size}");
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", &option, "none"]).arg(path).stderr(Stdio::null());
        mount.status().is_ok_and(|s| s.success()).then_some(Self(path))
    }

    fn make_read_only(&self) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-o", "remount,ro"]).arg(self.0).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
#[cfg(target_os = "linux")]
#[allow(clippy::print_stderr, reason = "says that it was not run")]
fn a_full_or_read_only_disk_keeps_the_old_files() {
    let b = Bench::new();
    let path = b.path("disk");
    let Some(disk) = SmallDisk::mount(&path, "240k") else {
        eprintln!("not run: this user may not mount a file system");
        return;
    };
    b.ok("compress -m model --format q2g32s -o disk/small");
    b.ok("adapt -m model --data train.jsonl -o disk/adapter --steps 2 --exits 2 --batch 1 --targets q_proj");
    let old = |name: &str| std::fs::read(path.join(name)).unwrap();
    let (weights, config) = (old("small/model.safetensors"), old("small/config.json"));
    let adapter = old("adapter/adapter_model.safetensors");

    for line in [
        "compress -m model --format q8g32a -o disk/small --force",
        "run -m model --raw -f text.txt -n 0 --dump-logits disk/logits.safetensors",
        "adapt -m model --data train.jsonl -o disk/adapter --steps 2 --exits 2 --batch 1 --rank 64 --force",
    ] {
        let errors = b.fails(line, 1);
        assert!(errors.contains("No space left"), "`{line}` said: {errors}");
        assert!(litter(&path).is_empty());
    }
    assert!(disk.make_read_only());
    for line in [
        "compress -m model --format q2g32a -o disk/small --force",
        "compress -m model --format q2g32a -o disk/other",
        "adapt -m model --data train.jsonl -o disk/adapter --steps 2 --exits 2 --batch 1 --force",
        "measure -m model -o disk/m.json --bits 4 --group-size 32 --calibrate-windows 1 --calibrate-context 32",
    ] {
        let errors = b.fails(line, 1);
        assert!(errors.contains("Read-only file system"), "`{line}` said: {errors}");
    }
    assert_eq!(old("small/model.safetensors"), weights);
    assert_eq!(old("small/config.json"), config);
    assert_eq!(old("adapter/adapter_model.safetensors"), adapter);
    b.ok("run -m disk/small --adapter disk/adapter -p x -n 2");
}
