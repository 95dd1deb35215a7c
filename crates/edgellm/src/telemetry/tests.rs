use std::time::Duration;

use serde_json::Value;
use tracing_subscriber::layer::SubscriberExt;

use super::*;

fn listening(destinations: &Destinations, work: impl FnOnce()) -> Telemetry {
    let telemetry = Telemetry::open(destinations).unwrap();
    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
    tracing::subscriber::with_default(subscriber, work);
    telemetry
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// A decoded token of two blocks with an operator each.
fn token() {
    let _pass = tracing::debug_span!(target: "edgellm_test", "decode", tokens = 1).entered();
    for index in 0..2usize {
        let _block = tracing::debug_span!(target: "edgellm_test", "block", index, bytes = 10u64).entered();
        let _operator = tracing::trace_span!(target: "edgellm_test", "qkv").entered();
        // An operator in an operator is part of it.
        let _inner = tracing::trace_span!(target: "edgellm_test", "norm").entered();
        pause(2);
    }
}

#[test]
fn spans_are_summed_by_layer_and_operator() {
    let telemetry = listening(&Destinations::default(), || {
        (0..4).for_each(|_| token());
        let _other = tracing::debug_span!(target: "somebody", "block", index = 7).entered();
    });
    let totals = telemetry.totals();
    let pass = totals.pass(Pass::Decode);
    assert_eq!((pass.passes, pass.tokens, pass.layers.len()), (4, 4, 2));
    let in_layers: u64 = pass.layers.iter().map(|layer| layer.ns).sum();
    assert!(in_layers >= 16_000_000 && in_layers <= pass.ns, "{in_layers} of {}", pass.ns);
    for layer in &pass.layers {
        assert_eq!(layer.bytes, 40);
        let operators = layer.operators();
        // Some tokens' operators are timed; they are scaled to all.
        assert_eq!(operators.keys().copied().collect::<Vec<_>>(), ["qkv"]);
        let share = operators["qkv"] / layer.ns as f64;
        assert!((0.8..=1.0).contains(&share), "{share}");
    }
}

#[test]
fn a_trace_nests_and_metrics_have_the_events() {
    let folder = tempfile::tempdir().unwrap();
    let (metrics, trace) = (folder.path().join("m.jsonl"), folder.path().join("t.json"));
    let destinations = Destinations { metrics: Some(metrics.clone()), trace: Some(trace.clone()) };
    let telemetry = listening(&destinations, || {
        token();
        tracing::trace!(target: edgellm_model::spans::GRADIENTS, index = 3usize, norm = 0.5);
        tracing::trace!(target: edgellm_model::spans::VOTES, won = 4usize);
        tracing::trace!(target: edgellm_model::spans::VOTES, exit = 2usize, temperature = 1.5);
    });
    telemetry.sink().record("step", json!({"step": 1})).unwrap();
    telemetry.finish().unwrap();

    let text = std::fs::read_to_string(&metrics).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let event =
        |name: &str| lines.iter().find(|line| line["event"] == name).unwrap_or_else(|| panic!("{name}: {text}"));
    assert_eq!((&event("layers")["pass"], &event("layers")["tokens"]), (&json!("decode"), &json!(1)));
    assert_eq!(event("gradients")["layers"], json!([{"index": 3, "norm": 0.5}]));
    assert_eq!((&event("exits")["votes_won"], &event("exits")["temperatures"]), (&json!({"4": 1}), &json!({"2": 1.5})));
    assert_eq!(event("step")["step"], 1);

    let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&trace).unwrap()).unwrap();
    let mut spans: Vec<(f64, f64, u64)> = events
        .iter()
        .filter(|event| event["ph"] == "X")
        .map(|event| {
            let ts = event["ts"].as_f64().unwrap();
            (ts, ts + event["dur"].as_f64().unwrap(), event["tid"].as_u64().unwrap())
        })
        .collect();
    assert_eq!(spans.len(), 7);
    spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    for (i, a) in spans.iter().enumerate() {
        for b in &spans[i + 1..] {
            assert!(b.0 >= a.1 || b.1 <= a.1, "{a:?} and {b:?} overlap without one in the other");
        }
    }
}
