//! Against a server of our own on this machine, which answers like the Hub.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;

use super::*;

/// Serves files of one repository; returns the endpoint.
fn serve(files: BTreeMap<&'static str, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let request = lines.next().unwrap().unwrap();
            let headers: Vec<String> = lines.map_while(|l| l.ok().filter(|l| !l.is_empty())).collect();
            let range =
                headers.iter().find_map(|h| h.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
            let path = request.split(' ').nth(1).unwrap();
            let (status, content, extra) = respond(&files, path, range.as_deref());
            let head =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{extra}connection: close\r\n\r\n", content.len());
            stream.write_all(head.as_bytes()).unwrap();
            stream.write_all(&content).unwrap();
        }
    });
    endpoint
}

fn respond(files: &BTreeMap<&str, Vec<u8>>, path: &str, range: Option<&str>) -> (String, Vec<u8>, String) {
    if path == "/api/models/me/tiny/revision/main" {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"siblings": siblings, "sha": "abc123"});
        return ("200 OK".into(), info.to_string().into_bytes(), String::new());
    }
    let file = path.strip_prefix("/me/tiny/resolve/main/").and_then(|name| files.get_key_value(name));
    let Some((name, content)) = file else { return ("404 Not Found".into(), b"no".to_vec(), String::new()) };
    let (from, to) = range.and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(content.len(), |to: usize| (to + 1).min(content.len()));
    let extra = format!(
        "etag: \"{name}-tag\"\r\nx-repo-commit: abc123\r\ncontent-range: bytes {from}-{}/{}\r\n",
        to.saturating_sub(1),
        content.len()
    );
    ("206 Partial Content".into(), content[from..to].to_vec(), extra)
}

fn model(weights: &[(&'static str, &str)]) -> BTreeMap<&'static str, Vec<u8>> {
    let mut files: BTreeMap<&'static str, Vec<u8>> =
        [("config.json", "{}"), ("tokenizer.json", "{}"), ("README.md", "no")]
            .map(|(name, content)| (name, content.as_bytes().to_vec()))
            .into();
    files.extend(weights.iter().map(|(name, content)| (*name, content.as_bytes().to_vec())));
    files
}

fn fetch(options: &HubOptions) -> Result<PathBuf> {
    download("me/tiny", options, &mut |_| {})
}

#[test]
fn shards_are_fetched_once_and_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let files = model(&[(INDEX, index), ("model-1.safetensors", "one"), ("model-2.safetensors", "two")]);
    let mut options = HubOptions { endpoint: serve(files), ..HubOptions::new(cache.path()) };
    let mut seen = Vec::new();
    let dir = download("me/tiny", &options, &mut |p| {
        if p.done == p.total {
            seen.push(p.file.to_owned());
        }
    })
    .unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("model-2.safetensors")).unwrap(), "two");
    assert!(!dir.join("README.md").exists());
    seen.dedup();
    assert_eq!(seen, ["config.json", "tokenizer.json", INDEX, "model-1.safetensors", "model-2.safetensors"]);
    options.offline = true;
    options.endpoint = "http://127.0.0.1:9".into();
    assert_eq!(fetch(&options).unwrap(), dir);
}

#[test]
fn failures_name_the_repository_and_the_file() {
    let check = |files, expected: &str| {
        let cache = tempfile::tempdir().unwrap();
        let options = HubOptions { endpoint: serve(files), ..HubOptions::new(cache.path()) };
        let error = fetch(&options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(model(&[]), "me/tiny: weights: neither model.safetensors nor");
    let mut without = model(&[(SINGLE, "w")]);
    without.remove("tokenizer.json");
    check(without, "me/tiny: tokenizer.json: ");
    check(model(&[(INDEX, r#"{"weight_map": {"a": "../../outside.safetensors"}}"#)]), "without a folder");
    check(model(&[(INDEX, "[]")]), "weight_map");
    let cache = tempfile::tempdir().unwrap();
    let offline = HubOptions { offline: true, ..HubOptions::new(cache.path()) };
    assert!(fetch(&offline).unwrap_err().to_string().contains("config.json: not in the cache"));
    let nobody = HubOptions { endpoint: "http://127.0.0.1:9".into(), ..HubOptions::new(cache.path()) };
    assert!(fetch(&nobody).unwrap_err().to_string().contains("list of files"));
}

#[test]
fn ids_are_checked() {
    for good in ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b.c_d"] {
        assert!(check_id(good).is_ok(), "{good}");
    }
    for bad in ["", "/", "a/", "../x", "a/b/c", "a/..", "a b/c", "a\\b", ".a/b"] {
        assert!(check_id(bad).unwrap_err().to_string().contains("expected owner/name"), "{bad}");
    }
}
