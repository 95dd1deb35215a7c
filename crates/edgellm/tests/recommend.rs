//! `edgellm recommend`: what it asks for, what it promises, and that it does what it says.

mod common;

use common::{Bench, profile};
use serde_json::Value;

/// A measured model and a profile.
fn measured() -> Bench {
    let b = Bench::new();
    b.ok("measure -m model -o m.json --bits 2,4,8 --group-size 32 --text text.txt --calibrate-windows 1 --calibrate-context 64");
    profile(&b, "d.json", |_| {});
    b
}

const RECOMMEND: &str = "recommend -m model --measurement m.json --device-profile d.json";

#[test]
fn more_quality_takes_more_bytes_and_is_kept_as_promised() {
    let b = measured();
    let mut last = 0;
    for quality in [0.2, 0.9, 0.99] {
        let found = b.json(&format!("{RECOMMEND} --min-quality {quality} -o p.toml"));
        assert!(found["quality"].as_f64().unwrap() >= quality, "{found}");
        let bytes = found["bytes"].as_u64().unwrap();
        assert!(bytes >= last, "{bytes} after {last}");
        last = bytes;
        assert_eq!(found["resident"].as_array().unwrap().iter().filter(|stays| **stays == false).count(), 0);
    }
    // The policy is one that `plan` prices the same.
    assert!(std::fs::read_to_string(b.path("p.toml")).unwrap().contains("solve"));
}

#[test]
fn what_it_says_is_done_and_measured() {
    let b = measured();
    let found = b.json(&format!(
        "{RECOMMEND} --min-quality 0.5 --apply small --text text.txt --windows 1 --compressor rtn --context 16"
    ));
    let checked = &found["checked"];
    assert!(b.path("small").join("config.json").is_file());
    assert!(checked["seconds_per_token"].as_f64().unwrap() > 0.0, "{found}");
    let kept = (-checked["kl"].as_f64().unwrap()).exp();
    assert_eq!(checked["keeps_quality"], kept >= 0.5, "{found}");
}

#[test]
fn wishes_that_mean_nothing_or_cannot_be_kept_are_refused() {
    let b = measured();
    b.fails(RECOMMEND, 2);
    for bad in ["--min-quality 1.5", "--min-quality 0", "--max-ms -1", "--max-ms nan"] {
        assert!(b.fails(&format!("{RECOMMEND} {bad}"), 2).contains("expected"), "{bad}");
    }
    let strict = b.fails(&format!("{RECOMMEND} --min-quality 0.9999999999"), 1);
    assert!(strict.contains("the quality: expected at least") && strict.contains("at best"), "{strict}");
    let small = b.fails(&format!("{RECOMMEND} --max-memory 1MB"), 1);
    assert!(small.contains("bytes of memory"), "{small}");
    profile(&b, "d.json", |value| value["decode"] = Value::Array(Vec::new()));
    assert!(b.fails(&format!("{RECOMMEND} --min-quality 0.5"), 1).contains("edgellm profile"));
}

#[test]
fn a_profile_of_another_device_is_told() {
    let b = measured();
    let line = format!("{RECOMMEND} --min-quality 0.5 --verbose");
    assert!(b.says(&line).contains("d.json: its figures were not measured by us (made up)"));
    let measured_on = |device: &str| {
        profile(&b, "d.json", |value| {
            value["source"] = "measured by edgellm".into();
            value["measured_on"] = device.into();
        });
    };
    measured_on("a board far away");
    assert!(b.says(&line).contains("measured on 'a board far away', and this is '"));
    measured_on(&edgellm::sched::device_name());
    assert!(!b.says(&line).contains("measured on"));
}
