//! Data files of every kind, through the command.

mod common;

use common::Bench;
use serde_json::{Value, json};

const SETTINGS: &str = "--steps 2 --batch 2 --window 2 --exits 2";

fn adapt(b: &Bench, args: &str) -> Value {
    b.json(&format!("adapt -m model -o a --force {SETTINGS} {args}"))
}

#[test]
fn every_format_gives_the_same_examples() {
    let b = Bench::new();
    let lines = std::fs::read_to_string(b.path("train.jsonl")).unwrap();
    let mut csv = String::from("\u{feff}output,instruction\r\n");
    for line in lines.lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        csv += &format!("\"{}\",{}\r\n", record["output"].as_str().unwrap(), record["instruction"].as_str().unwrap());
    }
    std::fs::write(b.path("train.csv"), &csv).unwrap();
    std::fs::write(b.path("csv"), &csv).unwrap();
    let results =
        [adapt(&b, "--data train.jsonl"), adapt(&b, "--data train.csv"), adapt(&b, "--data csv --data-format csv")];
    for result in &results {
        assert_eq!(result["loss_first"], results[0]["loss_first"]);
        assert_eq!(result["loss_last"], results[0]["loss_last"]);
        let expected = json!({
            "train_examples": 12, "heldout_examples": null,
            "data": {"examples": 12, "cut": 0, "skipped": []}, "eval_data": null,
        });
        assert_eq!(result["examples"], expected);
    }
    // A text needs no template and becomes windows.
    let text = adapt(&b, "--data text.txt --max-len 64");
    assert!(text["examples"]["train_examples"].as_u64().unwrap() > 5, "{text}");
    assert!(b.json("eval -m model --data train.csv")["heldout_loss"].is_number());
}

#[test]
fn bad_lines_are_said_at_the_end() {
    let b = Bench::new();
    let lines = std::fs::read_to_string(b.path("train.jsonl")).unwrap();
    std::fs::write(b.path("bad.jsonl"), format!("{{\n{lines}[]\n\u{1}\n")).unwrap();
    assert!(b.fails(&format!("adapt -m model --data bad.jsonl -o a {SETTINGS}"), 1).contains("bad.jsonl line 1"));
    let result = adapt(&b, "--data bad.jsonl --skip-bad-lines");
    let skipped = &result["examples"]["data"]["skipped"];
    assert_eq!(skipped[0]["reason"], "syntax");
    assert_eq!((&skipped[0]["count"], &skipped[0]["lines"]), (&json!(2), &json!([1, 15])));
    assert_eq!((&skipped[1]["reason"], &skipped[1]["lines"]), (&json!("fields"), &json!([14])));
    let said = "12 examples (3 skipped: 2 not JSON (lines 1, 15), 1 without the fields of an example (line 14))";
    let text = b.ok(&format!("adapt -m model --data bad.jsonl -o a --force --skip-bad-lines {SETTINGS}"));
    assert!(text.contains(said), "{text}");
    let text = b.ok("eval -m model --data bad.jsonl --skip-bad-lines");
    assert!(text.contains(said), "{text}");
}

#[test]
fn a_split_holds_out_the_same_examples_for_a_seed() {
    let b = Bench::new();
    let part = adapt(&b, "--data train.jsonl --val-split 0.25");
    assert_eq!((&part["examples"]["train_examples"], &part["examples"]["heldout_examples"]), (&json!(9), &json!(3)));
    assert!(part["heldout_before"].is_number() && part["heldout_after"].is_number());
    let count = adapt(&b, "--data train.jsonl --val-split 3");
    assert_eq!(count["heldout_before"], part["heldout_before"]);
    assert_eq!(count["loss_first"], part["loss_first"]);
    let other = adapt(&b, "--data train.jsonl --val-split 3 --seed 5");
    assert_ne!(other["heldout_before"], part["heldout_before"]);
    let text = b.ok(&format!("adapt -m model --data train.jsonl -o a --force --val-split 3 {SETTINGS}"));
    assert!(text.contains("12 examples, 3 of them held out") && text.contains("held-out loss"), "{text}");
}
