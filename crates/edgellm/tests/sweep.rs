//! `edgellm eval --sweep` and `edgellm eval compare`: what is run, found, gated, compared and refused.

mod common;

use std::path::Path;

use common::Bench;
use serde_json::Value;

const TEMPLATE: &str = r#"
version = 1
name = "tiny"
[variables]
format = "q8g32s"
text = "text.txt"
[[model]]
name = "tiny"
path = "model"
[[policy]]
name = "dense"
[[policy]]
name = "packed"
format = "${format}"
compress = { compressor = "rtn" }
[[task]]
name = "text"
base = true
eval = { text = "${text}", context = 32, windows = 6 }
[[task]]
name = "responses"
eval = { data = "heldout.jsonl", template = "alpaca" }
"#;

fn bench() -> Bench {
    let bench = Bench::new();
    std::fs::write(bench.path("t.toml"), TEMPLATE).unwrap();
    bench
}

fn stages(found: &Value) -> [u64; 3] {
    ["run", "found", "failed"].map(|name| found["stages"][name].as_u64().unwrap())
}

/// The record with these values in its case.
fn record<'a>(found: &'a Value, policy: &str, task: &str) -> &'a Value {
    let all = found["records"].as_array().unwrap();
    all.iter().find(|r| r["case"]["policy"] == policy && r["case"]["task"] == task).unwrap()
}

#[test]
fn a_sweep_runs_once_and_only_what_changed_runs_again() {
    let b = bench();
    let first = b.json("eval --sweep t.toml --records all.jsonl");
    // A model is compressed, and four cases are evaluated.
    assert_eq!((stages(&first), &first["runs"]), ([5, 0, 0], &4.into()));
    assert_eq!(std::fs::read_to_string(b.path("all.jsonl")).unwrap().lines().count(), 4);
    let kl = |policy| record(&first, policy, "text")["figures"]["kl"]["value"].as_f64().unwrap();
    // The base computes in f32, the models with 8 bits.
    assert!(kl("dense") < kl("packed") && kl("packed") < 0.1, "{} {}", kl("dense"), kl("packed"));
    let left: Vec<_> = std::fs::read_dir(b.path("edgellm-results/work")).unwrap().collect();
    assert!(left.is_empty(), "models are removed: {left:?}");

    assert_eq!(stages(&b.json("eval --sweep t.toml")), [0, 4, 0]);
    let other = b.json("eval --sweep t.toml --set format=q4g32s");
    assert_eq!(stages(&other), [3, 2, 0], "another format changes what is compressed");
    assert_eq!(stages(&b.json("eval --sweep t.toml --again")), [5, 0, 0]);
    // Options of every command hold for every stage, and make other runs.
    let threads = b.json("eval --sweep t.toml --threads 1 --activations f32 --records f32.jsonl");
    assert_eq!(stages(&threads), [5, 0, 0]);
    let line = std::fs::read_to_string(b.path("f32.jsonl")).unwrap();
    let kept: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    assert_eq!((&kept["environment"]["threads"], &kept["environment"]["activations"]), (&"1".into(), &"f32".into()));
    let page = b.json("report edgellm-results -o page.html");
    assert_eq!(page["records"], 4, "{page}");
}

#[test]
fn stages_at_once_find_what_stages_one_by_one_find() {
    let b = bench();
    let one = b.json("eval --sweep t.toml --threads 1 --store one");
    let two = b.json("eval --sweep t.toml --threads 1 --store two --jobs 3");
    assert_eq!(stages(&two), [5, 0, 0]);
    for policy in ["dense", "packed"] {
        let of = |found: &Value| record(found, policy, "text")["figures"]["kl"].clone();
        assert_eq!(of(&one), of(&two));
    }
    let ids = |found: &Value| -> Vec<String> {
        found["records"].as_array().unwrap().iter().map(|r| r["id"].to_string()).collect()
    };
    assert_eq!(ids(&one), ids(&two));
}

#[test]
fn a_gate_holds_what_got_worse() {
    let b = bench();
    b.ok("eval --sweep t.toml --write-baseline base.toml");
    b.ok("eval --sweep t.toml --gate base.toml");
    let worse = b.fails("eval --sweep t.toml --set format=q2g32s --gate base.toml", 1);
    assert!(worse.contains("policy=packed") && worse.contains(" kl: expected at most"), "{worse}");
    assert!(!worse.contains("policy=dense"), "{worse}");
    let gone = b.fails("eval --sweep t.toml --gate other.toml", 1);
    assert!(gone.contains("other.toml"), "{gone}");
}

