//! Analytics of the command: metrics, traces, and the page for Prometheus.

mod common;

use common::Bench;
use serde_json::Value;

fn lines(b: &Bench, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(b.path(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

/// The blocks of the tiny model.
fn blocks(b: &Bench) -> usize {
    let config: Value = serde_json::from_slice(&std::fs::read(b.path("model/config.json")).unwrap()).unwrap();
    usize::try_from(config["num_hidden_layers"].as_u64().unwrap()).unwrap()
}

#[test]
fn a_run_tells_the_time_of_each_layer() {
    let b = Bench::new();
    b.ok("run -m model -p hello -n 24 --metrics m.jsonl --quiet");
    let events = lines(&b, "m.jsonl");
    let decode: Vec<&Value> = events.iter().filter(|e| e["event"] == "layers" && e["pass"] == "decode").collect();
    assert!(!decode.is_empty());
    let tokens: f64 = decode.iter().map(|e| number(&e["tokens"])).sum();
    assert!((1.0..=24.0).contains(&tokens), "{tokens}");
    for event in decode {
        let layers = event["layers"].as_array().unwrap();
        assert_eq!(layers.len(), blocks(&b));
        let sum: f64 = layers.iter().map(|layer| number(&layer["ms"])).sum();
        let (total, head) = (number(&event["ms"]), number(&event["operators"]["head"]));
        assert!(sum > 0.0 && sum <= total && sum + head > 0.3 * total, "{sum} + {head} of {total}");
        for layer in layers {
            assert!(number(&layer["bits"]) > 1.0 && number(&layer["bytes"]) > 0.0, "{layer}");
            assert_eq!(layer["sparsity"], 0.0);
            let operators = layer["operators"].as_object().unwrap();
            for name in ["norm", "qkv", "attention", "o", "gate_up", "down"] {
                assert!(operators.contains_key(name), "{name}: {layer}");
            }
            let parts: f64 = operators.values().map(number).sum();
            assert!(parts <= number(&layer["ms"]) * 1.05 + 0.002, "{layer}");
        }
    }
    assert!(events.iter().any(|e| e["event"] == "activations" && e["layers"].as_array().unwrap().len() == blocks(&b)));
}

#[test]
fn tuning_tells_layers_gradients_and_exits_beside_its_steps() {
    let b = Bench::new();
    let adapt = "adapt -m model --data train.jsonl --steps 3 --exits 2 --window 1 --batch 2 -o adapter --quiet";
    b.ok(&format!("{adapt} --metrics m.jsonl"));
    let events = lines(&b, "m.jsonl");
    let of = |name: &str| events.iter().filter(|e| e["event"] == name).collect::<Vec<_>>();
    assert_eq!(of("step").len(), 3);
    let tune = of("layers").into_iter().find(|e| e["pass"] == "tune").expect("an event of tuning");
    assert_eq!(tune["passes"], 3);
    let backward = |layer: &Value| layer["operators"].as_object().unwrap().contains_key("down_backward");
    assert!(tune["layers"].as_array().unwrap().iter().any(backward), "{tune}");
    let gradients = of("gradients")[0]["layers"].as_array().unwrap();
    assert!(!gradients.is_empty() && gradients.iter().all(|layer| number(&layer["norm"]) > 0.0));
    let chosen: f64 = of("exits")[0]["chosen"].as_object().unwrap().values().map(number).sum();
    assert_eq!(chosen, 3.0);
}

#[test]
fn a_vote_tells_who_won() {
    let b = Bench::new();
    b.ok("run -m model -p hello -n 5 --vote max --metrics m.jsonl --quiet");
    let events = lines(&b, "m.jsonl");
    let exits = events.iter().find(|e| e["event"] == "exits").expect("an event of exits");
    let won: f64 = exits["votes_won"].as_object().unwrap().values().map(number).sum();
    assert!((1.0..=5.0).contains(&won), "{exits}");
}

#[test]
fn a_trace_is_json_with_spans_in_one_another() {
    let b = Bench::new();
    b.ok("run -m model -p hello -n 5 --trace t.json --quiet");
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(b.path("t.json")).unwrap()).unwrap();
    let named = |name: &str| events.iter().filter(|e| e["ph"] == "X" && e["name"] == name).collect::<Vec<_>>();
    assert_eq!(named("prefill").len(), 1);
    assert_eq!(named("block").len(), (named("decode").len() + 1) * blocks(&b));
    assert_eq!(named("qkv").len(), named("block").len());
    let span = |e: &Value| (number(&e["ts"]), number(&e["ts"]) + number(&e["dur"]), number(&e["tid"]));
    let mut spans: Vec<_> = events.iter().filter(|e| e["ph"] == "X").map(span).collect();
    spans.sort_by(|a, b| a.2.total_cmp(&b.2).then(a.0.total_cmp(&b.0)).then(b.1.total_cmp(&a.1)));
    let mut open: Vec<(f64, f64, f64)> = Vec::new();
    for span in spans {
        // Times are written to a nanosecond.
        open.retain(|outer| outer.2 == span.2 && outer.1 > span.0 + 0.002);
        assert!(open.iter().all(|outer| span.1 <= outer.1 + 0.002), "{span:?} in {open:?}");
        open.push(span);
    }
}

#[cfg(unix)]
#[test]
fn a_stopped_command_leaves_whole_files() {
    let b = Bench::new();
    let args = "adapt -m model --data train.jsonl -o adapter --steps 1000000 --quiet --metrics m.jsonl --trace t.json";
    let mut child = b.command(args.split_whitespace()).spawn().unwrap();
    let start = std::time::Instant::now();
    while std::fs::read_to_string(b.path("m.jsonl")).unwrap_or_default().lines().count() < 3 {
        assert!(start.elapsed().as_secs() < 120, "no step was done");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let killed = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(b.path("t.json")).unwrap()).unwrap();
    assert_eq!(events.last().unwrap()["name"], "end");
    assert!(lines(&b, "m.jsonl").iter().any(|e| e["event"] == "layers"));
}

#[test]
fn places_that_cannot_be_written_are_refused() {
    let b = Bench::new();
    assert!(b.fails("run -m model -p x --metrics nowhere/m.jsonl", 2).contains("does not exist"));
    assert!(b.fails("run -m model -p x --trace .", 2).contains("found a folder"));
    assert!(b.fails("run -m model -p x --trace t --metrics t", 2).contains("two files"));
    assert!(b.fails("bench -m model -t 1,2 --trace t.json", 2).contains("one number of threads"));
}

#[test]
fn figures_do_not_come_to_the_terminal() {
    let b = Bench::new();
    let said = b.says("run -m model -p hello -n 3 -vvv --metrics m.jsonl");
    assert!(!said.contains("rms=") && said.lines().count() < 40, "{said}");
}

#[cfg(all(unix, feature = "prometheus"))]
#[test]
fn a_page_answers_while_the_command_runs() {
    use std::io::{BufRead, BufReader, Read, Write};
    let b = Bench::new();
    let args = "adapt -m model --data train.jsonl -o adapter --steps 1000000 --metrics-address 0";
    let mut child = b.command(args.split_whitespace()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = said.find_map(|line| line.unwrap().strip_prefix("metrics: http://").map(str::to_owned)).unwrap();
    let address = line.strip_suffix("/metrics").unwrap().to_owned();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    let reader = std::thread::spawn(move || said.for_each(drop));
    let start = std::time::Instant::now();
    let page = loop {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        if page.contains("edgellm_layer_seconds_total{pass=\"tune\"") {
            break page;
        }
        assert!(start.elapsed().as_secs() < 60, "{page}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("version=0.0.4"), "{page}");
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
}
