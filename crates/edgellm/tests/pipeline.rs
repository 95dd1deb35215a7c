//! The whole pipeline through the command: measure, plan, compress, eval, adapt, run, inspect.

mod common;

use std::io::Write;
use std::process::Stdio;

use common::{Bench, litter, succeeded};
use safetensors::SafeTensors;
use serde_json::Value;

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

#[test]
fn from_a_model_to_a_smaller_one_that_was_tuned() {
    let b = Bench::new();
    let whole = b.json("inspect model");
    assert_eq!((&whole["kind"], &whole["n_layers"]), (&"model".into(), &4.into()));
    assert_eq!(number(&whole, "bits_per_weight"), 32.0);

    let measured = b.json("measure -m model -o m.json --bits 2,4,8 --group-size 32 --text text.txt --calibrate-windows 1 --calibrate-context 128");
    assert_eq!((number(&measured, "units"), number(&measured, "tokens")), (5.0, 128.0));
    let plan = b.json("plan --measurement m.json --target-bpw 5.5 -o p.toml");
    assert!(number(&plan, "bits_per_weight") <= 5.5);
    assert_eq!(plan["units"].as_array().unwrap().len(), 5);
    assert_eq!(plan["units"][0]["unit"], "embedding");

    let small = b.json("compress -m model --policy p.toml -o small");
    assert!(number(&small, "bytes_after") < 0.3 * number(&small, "bytes_before"));
    assert!((number(&small, "bits_per_weight") - number(&plan, "bits_per_weight")).abs() < 1e-9);
    let seen = b.json("inspect small");
    assert_eq!((&seen["container"], &seen["parameters"]), (&"compressed directory".into(), &whole["parameters"]));

    let eval = b.json("eval -m small --base model --text text.txt --context 64 --windows 4");
    for key in ["perplexity", "second_half_perplexity", "kl", "top1_agreement", "seconds", "model_bytes"] {
        assert!(number(&eval, key) > 0.0, "{key}");
    }

    let flags = "--data train.jsonl --eval-data heldout.jsonl --max-len 64 --batch 2 --exits 2 --window 2 --lr 1e-2";
    let tuned = b.json(&format!("adapt -m small {flags} --steps 12 -o adapter --metrics metrics.jsonl"));
    assert_eq!((number(&tuned, "steps"), &tuned["stopped"]), (12.0, &false.into()));
    assert!(number(&tuned, "heldout_after") < number(&tuned, "heldout_before"), "{tuned}");
    assert_eq!(tuned["votes_after"].as_object().unwrap().len(), 4);
    let metrics = std::fs::read_to_string(b.path("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().filter(|l| l.contains("\"event\":\"step\"")).count(), 12);

    let mean = b.json("eval -m small --adapter adapter --data heldout.jsonl --max-len 64 --vote mean");
    let difference = number(&mean, "heldout_loss") - number(&tuned["votes_after"], "mean");
    assert!(difference.abs() < 1e-6, "{mean} {tuned}");
    assert_eq!(mean["by_exit"], tuned["by_exit_after"]);
    let adapter = b.json("inspect adapter");
    assert_eq!((&adapter["exits"], &adapter["blocks"]), (&serde_json::json!([2, 4]), &4.into()));

    let fit = "vote -m small --adapter adapter";
    assert!(b.fails("run -m small --adapter adapter --vote weighted -p Hello", 2).contains("edgellm vote --fit"));
    assert!(b.fails(fit, 2).contains("no vote was fitted"));
    assert!(b.fails("run -m small --vote weighted -p Hello", 2).contains("--adapter"));
    let fitted = b.json(&format!("{fit} --fit --data train.jsonl --max-len 64"));
    let votes = fitted["votes"].as_object().unwrap();
    assert_eq!(votes.len(), 8);
    assert_eq!(number(&fitted["votes"], "last"), number(&fitted["by_exit"][1], "loss"));
    let shown = b.json(fit);
    assert_eq!(shown["exits"][1]["weight"], fitted["by_exit"][1]["weight"]);
    let both = b.json("eval -m small --adapter adapter --data heldout.jsonl --max-len 64 --vote mean,weighted,max");
    assert_eq!(both["votes"]["mean"], mean["heldout_loss"]);
    assert!(number(&both["votes"], "weighted") > 0.0 && number(&both["votes"], "max") > 0.0);
    let lines = "{\"context\": \"It is\", \"choices\": [\"12, 12.\", \"a dog.\", \"x\"], \"answer\": 0}\n".repeat(3);
    std::fs::write(b.path("questions.jsonl"), lines).unwrap();
    let questions = "eval -m small --adapter adapter --multiple-choice questions.jsonl --limit 2 --vote weighted,last";
    let choice = &b.json(questions)["multiple_choice"];
    assert_eq!(number(choice, "questions"), 2.0);
    assert_eq!(choice["votes"]["last"], choice["by_exit"][1]);
    assert!([0.0, 1.0].contains(&number(&choice["votes"]["weighted"], "acc")), "the same question twice: {choice}");

    let base = b.json("run -m small -p Hello -n 8");
    assert_eq!(base["token_ids"].as_array().unwrap().len(), 8);
    for vote in ["last", "max", "mean", "renorm-max", "weighted", "calibrated-max"] {
        let with = b.json(&format!("run -m small --adapter adapter --vote {vote} -p Hello -n 8"));
        assert_eq!(with["prompt_tokens"], base["prompt_tokens"]);
    }
    assert!(litter(&b.path("")).is_empty());
}

