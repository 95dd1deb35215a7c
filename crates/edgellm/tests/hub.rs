//! `edgellm pull owner/name` against a server on this machine that answers like the Hub.
#![cfg(feature = "hub")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use common::{Bench, failed, succeeded};
use serde_json::{Value, json};

/// Serves the files of a folder as the repository `me/tiny`; returns the endpoint.
fn serve(folder: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &folder);
        }
    });
    endpoint
}

fn answer(mut stream: TcpStream, folder: &Path) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(request)) = lines.next() else { return };
    let headers: Vec<String> = lines.map_while(|l| l.ok().filter(|l| !l.is_empty())).collect();
    let range = headers.iter().find_map(|h| Some(h.to_ascii_lowercase().strip_prefix("range: bytes=")?.to_string()));
    let path = request.split(' ').nth(1).unwrap();
    let (status, extra, content) = if path == "/api/models/me/tiny/revision/main" {
        let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let siblings: Vec<Value> = names.map(|name| json!({ "rfilename": name })).collect();
        ("200 OK", String::new(), json!({ "sha": "abc123", "siblings": siblings }).to_string().into_bytes())
    } else {
        let name = path.strip_prefix("/me/tiny/resolve/main/").filter(|name| !name.contains('/'));
        match name.and_then(|name| std::fs::read(folder.join(name)).ok().map(|content| (name, content))) {
            Some((name, content)) => part(name, &content, range.as_deref()),
            None => ("404 Not Found", String::new(), b"no such thing".to_vec()),
        }
    };
    let length = content.len();
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{extra}connection: close\r\n\r\n");
    // The client may hang up; that is its business.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content));
}

fn part(name: &str, content: &[u8], range: Option<&str>) -> (&'static str, String, Vec<u8>) {
    let (from, to) = range.and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let to = to.parse().map_or(content.len(), |to: usize| (to + 1).min(content.len()));
    let (last, total) = (to.saturating_sub(1), content.len());
    let extra =
        format!("etag: \"{name}-tag\"\r\nx-repo-commit: abc123\r\ncontent-range: bytes {from}-{last}/{total}\r\n");
    ("206 Partial Content", extra, content[from..to].to_vec())
}

#[test]
fn a_model_is_pulled_once_and_then_found_by_its_id() {
    let b = Bench::new();
    let endpoint = serve(b.path("model"));
    let pull = |more: &[(&str, &str)]| {
        let mut command = b.command(["pull", "me/tiny", "--json"]);
        let output = command.env("HF_ENDPOINT", &endpoint).envs(more.iter().copied()).output().unwrap();
        serde_json::from_str::<Value>(&succeeded(&output)).unwrap()
    };
    let first = pull(&[]);
    assert_eq!(first["already_there"], false);
    let path = first["path"].as_str().unwrap();
    assert!(Path::new(path).starts_with(b.path("hf")), "{path}");
    let again = pull(&[("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")]);
    assert_eq!((&again["already_there"], &again["path"]), (&true.into(), &first["path"]));
    assert_eq!(b.json("run -m me/tiny -p Hi -n 4")["text"], b.json("run -m model -p Hi -n 4")["text"]);
}

#[test]
fn failures_name_the_model_and_leave_nothing() {
    let b = Bench::new();
    let endpoint = serve(b.path("model"));
    let fails = |id: &str, more: &[(&str, &str)]| {
        let output = b.command(["pull", id]).env("HF_ENDPOINT", &endpoint).envs(more.iter().copied()).output().unwrap();
        let errors = failed(&output, 1);
        assert!(errors.contains(&format!("error: {id}: ")), "{errors}");
        errors
    };
    assert!(fails("me/none", &[]).contains("404"));
    assert!(fails("me/tiny", &[("HF_HUB_OFFLINE", "1")]).contains("not in the cache"));
    fails("me/tiny", &[("HF_ENDPOINT", "http://127.0.0.1:9")]);
    assert!(b.fails("run -m me/tiny -p x", 1).contains("edgellm pull me/tiny"));
}
