//! Several adapters on one base, and merging one, through the library and through the command.

mod common;

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use common::{Bench, failed, litter, succeeded};
use edgellm::device::DeviceChoice;
use edgellm::model::generate::Flow;
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::{LoadedModel, load_model};
use edgellm::tune::voters::voter;
use serde_json::{Value, json};

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

/// A bench with adapters `a` and `b` that say different things.
fn tuned(model: &str) -> Bench {
    let b = Bench::new();
    let flags = "--data train.jsonl --max-len 48 --batch 2 --exits 2 --window 2 --lr 3e-2 --steps 6";
    b.ok(&format!("adapt -m {model} {flags} --seed 1 -o a"));
    b.ok(&format!("adapt -m {model} {flags} --seed 2 --targets 2-3:all-linear -o b"));
    b
}

fn fixture() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/model").to_str().unwrap().to_owned()
}

fn load(path: &str) -> LoadedModel {
    load_model(Path::new(path), &DeviceChoice::Auto.load_options(Default::default()).unwrap()).unwrap()
}

/// Bits of the distributions after a prompt, and the text of 12 tokens.
fn speak(model: &LoadedModel) -> (Vec<u32>, Vec<u32>) {
    let prompt = model.tokenizer.encode("What is my favourite drink?", false).unwrap();
    let exits = [model.decoder.n_blocks()];
    let mut generator = model.generator(voter("last").unwrap(), &exits).unwrap();
    let bits = generator.advance(&prompt).unwrap().into_iter().map(f32::to_bits).collect();
    let mut generator = model.generator(voter("last").unwrap(), &exits).unwrap();
    let mut sampler = Sampler::new(SamplingConfig::default()).unwrap();
    (bits, generator.generate(&prompt, 12, &[], &mut sampler, |_| Ok(Flow::Continue)).unwrap())
}

#[test]
fn adapters_on_one_base_are_what_each_is_alone() {
    let path = fixture();
    let b = tuned(&path);
    let plain = speak(&load(&path));
    let alone = |name: &str| {
        let mut model = load(&path);
        model.load_adapter("only", &b.path(name)).unwrap();
        model.adapters.choose(Some("only")).unwrap();
        speak(&model)
    };
    let (a, other) = (alone("a"), alone("b"));
    assert!(a.0 != plain.0 && other.0 != plain.0 && a.0 != other.0, "the adapters show");
    let mut model = load(&path);
    model.load_adapter("a", &b.path("a")).unwrap();
    model.load_adapter("b", &b.path("b")).unwrap();
    assert_eq!(speak(&model), plain, "loading is not choosing");
    for (name, expected) in
        [(Some("a"), &a), (Some("b"), &other), (Some("a"), &a), (None, &plain), (Some("b"), &other), (None, &plain)]
    {
        model.adapters.choose(name).unwrap();
        assert_eq!(&speak(&model), expected, "{name:?}");
    }
    model.adapters.choose(Some("a")).unwrap();
    model.adapters.remove("a").unwrap();
    assert_eq!(speak(&model), plain);
}

#[test]
fn the_command_takes_several_adapters() {
    let b = tuned("model");
    let ids = |flags: &str| b.json(&format!("run -m model {flags} -p Hello -n 8"))["token_ids"].clone();
    let (a, other, plain) = (ids("--adapter a"), ids("--adapter b"), ids(""));
    assert!(a != other && a != plain && other != plain);
    assert_eq!(ids("--adapter a --adapter b"), other);
    assert_eq!(ids("--adapter one=a --adapter two=b --use one"), a);
    assert_eq!(ids("--adapter one=a --adapter two=b --use none"), plain);
    for (flags, expected) in [
        ("--adapter a --use b", "expected one of a or none, found b"),
        ("--adapter a --adapter a", "are both called 'a'"),
        ("--use a", "--adapter"),
    ] {
        let message = b.fails(&format!("run -m model {flags} -p x"), 2);
        assert!(message.contains(expected), "{flags}: {message}");
    }
}