#[test]
fn every_solver_and_granularity() {
    let b = Bench::new();
    b.ok("measure -m model -o m.json --granularity linear --bits 3,4,8 --group-size 32 --sparsity 0.5 --calibrate-windows 1 --calibrate-context 64");
    let names = b.json("inspect m.json");
    assert_eq!(names["kind"], "measurement");
    let uniform = b.json("plan --measurement m.json --solver uniform --bits 4 -o u.toml");
    assert_eq!(number(&uniform, "bits_per_weight"), 5.0);
    let half = b.json("plan --measurement m.json --solver uniform --bits 4 --pattern 2:4 -o h.toml");
    // Half of the codes, a bit of mask, 32 bits of scale and minimum for 32 weights, and padding.
    assert!((4.0..4.5).contains(&number(&half, "bits_per_weight")), "{half}");
    let pruned = "--pattern unstructured --target-sparsity 0.6";
    let pruned = b.json(&format!("plan --measurement m.json --solver uniform --bits 4 {pruned} -o q.toml"));
    assert_eq!(
        (number(&pruned["units"][0], "sparsity"), &pruned["units"][0]["pattern"]),
        (0.6, &"unstructured".into())
    );
    let paper = b.json("plan --measurement m.json --solver paper --bits 3 --target-sparsity 0.3 -o p.json");
    assert!(paper["units"].as_array().unwrap().iter().any(|u| number(u, "sparsity") > 0.0));
    let size = b.json("plan --measurement m.json --target-size 120kB -o s.toml");
    assert!(number(&size, "bytes") <= 120e3);
    for policy in ["u.toml", "h.toml", "q.toml", "p.json", "s.toml"] {
        assert_eq!(b.json(&format!("inspect {policy}"))["kind"], "compression policy");
        b.ok(&format!("compress -m model --policy {policy} -o small --force"));
        b.ok("eval -m small --text text.txt --context 32 --windows 1");
    }
    assert!(b.fails("plan --measurement m.json --target-size 1kB -o x.toml", 1).contains("at least"));
    assert!(!b.path("x.toml").exists());
}

#[test]
fn exports_are_plain_directories_with_the_same_logits() {
    let b = Bench::new();
    let logits = |model: &str| {
        let args = ["run", "-m", model, "--raw", "-p", "The fox.", "-n", "0", "--dump-logits", "l.safetensors"];
        let args = args.into_iter().chain(["--activations", "f32"]);
        succeeded(&b.output(args));
        std::fs::read(b.path("l.safetensors")).unwrap()
    };
    let expected = logits("model");
    let file = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(file.tensor("token_ids").unwrap().shape(), [8]);
    assert_eq!(file.tensor("logits").unwrap().shape(), [8, 288]);
    for _ in 0..2 {
        b.ok("compress -m model --format f32 -o plain --force");
        let config: Value = serde_json::from_slice(&std::fs::read(b.path("plain/config.json")).unwrap()).unwrap();
        assert_eq!((config.get("quantization_config"), &config["torch_dtype"]), (None, &"float32".into()));
        assert_eq!(logits("plain"), expected);
    }
    b.ok("compress -m model --format q4g32a -o small");
    let small = logits("small");
    assert_ne!(small, expected);
    b.ok("compress -m small --format f32 -o back");
    let (small, back) = (SafeTensors::deserialize(&small).unwrap(), logits("back"));
    let back = SafeTensors::deserialize(&back).unwrap();
    let floats = |file: &SafeTensors<'_>| -> Vec<f32> {
        file.tensor("logits").unwrap().data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let difference = floats(&small).iter().zip(floats(&back)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-3, "{difference}");
}

