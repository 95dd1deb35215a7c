//! Rows that end early, and adb's command sequence against a program that only looks like adb.

use super::*;

fn one(table: &str) -> Device {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("matrix.toml");
    fs::write(&path, format!("[[device]]\nname = \"x\"\n{table}\n")).unwrap();
    matrix::read(&path).unwrap().remove(0)
}

#[test]
fn a_device_without_an_address_is_not_run() {
    let row = row(&one("transport = \"ssh\""), false);
    assert_eq!((row.outcome, row.reason.as_deref()), (Outcome::NotRun, Some("no address given (host)")));
}

#[test]
fn a_device_that_does_not_answer_is_not_run() {
    if !repo::has_program("ssh") {
        return;
    }
    // Nothing listens on port 1.
    let row = row(&one("transport = \"ssh\"\nhost = \"127.0.0.1\"\nport = 1"), false);
    assert_eq!(row.outcome, Outcome::NotRun);
    assert!(row.reason.unwrap().starts_with("the device is gone (ssh: connect to host 127.0.0.1 port 1"));
}

#[test]
fn a_row_is_shown_with_what_it_found() {
    let failed = Row { parts: vec![part("bench", "100")], ..row(&one("transport = \"ssh\""), false) };
    let run = Run { time: "20260101-000000".into(), commit: "abc".into(), rows: vec![failed] };
    let markdown = table::markdown(&run);
    assert!(markdown.contains("| x<br>ssh | not run: no address given (host) | bench: 100 |"), "{markdown}");
    let html = table::html(&run);
    assert!(html.contains("<tr class=\"not-run\"><td>x<br>ssh</td>"), "{html}");
    let read: Run = serde_json::from_str(&serde_json::to_string(&run).unwrap()).unwrap();
    assert_eq!(read.rows[0].parts[0].detail, "100");
}

fn part(name: &str, detail: &str) -> results::PartResult {
    results::PartResult {
        part: name.into(),
        outcome: Outcome::Passed,
        detail: detail.into(),
        seconds: 1.0,
        figures: std::collections::BTreeMap::new(),
    }
}

/// A program that looks like adb to its caller: it records how it is called, and the device is a folder of this machine.
/// What is tested with it is the sequence of commands, not Android.
struct FakeAdb {
    folder: tempfile::TempDir,
}

#[cfg(unix)]
impl FakeAdb {
    fn new(behaviour: &str) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let calls = folder.path().join("calls");
        let script = format!(
            "#!/bin/sh\necho \"$*\" >> '{}'\n[ \"$1 $2\" = \"-s SERIAL\" ] || exit 9\nshift 2\n{behaviour}\n\
             case $1 in shell) exec sh -c \"$2\";; push) exec cp \"$2\" \"$3\";; esac\nexit 8\n",
            calls.display()
        );
        let program = folder.path().join("adb");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    fn transport(&self) -> Transport {
        let remote = self.folder.path().join("remote").display().to_string();
        Transport::adb(self.folder.path().join("adb").to_str().unwrap(), "SERIAL", remote)
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        let here = format!("{}/", self.folder.path().display());
        text.lines().map(|line| line.replace(&here, "")).collect()
    }
}

const LIMIT: Duration = Duration::from_secs(60);

#[cfg(unix)]
#[test]
fn adb_pushes_what_changed_runs_and_cleans_up() {
    let fake = FakeAdb::new("");
    let transport = fake.transport();
    transport.reach().unwrap();
    assert_eq!(fake.calls(), ["-s SERIAL shell true && mkdir -p remote && uname -m"]);

    let command = fake.folder.path().join("command");
    fs::write(&command, "#!/bin/sh\necho ran \"$@\"\n").unwrap();
    let programs = artifacts::Programs::stand_in(command.clone());
    let first = artifacts::push(&transport, &programs, LIMIT).unwrap();
    assert!(first.files > 5 && first.kept == 0);
    let calls = fake.calls();
    let at = calls.iter().position(|call| call == "-s SERIAL push command remote/edgellm.part").unwrap();
    assert_eq!(calls[at - 1], "-s SERIAL shell cd remote && mkdir -p .");
    assert_eq!(calls[at + 1], "-s SERIAL shell cd remote && chmod 755 edgellm.part && mv edgellm.part edgellm");

    let second = artifacts::push(&transport, &programs, LIMIT).unwrap();
    assert_eq!((second.files, second.kept), (0, first.files));
    fs::write(&command, "#!/bin/sh\necho ran again \"$@\"\n").unwrap();
    assert_eq!(artifacts::push(&transport, &programs, LIMIT).unwrap().files, 1);

    assert_eq!(transport.program("edgellm", &["a", "b c"], LIMIT).unwrap(), "ran again a b c\n");
    let call = fake.calls().pop().unwrap();
    assert!(call.starts_with("-s SERIAL shell cd remote && exec $(command -v timeout"), "{call}");
    assert!(call.ends_with("&& echo timeout 61) ./edgellm a 'b c'"), "{call}");
    transport.remove().unwrap();
    assert!(!fake.folder.path().join("remote").exists());
}

#[cfg(unix)]
#[test]
fn a_device_that_goes_or_is_full_ends_its_row() {
    for (behaviour, wanted) in [
        ("echo 'error: device offline' >&2; exit 1", "the device is gone (error: device offline)"),
        ("[ $1 = push ] && { echo 'adb: error: No space left on device' >&2; exit 1; }", "no space left on the device"),
        ("case $2 in *df*) echo 'x 1 1 0 1% /'; exit 0;; esac", "no space on the device: "),
    ] {
        let fake = FakeAdb::new(behaviour);
        let (transport, command) = (fake.transport(), fake.folder.path().join("command"));
        fs::write(&command, vec![0; 4_000_000]).unwrap();
        fs::create_dir_all(fake.folder.path().join("remote")).unwrap();
        match artifacts::push(&transport, &artifacts::Programs::stand_in(command), LIMIT).map(drop) {
            Err(Failure::Lost(reason)) => assert!(reason.starts_with(wanted), "{reason}"),
            other => panic!("{behaviour}: {other:?}"),
        }
    }
}