#[test]
fn a_conversation_changes_adapters_and_is_read_again() {
    let b = tuned("model");
    let args = ["run", "-m", "model", "--adapter", "a", "--adapter", "b", "--chat", "-n", "6", "--json"];
    let mut command = b.command(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = "Hello\n/adapter a\nAnd again\n/adapter x\n/adapters\n/adapter none\nThird\n";
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let messages = String::from_utf8(output.stderr.clone()).unwrap();
    for expected in
        ["adapter: a; the conversation so far is read again", "expected a, b, found 'x'", "* a\n", "  none\n"]
    {
        assert!(messages.contains(expected), "{expected}: {messages}");
    }
    let json: Value = serde_json::from_str(&succeeded(&output)).unwrap();
    let turns = json["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 3, "commands are no messages");
    // Every turn is what a fresh run of the whole conversation with that adapter gives.
    let mut conversation = Vec::new();
    for (turn, (text, flags)) in
        turns.iter().zip([("Hello", "--adapter b"), ("And again", "--adapter a"), ("Third", "")])
    {
        conversation.push(json!({"role": "user", "content": text}));
        std::fs::write(b.path("chat.json"), json!(conversation).to_string()).unwrap();
        let fresh = b.json(&format!("run -m model {flags} --messages chat.json -n 6"));
        assert_eq!(
            (&turn["token_ids"], &turn["prompt_tokens"]),
            (&fresh["token_ids"], &fresh["prompt_tokens"]),
            "{text}"
        );
        conversation.push(json!({"role": "assistant", "content": turn["text"]}));
    }
}

#[test]
fn merging_through_the_command() {
    let b = tuned("model");
    let flags = "--data heldout.jsonl --max-len 48 --context 32 --windows 2";
    let exact = b.json(&format!("merge -m model --adapter a -o exact {flags}"));
    assert!(number(&exact, "kl") < 1e-6 && number(&exact, "base_kl") > 1e-3, "{exact}");
    assert!((number(&exact, "heldout_merged") - number(&exact, "heldout_adapter")).abs() < 1e-4, "{exact}");
    assert_eq!((&exact["exits"], exact["matrices"].as_array().unwrap().len()), (&json!([2, 4]), 28));
    // The exits' norms are found beside the merged model: the vote is that of base and adapter.
    let voted = |flags: &str| {
        let eval = b.json(&format!("eval {flags} --data heldout.jsonl --max-len 48 --vote mean --activations f32"));
        (number(&eval, "heldout_loss"), eval["by_exit"].as_array().unwrap().len())
    };
    let (merged, beside) = (voted("-m exact"), voted("-m model --adapter a"));
    assert!((merged.0 - beside.0).abs() < 1e-4 && merged.1 == beside.1, "{merged:?} {beside:?}");
    b.ok("run -m exact --vote max -p Hello -n 4");

    b.ok("compress -m model --format q4g32a -o small");
    let kept = b.json(&format!("merge -m small --adapter a -o kept {flags}"));
    assert!(number(&kept, "survived") > 0.2 && number(&kept, "survived") < 1.3, "{kept}");
    assert!(number(&kept, "kl") < number(&kept, "base_kl"), "{kept}");
    assert_eq!(b.json("inspect kept")["bits_per_weight"], b.json("inspect small")["bits_per_weight"]);
    let text = b.ok("merge -m small --adapter a -o kept --force --format f32 --context 32 --windows 1");
    assert!(text.contains("28 matrices changed") && text.contains("KL from the adapter"), "{text}");
    for (line, code, expected) in [
        ("merge -m model --adapter a -o exact", 2, "exists already"),
        ("merge -m model --adapter a -o model --force", 2, "expected another folder"),
        ("merge -m model --adapter a -o a --force", 2, "replaces a model only"),
        ("merge -m model --adapter exact -o x", 1, "adapter_config.json"),
        ("merge -m model --adapter a -o x --format q4g32a-2:4", 2, "dense"),
        ("merge -m model --adapter a -o x --data none.txt", 2, "none.txt"),
    ] {
        let message = failed(&b.output(line.split_whitespace()), code);
        assert!(message.contains(expected), "{line}: {message}");
    }
    assert!(litter(&b.path("")).is_empty());
}