#[test]
fn generation_is_reproducible_and_streams_what_json_says() {
    let b = Bench::new();
    let greedy = b.json("run -m model -p Hello -n 12");
    assert_eq!(greedy["token_ids"], b.json("run -m model -p Hello -n 12 --threads 1")["token_ids"]);
    for cache in ["f32", "int8"] {
        assert_eq!(
            b.json(&format!("run -m model -p Hello -n 4 --kv-cache {cache}"))["token_ids"].as_array().unwrap().len(),
            4
        );
    }
    let seeded = "run -m model -p Hello -n 12 --temp 1 --top-k 50 --top-p 0.9 --min-p 0.01";
    let one = b.json(&format!("{seeded} --seed 1"));
    assert_eq!(one["text"], b.json(&format!("{seeded} --seed 1"))["text"]);
    assert_ne!(one["token_ids"], b.json(&format!("{seeded} --seed 2"))["token_ids"]);
    let plain = b.ok("run -m model -p Hello -n 12 -q");
    assert_eq!(plain, format!("{}\n", greedy["text"].as_str().unwrap()));
    assert_eq!(b.json("run -m model -p Hello -n 0")["token_ids"], serde_json::json!([]));
}

#[test]
fn prompts_are_what_people_mean() {
    let b = Bench::new();
    std::fs::write(b.path("chat.json"), r#"[{"role": "user", "content": "Hi"}]"#).unwrap();
    let chat = b.json("run -m model --messages chat.json --render-only");
    assert_eq!(chat["text"], "<|user|>Hi<|end|><|assistant|>");
    assert_eq!(chat, b.json("run -m model -p Hi --render-only"));
    let raw = b.json("run -m model --raw -p Hi --render-only");
    assert_eq!((&raw["text"], &raw["token_ids"]), (&"Hi".into(), &serde_json::json!([72, 105])));
    let system = b.json("run -m model --system Short. -p Hi --render-only");
    assert_eq!(system["text"], "<|system|>Short.<|end|><|user|>Hi<|end|><|assistant|>");
    std::fs::write(b.path("prompt.txt"), "Hi").unwrap();
    assert_eq!(chat, b.json("run -m model -f prompt.txt --render-only"));
}

#[test]
fn a_conversation_reads_lines_until_they_end() {
    let b = Bench::new();
    let mut command = b.command(["run", "-m", "model", "--chat", "-n", "6", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello\n\nAnd again\n").unwrap();
    let json: Value = serde_json::from_str(&succeeded(&child.wait_with_output().unwrap())).unwrap();
    let turns = json["turns"].as_array().unwrap();
    assert_eq!(turns.len(), 2);
    // The second prompt holds the first question and its answer.
    assert!(number(&turns[1], "prompt_tokens") > number(&turns[0], "prompt_tokens") + 9.0, "{json}");
    // The first answer is that of a conversation of one message; the cache changes nothing in the second.
    assert_eq!(turns[0]["token_ids"], b.json("run -m model -p Hello -n 6")["token_ids"]);
    let answer = turns[0]["text"].as_str().unwrap();
    let messages = serde_json::json!([
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer},
        {"role": "user", "content": "And again"},
    ]);
    std::fs::write(b.path("chat.json"), messages.to_string()).unwrap();
    assert_eq!(turns[1]["token_ids"], b.json("run -m model --messages chat.json -n 6")["token_ids"]);
}

#[test]
fn devices_and_profile_describe_this_machine() {
    let b = Bench::new();
    let devices = b.json("devices");
    let flex = &devices["devices"][0];
    assert_eq!((&flex["device"], &flex["available"]), (&"flex".into(), &true.into()));
    assert!(!devices["kernels"].as_array().unwrap().is_empty());
    let text = b.ok("devices -v --threads 1");
    assert!(text.contains("packed_linear") && text.contains("1 threads"), "{text}");
    let profile = b.json("profile -o here.toml --name here --usable-memory 256MB");
    assert_eq!(profile["profile"]["name"], "here");
    assert_eq!(b.json("inspect here.toml")["profile"], profile["profile"]);
}
