//! `edgellm eval`: intervals, kept items, questions with shots, checks of answers, what a model takes on this device.

mod common;

use common::Bench;
use serde_json::Value;

const EVERYTHING: &str = "eval -m model --text text.txt --context 48 --stride 20 --windows 6 --data heldout.jsonl \
                          --template alpaca --calibration --vote last,mean --multiple-choice questions.jsonl --answers \
                          answers.jsonl --max-tokens 5 --temp 0.9 --seed 3 --base model";

fn bench() -> Bench {
    let bench = Bench::new();
    let question = |i: usize| {
        let subject = ["sums", "products"][i % 2];
        let (input, output) =
            (format!("About {subject}.\\n\\n{i}?\\nA. one\\nB. two\\nC. many\\nAnswer:"), ["A", "B", "C"][i % 3]);
        format!("{{\"subject\": \"{subject}\", \"input\": \"{input}\", \"output\": \"{output}\"}}\n")
    };
    std::fs::write(bench.path("questions.jsonl"), (0..6).map(question).collect::<String>()).unwrap();
    let answers = r#"{"prompt": "The quick", "regex": "."}
{"prompt": "The brown", "regex": "^nothing like it$"}
{"prompt": "Line", "contains": "no such text in it"}
{"prompt": "Dogs", "exact": "exactly this and nothing else"}
"#;
    std::fs::write(bench.path("answers.jsonl"), answers).unwrap();
    bench
}

/// What does not depend on time and memory.
fn measured(mut result: Value) -> Value {
    for name in ["seconds", "peak_rss_bytes"] {
        result.as_object_mut().unwrap().remove(name);
    }
    let figures = result["figures"].as_object_mut().unwrap();
    for name in ["load_seconds", "peak_rss_bytes"] {
        assert!(figures.remove(name).is_some() || name == "peak_rss_bytes", "{name}");
    }
    result
}

#[test]
fn figures_have_intervals_and_the_old_names_stay() {
    let bench = bench();
    let found = bench.json(&format!("{EVERYTHING} --items"));
    let figures = found["figures"].as_object().unwrap();
    for name in [
        "perplexity",
        "second_half_perplexity",
        "strided_perplexity",
        "kl",
        "second_half_kl",
        "top1_agreement",
        "heldout_loss",
        "heldout_loss_mean",
        "heldout_loss_exit_4",
        "accuracy",
        "accuracy_norm",
        "accuracy_mean",
        "calibration_error",
        "calibration_error_last",
        "calibration_error_exit_4",
        "regex",
    ] {
        let figure = figures.get(name).unwrap_or_else(|| panic!("no {name}"));
        let (value, ends) = (figure["value"].as_f64().unwrap(), &figure["interval"]);
        let (low, high) = (ends[0].as_f64().unwrap(), ends[1].as_f64().unwrap());
        assert!(low <= high && value.is_finite(), "{name}: {figure}");
        // Binning makes calibration errors of draws larger, so that theirs may lie outside.
        assert!(name.starts_with("calibration") || (low..=high).contains(&value), "{name}: {figure}");
        assert!(name.starts_with("calibration") || found["items"][name].as_array().unwrap().len() > 1, "{name}");
    }
    assert_eq!(found["perplexity"], figures["perplexity"]["value"]);
    assert_eq!(found["heldout_loss"], figures["heldout_loss"]["value"]);
    assert_eq!((&found["windows"], &found["strided"]["windows"]), (&6.into(), &6.into()));
    // Six windows of 47 targets; overlapping ones score 48 tokens less one, then 20 each.
    assert_eq!(found["strided"]["tokens"], 47 + 5 * 20);
    assert_eq!(figures["regex"]["value"], 0.5);
    assert_eq!((&figures["contains"]["value"], &figures["exact_match"]["value"]), (&0.0.into(), &0.0.into()));
    let subjects = found["multiple_choice"]["by_subject"].as_object().unwrap();
    assert_eq!(subjects.keys().collect::<Vec<_>>(), ["products", "sums"]);
    assert_eq!(found["reliability"][0]["bins"].as_array().unwrap().len(), 15);
}