#[test]
fn runs_are_compared_in_pairs_on_the_same_data_only() {
    let b = bench();
    let found = b.json("eval --sweep t.toml --set format=q2g32s");
    let id = |found: &Value, policy| record(found, policy, "text")["id"].as_str().unwrap().to_owned();
    let verdict = |first: &str, second: &str, figure: &str| -> String {
        let said = b.json(&format!("eval compare {first} {second}"));
        let figures = said["compared"][0]["figures"].as_array().unwrap().clone();
        figures.iter().find(|f| f["figure"] == figure).unwrap()["verdict"].as_str().unwrap().to_owned()
    };
    let (dense, packed) = (id(&found, "dense"), id(&found, "packed"));
    assert_eq!(verdict(&dense, &packed, "kl"), "worse");
    assert_eq!(verdict(&packed, &dense, "kl"), "better");
    assert_eq!(verdict(&dense, &dense, "kl"), "unclear");
    // Another text, of which there are as many windows.
    let text: String = (0..60).map(|i| format!("Other words in line {}.\n", i * 7)).collect();
    std::fs::write(b.path("other.txt"), text).unwrap();
    std::fs::write(b.path("u.toml"), TEMPLATE.replace("\"tiny\"\n[variables]", "\"elsewhere\"\n[variables]")).unwrap();
    let other = b.json("eval --sweep u.toml --set format=q2g32s --set text=other.txt");
    assert_eq!(verdict(&dense, &id(&other, "packed"), "kl"), "incomparable");
    assert!(b.ok(&format!("eval compare {dense} {}", id(&other, "packed"))).contains("other data"));
    let unknown = b.fails("eval compare tiny nowhere", 1);
    assert!(unknown.contains("found 'nowhere'") && unknown.contains("the sweep tiny with 4 runs"), "{unknown}");
}

#[test]
fn a_stage_that_fails_is_named_and_the_others_are_stored() {
    let b = bench();
    let broken = TEMPLATE.replace("data = \"heldout.jsonl\", ", "data = \"heldout.jsonl\", vote = \"weighted\", ");
    std::fs::write(b.path("t.toml"), broken).unwrap();
    let said = b.fails("eval --sweep t.toml", 1);
    assert!(said.contains("2 stages of the sweep failed") && said.contains("weighted"), "{said}");
    std::fs::write(b.path("t.toml"), TEMPLATE).unwrap();
    // The compressed model is still there, since the stage that failed reads it.
    assert_eq!(stages(&b.json("eval --sweep t.toml")), [2, 3, 0]);
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_runs() {
    let b = bench();
    let device = "[[device]]\nname = \"one\"\noptions = { threads = 1 }\n";
    std::fs::write(b.path("d.toml"), format!("{TEMPLATE}{device}")).unwrap();
    let both = b.fails("eval --sweep d.toml --threads 2", 2);
    assert!(both.contains("--threads on the command line or in the template, found both"), "{both}");
    let missing = b.fails("eval --sweep t.toml --set text=nowhere.txt", 1);
    assert!(missing.contains("nowhere.txt"), "{missing}");
    for (line, words) in [
        ("eval --sweep t.toml --set texts=a", "one of the variables format, text"),
        ("eval --sweep t.toml --set texts", "expected NAME=VALUE"),
        ("eval --sweep t.toml --jobs 0", "--jobs"),
        ("eval --sweep t.toml --text text.txt", "cannot be used with"),
    ] {
        let said = b.fails(line, 2);
        assert!(said.contains(words), "{line}: {said}");
    }
    std::fs::write(b.path("w.toml"), TEMPLATE.replace("eval = { data", "task = { data")).unwrap();
    assert!(b.fails("eval --sweep w.toml", 2).contains("unknown field `task`"));
}

/// Every shipped template, with files for what it has no value for.
#[test]
fn shipped_templates_are_whole() {
    let b = Bench::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sweeps");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let Ok(template) = text.parse::<toml::Table>() else { panic!("{} is no TOML", path.display()) };
        let Some(variables) = template.get("variables").and_then(toml::Value::as_table) else { continue };
        let mut line = vec!["eval".to_owned(), "--dry-run".into(), "--json".into(), "--sweep".into()];
        line.push(path.to_string_lossy().into_owned());
        for name in variables.keys() {
            let file = match name.as_str() {
                "model" => "model",
                "text" | "calibrate" => "text.txt",
                "responses" | "questions" | "train" | "heldout" => "heldout.jsonl",
                _ => continue,
            };
            line.extend(["--set".into(), format!("{name}={file}")]);
        }
        let said: Value = serde_json::from_str(&common::succeeded(&b.output(&line))).unwrap();
        let count = |name: &str| said[name].as_array().unwrap().len();
        assert!(count("cases") > 1 && count("stages") >= count("cases"), "{}: {said}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 6);
}
