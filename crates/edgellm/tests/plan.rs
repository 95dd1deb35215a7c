//! `edgellm plan` on made-up measurements and profiles: budgets, explanations, curves, and what is refused.

mod common;

use common::{Bench, profile};
use serde_json::{Value, json};

/// Options of 3, 5 and 9 bits per weight with scales, and their damage.
const OPTIONS: [(u8, f64); 3] = [(2, 0.4), (4, 0.02), (8, 0.0001)];

/// A measurement of two blocks and an embedding; the damage of a unit is that of the option times its factor.
fn measurement(b: &Bench, name: &str, change: impl FnOnce(&mut Value)) {
    let option = |(bits, _): (u8, f64)| json!({"bit_width": bits, "group_size": 32, "symmetric": false});
    let matrix = |name: String, rows: usize, cols: usize| json!({"name": name, "rows": rows, "cols": cols});
    let unit = |unit: &str, matrices: Vec<Value>, factor: f64| {
        let damage: Vec<f64> = OPTIONS.iter().map(|o| factor * o.1).collect();
        json!({"unit": unit, "matrices": matrices, "local": damage, "kl": damage})
    };
    let block = |index: usize, factor: f64| {
        let shapes = [
            ("self_attn.q_proj", 64, 64),
            ("self_attn.k_proj", 32, 64),
            ("self_attn.v_proj", 32, 64),
            ("self_attn.o_proj", 64, 64),
            ("mlp.gate_proj", 160, 64),
            ("mlp.up_proj", 160, 64),
            ("mlp.down_proj", 64, 160),
        ];
        let matrices = shapes.map(|(n, rows, cols)| matrix(format!("model.layers.{index}.{n}.weight"), rows, cols));
        unit(&format!("block.{index}"), matrices.to_vec(), factor)
    };
    let mut value = json!({
        "format_version": 2, "model": "made up", "model_digest": "", "compressor": "rtn", "granularity": "block",
        "calibration_tokens": 1, "compared_tokens": 1, "calibration_digest": "",
        "options": OPTIONS.map(option),
        "units": [
            unit("embedding", vec![matrix("model.embed_tokens.weight".into(), 288, 64)], 1.0),
            block(0, 3.0),
            block(1, 0.5),
        ],
    });
    change(&mut value);
    std::fs::write(b.path(name), value.to_string()).unwrap();
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

#[test]
fn milliseconds_and_memory_are_kept_together_with_bytes() {
    let b = Bench::new();
    measurement(&b, "m.json", |_| {});
    profile(&b, "d.json", |_| {});
    let plan = "plan --measurement m.json --profile d.json -o p.toml";
    // 18432 weights of the embedding and 43008 of each block; 25 us beside products.
    let weights = 18432.0 + 2.0 * 43008.0;
    let wide = b.json(&format!("{plan} --target-ms 1000 --threads 1"));
    assert!((number(&wide, "milliseconds") - (weights * 8.0 * 1e-6 + 0.025)).abs() < 1e-5, "{wide}");
    let two = b.json(&format!("{plan} --target-ms 1000"));
    assert!((number(&two, "milliseconds") - (weights * 4.0 * 1e-6 + 0.025)).abs() < 1e-5, "{two}");
    for target in [0.15, 0.2, 0.3] {
        let found = b.json(&format!("{plan} --target-ms {target}"));
        assert!(number(&found, "milliseconds") <= target, "{found}");
        assert!(number(&found, "kl_per_ms") > 0.0 && number(&found, "kl_per_byte") == 0.0, "{found}");
    }
    let all = b.json(&format!("{plan} --target-ms 0.25 --target-bpw 6 --target-peak 400kB"));
    assert!(number(&all, "milliseconds") <= 0.25 && number(&all, "bits_per_weight") <= 6.0, "{all}");
    assert!(number(&all, "peak_bytes") <= 400e3 && number(&all, "peak_bytes") > number(&all, "bytes"), "{all}");
    assert!(std::fs::read_to_string(b.path("p.toml")).unwrap().contains("peak_bytes = 400000"));
    // A longer text takes more memory.
    let long = b.json(&format!("{plan} --target-ms 0.25 --context 4096"));
    let short = b.json(&format!("{plan} --target-ms 0.25 --context 16"));
    assert!(number(&long, "peak_bytes") > number(&short, "peak_bytes") + 4000.0 * 2.0 * 2.0 * 32.0 * 2.0);
    for solver in ["uniform", "paper"] {
        let found = b.json(&format!("{plan} --solver {solver} --target-ms 0.25"));
        assert!(number(&found, "milliseconds") <= 0.25, "{found}");
    }
}

#[test]
fn impossible_budgets_say_what_the_least_is() {
    let b = Bench::new();
    measurement(&b, "m.json", |_| {});
    profile(&b, "d.json", |_| {});
    let plan = "plan --measurement m.json --profile d.json -o p.toml";
    for (budget, least) in [
        ("--target-bpw 2", "39168 bytes (3.000 bits per weight)"),
        ("--target-ms 0.1", "at least 0.1294 ms per token"),
        ("--target-ms 0.001", "at least 0.1294 ms per token"),
        ("--target-peak 1kB", "bytes of memory"),
        ("--target-ms 0.1 --target-bpw 2", "3.000 bits per weight) and 0.1294 ms per token"),
    ] {
        for solver in ["solve", "uniform", "paper --step 0"] {
            let message = b.fails(&format!("{plan} --solver {solver} {budget}"), 1);
            assert!(message.contains("at least") && message.contains(least), "{solver} {budget}: {message}");
        }
    }
    assert!(!b.path("p.toml").exists());
}

#[test]
fn an_explanation_names_the_neighbours() {
    let b = Bench::new();
    measurement(&b, "m.json", |_| {});
    let found = b.json("plan --measurement m.json --target-bpw 6 --explain -o p.json");
    let units = found["explain"]["units"].as_array().unwrap();
    assert_eq!((units.len(), &found["explain"]["scarce"]), (3, &"bytes".into()));
    assert!(number(&found, "kl_per_byte") > 0.0);
    for unit in units {
        let now = unit["format"].as_str().unwrap();
        let at = OPTIONS.iter().position(|o| now == format!("q{}g32a", o.0)).unwrap();
        let name = |at: Option<usize>| at.and_then(|at| OPTIONS.get(at)).map(|o| format!("q{}g32a", o.0));
        assert_eq!(unit["better"]["format"].as_str().map(String::from), name(Some(at + 1)));
        assert_eq!(unit["worse"]["format"].as_str().map(String::from), name(at.checked_sub(1)));
        if at > 0 {
            assert!(number(&unit["worse"], "delta_bytes") < 0.0 && number(&unit["worse"], "delta_kl") > 0.0, "{unit}");
        }
    }
    let text = b.ok("plan --measurement m.json --target-bpw 6 --explain -o p.json");
    assert!(text.contains("next better") && text.contains("one more MB would save"), "{text}");
}

#[test]
fn curves_are_tables_and_charts() {
    let b = Bench::new();
    measurement(&b, "m.json", |_| {});
    let found = b.json("plan --measurement m.json --pareto 2:9:1");
    let points = found["points"].as_array().unwrap();
    assert_eq!(points.len(), 3 * 8);
    let kl = |solver: &str, budget: f64| {
        let point = points.iter().find(|p| p["solver"] == solver && p["budget_bits_per_weight"] == budget).unwrap();
        point["kl"].as_f64()
    };
    assert_eq!(kl("solve", 2.0), None);
    for budget in [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0] {
        let best = kl("solve", budget).unwrap();
        assert!(["uniform", "paper"].iter().all(|s| kl(s, budget).is_none_or(|other| best <= other)), "{budget}");
    }
    let lines = "{\"label\": \"measured\", \"bytes\": 60000, \"kl\": 0.1}\n\n{\"label\": \"measured\", \"bytes\": 90000, \"kl\": 0.01}\n";
    std::fs::write(b.path("x.jsonl"), lines).unwrap();
    let text = b.ok("plan --measurement m.json --pareto 3,6 --solvers solve --chart c.svg --measured x.jsonl");
    assert!(text.contains("solve") && !text.contains("paper") && text.contains("c.svg"), "{text}");
    let svg = std::fs::read_to_string(b.path("c.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("measured") && svg.contains("solve (predicted)"));
    std::fs::write(b.path("x.jsonl"), "{\"label\": \"a\", \"bytes\": 1, \"kl\": -1}\n").unwrap();
    let bad = b.fails("plan --measurement m.json --pareto 3,6 --chart c.svg --measured x.jsonl", 1);
    assert!(bad.contains("line 1"), "{bad}");
    assert!(b.fails("plan --measurement m.json --pareto 1,2", 1).contains("3.000 bits per weight"));
    for usage in ["--pareto 3:2:1", "--pareto 3 -o p.toml", "--pareto 3 --target-bpw 3", "--chart c.svg", ""] {
        b.fails(&format!("plan --measurement m.json {usage}"), 2);
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let b = Bench::new();
    measurement(&b, "m.json", |_| {});
    profile(&b, "d.json", |_| {});
    for usage in [
        "--target-ms 1",
        "--target-peak 1MB",
        "--target-ms nan --profile d.json",
        "--target-ms -1 --profile d.json",
        "--target-bpw 0",
        "--target-bpw 3 --sensitivity loud",
    ] {
        b.fails(&format!("plan --measurement m.json {usage} -o p.toml"), 2);
    }
    let plan = "plan --measurement m.json -o p.toml --profile d.json --target-ms 1";
    assert!(b.fails(&format!("{plan} --threads 3"), 1).contains("1, 2"));
    profile(&b, "d.json", |d| d["format_version"] = json!(1));
    assert!(b.fails(plan, 1).contains("expected 2, found 1"));
    profile(&b, "d.json", |d| d["decode"] = json!([]));
    assert!(b.fails(plan, 1).contains("edgellm profile"));
    profile(&b, "d.json", |d| d["decode"][1]["formats"][0]["ns_per_weight"] = json!(-1.0));
    assert!(b.fails(plan, 1).contains("decode"));
    let refused = |change: &dyn Fn(&mut Value), expected: &str| {
        measurement(&b, "m.json", change);
        let message = b.fails("plan --measurement m.json --target-bpw 6 -o p.toml", 1);
        assert!(message.contains(expected), "{message}");
    };
    refused(&|m| m["format_version"] = json!(1), "expected 2, found 1");
    refused(&|m| m["units"][1]["kl"][0] = json!(-0.5), "sensitivities of block.0");
    refused(&|m| m["units"][1]["kl"][0] = Value::Null, "measurement");
    refused(&|m| m["units"][2]["local"] = json!([1.0]), "one per option");
    // JSON has no NaN; TOML does.
    measurement(&b, "m.json", |_| {});
    let text = std::fs::read_to_string(b.path("m.json")).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let toml = toml_of(&value).replacen("0.4", "nan", 1);
    std::fs::write(b.path("m.toml"), toml).unwrap();
    let message = b.fails("plan --measurement m.toml --target-bpw 6 -o p.toml", 1);
    assert!(message.contains("finite") && message.contains("NaN"), "{message}");
}

fn toml_of(value: &Value) -> String {
    toml::to_string(value).unwrap()
}

#[test]
fn measurements_of_another_model_are_refused() {
    let b = Bench::new();
    measurement(&b, "m.json", |m| m["model_digest"] = json!("0123"));
    let message = b.fails("plan --measurement m.json --target-bpw 6 -m model -o p.toml", 1);
    assert!(message.contains("0123") && message.contains("digest"), "{message}");
    // The message names the model's own digest, with which the measurement is taken.
    let own = message.split(|c: char| !c.is_ascii_hexdigit()).find(|word| word.len() == 64).unwrap().to_string();
    measurement(&b, "m.json", |m| m["model_digest"] = json!(own));
    b.ok("plan --measurement m.json --target-bpw 6 -m model -o p.toml");
    let policy = std::fs::read_to_string(b.path("p.toml")).unwrap();
    assert!(policy.contains(&format!("model_digest = \"{own}\"")) && policy.contains("compressor = \"rtn\""));
}

#[test]
fn a_compressed_model_shows_its_policy() {
    let b = Bench::new();
    b.ok("measure -m model -o m.json --bits 2,4 --group-size 32 --scales f16 --compressor rtn --calibrate-windows 1 --calibrate-context 64");
    b.ok("plan --measurement m.json --target-bpw 4.5 -o p.toml");
    b.ok("compress -m model --policy p.toml -o small");
    let text = b.ok("inspect small --chart c.svg");
    for part in ["'solve'", "4.5 bits per weight", "measurement", "rtn", "█"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = b.json("inspect small");
    assert_eq!((&json["policy"]["solver"], &json["policy"]["compressor"]), (&"solve".into(), &"rtn".into()));
    assert!(std::fs::read_to_string(b.path("c.svg")).unwrap().contains("block.3"));
    assert!(b.ok("inspect p.toml").contains("4.5 bits per weight"));
    b.fails("inspect model --chart c.svg", 2);
    b.fails("inspect p.toml --chart c.svg", 2);
    b.ok("compress -m model --format q4g32a-2:4 -o pruned");
    assert!(b.ok("inspect pruned").contains("50%"));
    assert_eq!(b.json("inspect pruned")["units"][1]["sparsity"], 0.5);
}

#[test]
fn recovery_says_what_it_recovered_and_keeps_the_size() {
    let b = Bench::new();
    let text = "--calibrate text.txt --calibrate-windows 4 --calibrate-context 32";
    let plain = b.json(&format!("compress -m model --format q2g32a -o plain {text}"));
    assert_eq!(plain["recovery"], Value::Null);
    let found = b.json(&format!("compress -m model --format q2g32a -o tuned {text} --recover 20"));
    assert_eq!(found["bytes_after"], plain["bytes_after"]);
    let recovery = &found["recovery"];
    let kept = number(recovery, "divergence_after") < number(recovery, "divergence_before");
    assert_eq!((&recovery["kept"], &recovery["steps"]), (&json!(kept), &json!(20)));
    let weights = |dir: &str| std::fs::read(b.path(dir).join("model.safetensors")).unwrap();
    assert_eq!(weights("plain") != weights("tuned"), kept, "{found}");
    assert_eq!(b.json("inspect plain")["policy"], b.json("inspect tuned")["policy"]);
    assert!(
        b.ok(&format!("compress -m model --format q2g32a -o again {text} --recover 2 --prepare"))
            .contains("kept apart")
    );
    b.fails("compress -m model --format q2g32a -o none --recover 0", 2);
    for format in ["f16", "q4g32a-2:4"] {
        let message = b.fails(&format!("compress -m model --format {format} -o none --recover 2"), 2);
        assert!(message.contains("without sparsity") && message.contains(format), "{message}");
    }
    b.fails(&format!("compress -m model --format q2g32a -o none {text} --recover 2 --recover-batch 0"), 2);
    let message = b.fails("compress -m model --format q2g32a -o none --calibrate text.txt --recover 2", 1);
    assert!(message.contains("--calibrate-context") || message.contains("windows"), "{message}");
}

#[test]
fn a_search_keeps_the_budget_and_beats_or_equals_its_start() {
    let b = Bench::new();
    let text = "--calibrate text.txt --calibrate-windows 4 --calibrate-context 64";
    b.ok(&format!("measure -m model -o m.json --bits 2,3,4,8 --group-size 32 {text}"));
    let search = format!("search -m model --measurement m.json --candidates 30 {text}");
    let found = b.json(&format!("{search} --target-bpw 4 -o s.toml"));
    assert!(number(&found, "kl") <= number(&found, "kl_before") && number(&found, "bits_per_weight") <= 4.0, "{found}");
    assert_eq!(number(&found, "candidates"), 30.0);
    b.ok("compress -m model --policy s.toml -o small");
    assert_eq!(b.json("inspect small")["policy"]["solver"], "search");
    assert!(b.fails(&format!("{search} --target-bpw 1 -o t.toml"), 1).contains("bits per weight"));
    b.fails(&format!("{search} --target-bpw 0 -o t.toml"), 2);
    b.fails(&format!("{search} -o t.toml"), 2);
    let other = std::fs::read_to_string(b.path("m.json")).unwrap();
    let at = other.find("\"model_digest\"").unwrap() + 20;
    let mut changed = other.clone().into_bytes();
    changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
    std::fs::write(b.path("other.json"), changed).unwrap();
    let other = "search -m model --measurement other.json --target-bpw 4 -o t.toml";
    assert!(b.fails(other, 1).contains("digest"));
    assert!(!b.path("t.toml").exists());
}