#[test]
fn a_run_that_was_cut_goes_on_and_finds_the_same() {
    let bench = bench();
    let whole = measured(bench.json(EVERYTHING));
    let line = format!("{EVERYTHING} --resume items.jsonl");
    assert_eq!(measured(bench.json(&line)), whole);
    let items = std::fs::read(bench.path("items.jsonl")).unwrap();
    let lines = items.iter().filter(|&&byte| byte == b'\n').count();
    // The settings; 6 windows three times; batches of the loss and the calibration; 6 questions; 4 answers.
    assert!(lines >= 1 + 18 + 2 + 6 + 4, "{lines}");
    for cut in [0, 100, items.len() / 3, items.len() - 1] {
        std::fs::write(bench.path("items.jsonl"), &items[..cut]).unwrap();
        assert_eq!(measured(bench.json(&line)), whole, "cut at {cut}");
        assert_eq!(std::fs::read(bench.path("items.jsonl")).unwrap(), items, "cut at {cut}");
    }
    // Nothing is computed again: an item that says something else is believed.
    let changed = String::from_utf8(items.clone()).unwrap().replacen("\"values\":[\"", "\"values\":[\"1", 1);
    std::fs::write(bench.path("items.jsonl"), changed).unwrap();
    assert_ne!(bench.json(&line)["perplexity"], whole["perplexity"]);
    std::fs::write(bench.path("items.jsonl"), &items).unwrap();
    let error = bench.fails(&line.replace("--context 48", "--context 40"), 1);
    assert!(error.contains("whose context is 48, not 40"), "{error}");
    std::fs::write(bench.path("text.txt"), "Another text. ".repeat(100)).unwrap();
    let error = bench.fails(&line, 1);
    assert!(error.contains("whose text is"), "{error}");
    assert_eq!(std::fs::read(bench.path("items.jsonl")).unwrap(), items);
}

#[test]
fn shots_and_scoring() {
    let bench = bench();
    let eval = "eval -m model --multiple-choice questions.jsonl";
    for options in
        ["--shots 2", "--shots 1 --shots-file questions.jsonl", "--scoring answer", "--scoring answer --shots 1"]
    {
        let found = bench.json(&format!("{eval} {options}"));
        assert_eq!(found["multiple_choice"]["questions"], 6, "{options}");
    }
    let error = bench.fails(&format!("{eval} --shots 3"), 1);
    assert!(error.contains("at least 3, found 2"), "{error}");
    bench.fails(&format!("{eval} --scoring guess"), 2);
    bench.fails("eval -m model --shots 1", 2);
}

#[test]
fn answers_that_cannot_be_checked_are_refused() {
    let bench = bench();
    for (name, content, word) in [
        ("empty.jsonl", "", "at least one task"),
        ("unknown.jsonl", "{\"prompt\": \"x\", \"resembles\": \"y\"}\n", "resembles"),
        ("regex.jsonl", "{\"prompt\": \"x\", \"regex\": \"(\"}\n", "line 1"),
        ("none.jsonl", "{\"prompt\": \"x\"}\n", "expected one of"),
    ] {
        std::fs::write(bench.path(name), content).unwrap();
        let error = bench.fails(&format!("eval -m model --answers {name}"), 1);
        assert!(error.contains(word), "{error}");
    }
    bench.fails("eval -m model --answers answers.jsonl --max-tokens 0", 2);
    bench.fails("eval -m model --answers answers.jsonl --temp -1", 2);
    bench.fails("eval -m model", 2);
}

#[test]
fn what_a_model_takes_here() {
    let bench = bench();
    let found = bench.json("eval -m model --speed");
    for name in ["prefill_rate", "decode_rate", "first_token_seconds", "load_seconds", "model_bytes"] {
        assert!(found["figures"][name]["value"].as_f64().unwrap() > 0.0, "{name}: {found}");
    }
    let joules = &found["speed"]["joules_per_token"];
    assert!(joules.is_null() || joules.as_f64().unwrap() > 0.0, "{joules}");
    assert_eq!(found["figures"]["joules"].is_null(), joules.is_null());
    if joules.is_null() {
        assert!(bench.ok("eval -m model --speed").contains("not told by this device"));
    }
}
