//! `edgellm report`: what is whole is shown, what is not is said, and the live page answers to this machine only.

mod common;

use common::Bench;

const STEP: &str = r#"{"event":"step","time_s":1.0,"step":0,"exit":4,"loss":2.5,"grad_norm":1.0}"#;

fn write(bench: &Bench, name: &str, text: &str) {
    std::fs::write(bench.path(name), text).unwrap();
}

fn read(bench: &Bench, name: &str) -> String {
    std::fs::read_to_string(bench.path(name)).unwrap()
}

#[test]
fn a_run_a_measurement_and_a_model_make_one_page() {
    let bench = Bench::new();
    bench.ok(
        "adapt -m model --data train.jsonl --eval-data heldout.jsonl --template alpaca --steps 6 --batch 2 --exits 2 \
         --window 2 -o adapter --metrics run.jsonl",
    );
    bench.ok("measure -m model -o measured.json --bits 3,4 --group-size 32 --text text.txt --calibrate-windows 1 --calibrate-context 64");
    bench.ok("plan --measurement measured.json --target-bpw 5.5 -o policy.toml");
    bench.ok("compress -m model --policy policy.toml --compressor rtn -o small");
    let said = bench.json("report run.jsonl measured.json small -o page.html --title <b>mine");
    assert_eq!((&said["metrics"], &said["models"]), (&1.into(), &1.into()), "{said}");
    let page = read(&bench, "page.html");
    for part in [
        "&lt;b&gt;mine",
        "id=\"loss\"",
        "id=\"time\"",
        "held-out loss",
        "KL in nats that the format costs, this layer alone",
        "bits per weight as stored",
        "in numbers",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<b>mine") && !page.contains("connect-src"));
}

#[test]
fn what_is_whole_is_shown_and_the_rest_is_said() {
    let bench = Bench::new();
    write(&bench, "cut.jsonl", &format!("{STEP}\n{{\"event\":\"st"));
    write(&bench, "new.records.jsonl", "{\"version\":99,\"id\":\"x\"}\n");
    let said = bench.says("report cut.jsonl new.records.jsonl missing.jsonl -o page.html");
    let page = read(&bench, "page.html");
    for words in ["cut.jsonl, line 2", "newer edgellm", "missing.jsonl"] {
        assert!(said.contains(words) && page.contains(words), "{words}: {said}");
    }
    assert!(page.contains("1 steps, not ended"));
    // Nothing whole at all.
    write(&bench, "none.jsonl", "{\"event\":\"st");
    for (run, words) in [("none.jsonl", "none.jsonl"), ("new.records.jsonl", "newer edgellm"), ("text.txt", "text.txt")]
    {
        let error = bench.fails(&format!("report {run} -o other.html"), 1);
        assert!(error.contains(words), "{run}: {error}");
        assert!(!bench.path("other.html").exists());
    }
    bench.fails("report -o page.html", 2);
    bench.fails("report cut.jsonl", 2);
    bench.fails("report cut.jsonl -o missing/page.html", 2);
}

#[cfg(feature = "results")]
mod live {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpStream;
    use std::process::{Child, Stdio};

    use super::common::Bench;
    use super::{STEP, write};

    /// A live page that ends with the test.
    struct Live {
        child: Child,
        port: u16,
    }

    impl Live {
        fn start(bench: &Bench) -> Self {
            let mut command = bench.command(["report", "run.jsonl", "--live", "--quiet"]);
            let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
            let mut address = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
            let port = address.trim().strip_prefix("http://127.0.0.1:").and_then(|rest| rest.strip_suffix('/'));
            let port = port.and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{address}"));
            Self { child, port }
        }

        /// The answer to a request, whole.
        fn ask(&self, line: &str, host: &str) -> String {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
            write!(stream, "{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        }
    }

    impl Drop for Live {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn the_live_page_follows_a_run_and_answers_to_this_machine_only() {
        let bench = Bench::new();
        // A run that has only begun.
        write(&bench, "run.jsonl", "");
        let live = Live::start(&bench);
        let ours = format!("127.0.0.1:{}", live.port);
        let page = live.ask("GET /", &ours);
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("connect-src 'self'"), "{page}");
        assert!(!page.contains("id=\"loss\""));
        write(&bench, "run.jsonl", &format!("{STEP}\n"));
        assert!(live.ask("GET /", &format!("localhost:{}", live.port)).contains("id=\"loss\""));
        for (line, host, status) in [
            ("GET /", "example.com", "403"),
            ("GET /", &*format!("example.com:{}", live.port), "403"),
            ("GET /", "127.0.0.1:1", "403"),
            ("POST /", &*ours, "405"),
            ("GET /other", &*ours, "404"),
        ] {
            let answer = live.ask(line, host);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{line} of {host}: {answer}");
            assert!(!answer.contains("run.jsonl"), "{answer}");
        }
        // No other address of this machine is listened on.
        assert!(TcpStream::connect(("127.0.0.2", live.port)).is_err());
        bench.fails("report missing.jsonl --live", 2);
        bench.fails("report run.jsonl --live -o page.html", 2);
    }

    #[cfg(unix)]
    #[test]
    fn the_live_page_ends_with_a_signal() {
        let bench = Bench::new();
        write(&bench, "run.jsonl", STEP);
        let mut live = Live::start(&bench);
        let status = std::process::Command::new("kill").args(["-INT", &live.child.id().to_string()]).status().unwrap();
        assert!(status.success());
        assert!(live.child.wait().unwrap().success());
    }
}
