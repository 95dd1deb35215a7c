//! `--max-memory`: a model that does not fit is streamed from storage, and says the same.

mod common;

use common::{Bench, profile};
use edgellm::kernels::{Arrangement, Format};
use edgellm::model::synth::{Packing, write_random_model};
use serde_json::{Value, json};

/// Eight blocks of 3.8 MB.
fn big_model(b: &Bench, arrangement: Arrangement) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 2048,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2,
    });
    let packing = Packing { format: Format::parse("q8g32s").unwrap(), arrangement };
    write_random_model(&b.path("big"), config, &b.path("model"), packing, 1, true, &mut |_, _| {}).unwrap();
}

/// The number before ` bytes` that a message says is the least.
fn least(message: &str) -> u64 {
    let rest = message.split("at least ").nth(1).unwrap_or_else(|| panic!("no least in {message}"));
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_model_that_does_not_fit_says_the_same() {
    let b = Bench::new();
    for arrangement in [Arrangement::Panels, Arrangement::Rows] {
        big_model(&b, arrangement);
        let line = "run -m big --raw --prompt tide -n 6";
        let whole = b.json(line);
        assert_eq!((&whole["streaming"], whole["token_ids"].as_array().unwrap().len()), (&Value::Null, 6));
        let message = b.fails(&format!("{line} --max-memory 1MB"), 1);
        assert!(message.contains("--max-memory") && message.contains("found 1000000"), "{message}");
        let limit = least(&message) + 10_000_000;
        let found = b.json(&format!("{line} --max-memory {limit}"));
        assert_eq!(found["token_ids"], whole["token_ids"]);
        let streaming = &found["streaming"];
        let kept = streaming["resident"].as_array().unwrap().iter().filter(|kept| **kept == true).count();
        assert!((1..8).contains(&kept), "{streaming}");
        assert!(streaming["streamed_bytes"].as_u64().unwrap() > 5 * 3_500_000, "{streaming}");
        assert_eq!(streaming["ready"], arrangement == Arrangement::Panels);
        let said = b.says(&format!("{line} --max-memory {limit}"));
        assert!(said.contains("are streamed from storage"), "{said}");
        assert_eq!(said.contains("compress --prepare"), arrangement == Arrangement::Rows, "{said}");
    }
    b.fails("run -m big --raw --prompt tide --max-memory much", 2);
}

#[test]
fn speed_is_told_with_what_was_read() {
    let b = Bench::new();
    big_model(&b, Arrangement::Panels);
    let line = "bench -m big -p 0 -n 4 --tune 0 -r 1";
    assert_eq!(b.json(line)["tests"][0]["streamed_bytes"], Value::Null);
    let limit = least(&b.fails(&format!("{line} --max-memory 1MB"), 1)) + 10_000_000;
    let row = &b.json(&format!("{line} --max-memory {limit}"))["tests"][0];
    assert!(row["streamed_bytes"].as_u64().unwrap() > 0 && row["streamed_gbps"].as_f64().unwrap() > 0.0, "{row}");
}

#[test]
fn a_schedule_says_what_stays_and_draws_a_token() {
    let b = Bench::new();
    big_model(&b, Arrangement::Panels);
    let symmetric = |value: &mut Value| {
        for rates in value["decode"].as_array_mut().unwrap() {
            for format in rates["formats"].as_array_mut().unwrap() {
                let name = format["format"].as_str().unwrap().replace("g32a", "g32s");
                format["format"] = json!(name);
            }
        }
    };
    profile(&b, "slow.json", symmetric);
    profile(&b, "p.json", |value| {
        symmetric(value);
        value["storage"] = json!([{"requests": 1, "gbps": 0.5}, {"requests": 4, "gbps": 1.0}]);
    });
    let whole = b.json("schedule -m big --profile slow.json --max-memory 1GB");
    assert_eq!((&whole["read_rate"], &whole["buffers"]), (&Value::Null, &json!(0)));
    let least = least(&b.fails("schedule -m big --profile p.json --max-memory 1MB", 1));
    let limited = format!("--max-memory {}", least + 10_000_000);
    let found = b.json(&format!("schedule -m big --profile p.json {limited} --chart t.svg"));
    assert_eq!(found["read_rate"], 1e9);
    let (read, seconds) =
        (found["read_bytes_per_token"].as_f64().unwrap(), found["seconds_per_token"].as_f64().unwrap());
    // A token takes as long as reading or computing does, whichever is more, and not as long as both.
    let computes = whole["seconds_per_token"].as_f64().unwrap();
    assert!(seconds >= 0.999 * (read * 1e-9).max(computes) && seconds < read * 1e-9 + computes, "{found}, {computes}");
    assert!(found["peak_bytes"].as_u64().unwrap() <= least + 10_000_000);
    let svg = std::fs::read_to_string(b.path("t.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("computes") && svg.contains("reads"));
    let text = b.ok(&format!("schedule -m big --profile p.json {limited} --explain"));
    assert!(text.contains("storage") && text.contains("q8g32s") && text.contains("tokens/s"), "{text}");
    let message = b.fails(&format!("schedule -m big --profile slow.json {limited}"), 1);
    assert!(message.contains("`edgellm profile`"), "{message}");
    b.fails(&format!("schedule -m big --profile none.json {limited}"), 1);
}
