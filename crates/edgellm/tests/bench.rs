//! `edgellm bench`: its rows in every form of output, and what it refuses.

mod common;

use common::Bench;
use serde_json::Value;

const QUICK: &str = "-r 2 -q";
const TINY: &str = "-p 8 -n 4 --tune 16";

fn rows(text: &str) -> Vec<Value> {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn json_has_llama_benchs_fields() {
    let b = Bench::new();
    let rows = rows(&b.ok(&format!("bench -m model {QUICK} {TINY} -t 1 -o json")));
    let tests: Vec<_> =
        rows.iter().map(|r| ["n_prompt", "n_gen", "n_tune"].map(|field| r[field].as_u64().unwrap())).collect();
    assert_eq!(tests, [[8, 0, 0], [0, 4, 0], [0, 0, 16]]);
    for row in &rows {
        assert_eq!((&row["model_filename"], &row["device"]), (&"model".into(), &"auto".into()));
        assert_eq!(row["model_type"], "llama f32");
        assert_eq!((row["n_threads"].as_u64(), row["n_tune_batch"].as_u64()), (Some(1), Some(1)));
        assert_eq!(row["build_version"], env!("CARGO_PKG_VERSION"));
        assert!(row["isa"].is_string());
        let (size, params) = (row["model_size"].as_u64().unwrap(), row["model_n_params"].as_u64().unwrap());
        assert!(params > 100_000 && size == 4 * params, "{size} bytes of {params} values");
        for field in ["avg_ns", "stddev_ns", "median_ns", "avg_ts", "stddev_ts", "median_ts"] {
            assert!(row[field].as_f64().is_some_and(|v| v >= 0.0), "{field} of {row}");
        }
        assert_eq!([&row["samples_ns"], &row["samples_ts"]].map(|list| list.as_array().unwrap().len()), [2, 2]);
        let tokens = (row["n_prompt"].as_u64().unwrap()
            + row["n_gen"].as_u64().unwrap()
            + row["n_tune"].as_u64().unwrap()) as f64;
        let (ns, rate) = (row["samples_ns"][0].as_f64().unwrap(), row["samples_ts"][0].as_f64().unwrap());
        assert!((tokens / ns * 1e9 / rate - 1.0).abs() < 1e-9, "{row}");
        assert_eq!(row["ttft_ns"].is_u64(), row["n_prompt"] != 0, "{row}");
        if cfg!(target_os = "linux") {
            assert!(row["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
        }
    }
}

#[test]
fn tables_have_a_row_for_each_test() {
    let b = Bench::new();
    let text = b.ok(&format!("bench -m model {QUICK} -p 8 -n 3,4 --tune 16 --tune-batch 2 --threads 1"));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 6, "{text}");
    for column in ["model", "size", "params", "threads", "test", "t/s", "ttft", "peak RSS"] {
        assert!(lines[0].contains(&format!(" {column} ")), "{text}");
    }
    for (line, test) in lines[2..].iter().zip(["pp8", "tg3", "tg4", "tune16x2"]) {
        assert!(line.contains(&format!(" {test} |")) && line.contains(" ± "), "{text}");
    }
    let csv = b.ok(&format!("bench -m model {QUICK} -p 8 -n 0 --tune 0 -t 1 -o csv"));
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2, "{csv}");
    assert_eq!(lines[0].split(',').count(), lines[1].split(',').count());
    let one = b.json(&format!("bench -m model {QUICK} -p 0 -n 4 --tune 0 -t 1"));
    assert_eq!(one["tests"].as_array().unwrap().len(), 1);
}

#[test]
fn several_models_and_numbers_of_threads_are_merged() {
    let b = Bench::new();
    b.ok("compress -m model --format q4g32s -o small");
    let rows = rows(&b.ok("bench -m model,small -p 8 -n 0 --tune 0 -r 1 -q -t 1,2,1 -o json"));
    let found: Vec<_> =
        rows.iter().map(|r| (r["n_threads"].as_u64().unwrap(), r["model_type"].as_str().unwrap())).collect();
    assert_eq!(found, [(1, "llama f32"), (1, "llama q4g32s"), (2, "llama f32"), (2, "llama q4g32s")]);
}

#[test]
fn operators_are_measured_beside_the_ceilings() {
    let b = Bench::new();
    let line = "bench --kernels --only packed_linear,rope --shape 96x64 --formats q4g32s,f32 -q -t 1 -o json";
    let rows = rows(&b.ok(line));
    let count = |operator: &str| rows.iter().filter(|row| row["operator"] == operator).count();
    assert_eq!(["packed_linear", "rope", "swiglu"].map(count), [9, 2, 0]);
    for row in &rows {
        for field in ["median_ns", "gb_per_second", "gop_per_second", "read_ceiling"] {
            assert!(row[field].as_f64().is_some_and(|v| v > 0.0), "{field} of {row}");
        }
    }
}

#[test]
fn what_makes_no_sense_exits_with_2() {
    let b = Bench::new();
    for (line, message) in [
        ("bench", "--model"),
        ("bench -m model -p x", "invalid value"),
        ("bench -m model -p -1", "unexpected argument"),
        ("bench -m model -r 0", "at least 1"),
        ("bench -m model --tune-batch 0", "at least 1"),
        ("bench -m model -t 0", "-t"),
        ("bench -m model -t 1 --threads 2", "cannot be used"),
        ("bench -m model -o xml", "invalid value"),
        ("bench -m model -p 0 -n 0 --tune 0", "expected a test"),
        ("bench -m model --tune 1", "at least 2 tokens"),
        ("bench -m model -p 5000", "at most 1024 tokens, found 5000"),
        ("bench -m model -p 5000 -t 1,2", "at most 1024 tokens, found 5000"),
        ("bench -m model --kernels", "cannot be used"),
        ("bench -m model --shape 4x4", "--shape goes with --kernels"),
        ("bench --kernels --shape 4", "is no shape"),
        ("bench --kernels --formats q7g32s", "--formats"),
        ("bench --kernels --only conv", "no operator 'conv'"),
        ("bench --kernels -t 1,2", "one number of threads"),
    ] {
        let errors = b.fails(line, 2);
        assert!(errors.contains(message), "`{line}` said: {errors}");
    }
    assert!(b.fails("bench -m nowhere", 1).contains("no stored model"));
}
