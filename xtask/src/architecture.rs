//! `cargo xtask arch-check`: what a program can check of docs/ARCHITECTURE.md and its invariants. It reads the files that
//! git tracks; the workspace's tests run it too.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use xshell::cmd;

use crate::repo;

/// Everything the top level may hold besides dot-files and licences.
const TOP_LEVEL: [&str; 10] = [
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "crates",
    "docs",
    "fixtures",
    "sweeps",
    "rust-toolchain.toml",
    "xtask",
];
/// The crates with a module that needs `unsafe`; all others forbid it.
const WITH_UNSAFE: [&str; 3] = ["edgellm-ffi", "edgellm-kernels", "edgellm-model"];
/// The one crate whose command prints, reads the environment and uses anyhow.
const COMMAND: &str = "edgellm";
/// Words that mean unfinished work, written so that this file does not contain them.
const UNFINISHED: [&str; 5] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("#[ig", "nore"),
];

/// Checks docs/ARCHITECTURE.md and the invariants that a program can check.
#[derive(Args)]
pub(crate) struct ArchCheck {}

impl ArchCheck {
    pub(crate) fn run(&self) -> Result<()> {
        let problems = problems()?;
        if problems.is_empty() {
            println!("the tree is as docs/ARCHITECTURE.md says");
            return Ok(());
        }
        bail!("{} problems:\n  {}", problems.len(), problems.join("\n  "))
    }
}

/// All that is wrong, one sentence each.
fn problems() -> Result<Vec<String>> {
    let root = repo::root()?;
    let shell = repo::shell()?;
    // Untracked files count as well, unless git ignores them: a check that passes before the commit passes after it.
    let listed = cmd!(shell, "git ls-files --cached --others --exclude-standard").quiet().read()?;
    let files: BTreeSet<&str> = listed.lines().filter(|f| root.join(f).is_file()).collect();
    let mut problems = Vec::new();
    check_names(&files, &mut problems);
    check_document(&root, &files, &mut problems)?;
    for file in &files {
        if let Ok(text) = fs::read_to_string(root.join(file)) {
            check_file(file, &text, &mut problems);
        }
    }
    for name in crates(&files) {
        check_roots(&root, name, &files, &mut problems)?;
    }
    Ok(problems)
}

/// The crates, by their folders.
fn crates<'a>(files: &BTreeSet<&'a str>) -> Vec<&'a str> {
    files
        .iter()
        .filter_map(|f| f.strip_prefix("crates/")?.strip_suffix("/Cargo.toml"))
        .filter(|n| !n.contains('/'))
        .collect()
}

fn check_names(files: &BTreeSet<&str>, problems: &mut Vec<String>) {
    let top: BTreeSet<&str> = files.iter().filter_map(|f| f.split('/').next()).collect();
    for name in top {
        if !(TOP_LEVEL.contains(&name) || name.starts_with('.') || name.starts_with("LICENSE-")) {
            problems.push(format!("{name} does not belong to the top level"));
        }
    }
    for file in files.iter().filter(|f| f.ends_with(".rs")) {
        let stem = Path::new(file).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        if !stem.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            problems.push(format!("{file}: Rust files are named in snake_case"));
        }
    }
}

/// Every path that the document names in backticks exists, and every crate appears.
fn check_document(root: &Path, files: &BTreeSet<&str>, problems: &mut Vec<String>) -> Result<()> {
    let document = "docs/ARCHITECTURE.md";
    let text = fs::read_to_string(root.join(document)).with_context(|| format!("cannot read {document}"))?;
    for path in text.split('`').skip(1).step_by(2).filter(|code| is_path(code)) {
        if !root.join(path).exists() {
            problems.push(format!("{document} names {path}, which does not exist"));
        }
    }
    for name in crates(files).into_iter().chain(["xtask"]) {
        if !text.contains(&format!("`{name}`")) {
            problems.push(format!("{document} does not name the crate {name}"));
        }
    }
    Ok(())
}

/// In the document, code with a slash and no blank is a path from the root.
fn is_path(code: &str) -> bool {
    code.contains('/') && !code.contains(char::is_whitespace) && !code.contains(['<', '*', ':'])
}

fn check_file(file: &str, text: &str, problems: &mut Vec<String>) {
    let source = [".rs", ".py", ".toml", ".md", ".wgsl", ".yml"].iter().any(|end| file.ends_with(end));
    if source {
        for word in UNFINISHED.iter().filter(|word| text.contains(**word)) {
            problems.push(format!("{file} contains {word}"));
        }
    }
    if !file.ends_with(".rs") {
        return;
    }
    let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    if !may_be_unsafe(file) && code.iter().any(|line| has_unsafe(line)) {
        problems.push(format!(
            "{file} has unsafe code; it belongs into kernels/src/arch, model's mmap module or the C interface"
        ));
    }
    if let Some(name) = library(file) {
        for word in ["println!(", "eprintln!(", "print!(", "eprint!(", "dbg!(", "env::var", "env::args", "anyhow::"] {
            if code.iter().any(|line| has_word(line, word)) {
                problems.push(format!("{file}: {name} is a library, which has no {word}"));
            }
        }
    }
}

/// Where `unsafe` is allowed.
fn may_be_unsafe(file: &str) -> bool {
    file.starts_with("crates/edgellm-kernels/src/arch/")
        || (file.starts_with("crates/edgellm-model/src/") && file.ends_with("/mmap.rs"))
        || file.starts_with("crates/edgellm-ffi/src/c/")
}

/// Whether a line of code opens an unsafe block, function, trait or implementation, or has an unsafe attribute.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices("unsafe").any(|(at, word)| {
        let starts = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"');
        let rest = code[at + word.len()..].trim_start();
        starts && ["{", "fn", "impl", "trait", "extern", "("].iter().any(|next| rest.starts_with(next))
    })
}

/// The word stands in the line, not as the end of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// The library crate that a source file belongs to.
fn library(file: &str) -> Option<&str> {
    let (name, rest) = file.strip_prefix("crates/")?.split_once('/')?;
    (name != COMMAND && rest.starts_with("src/")).then_some(name)
}

/// Each crate root forbids unsafe code, or denies it where one module may use it.
fn check_roots(root: &Path, name: &str, files: &BTreeSet<&str>, problems: &mut Vec<String>) -> Result<()> {
    let attribute = if WITH_UNSAFE.contains(&name) { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
    for file in ["lib.rs", "main.rs"].map(|f| format!("crates/{name}/src/{f}")) {
        if files.contains(file.as_str()) && !fs::read_to_string(root.join(&file))?.contains(attribute) {
            problems.push(format!("{file} lacks {attribute}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written so that this file passes its own check.
    const UNSAFE: &str = concat!("un", "safe");

    #[test]
    fn the_tree_is_as_the_document_says() {
        let problems = problems().unwrap();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    #[test]
    fn unsafe_is_found_where_it_is_code() {
        for line in ["@ { f() }", "pub @ fn f() {", "@ impl Send for A {}", "#[@(no_mangle)]"] {
            assert!(has_unsafe(&line.replace('@', UNSAFE)), "{line}");
        }
        for line in ["#![forbid(@_code)]", "// @ { }", "let @ly = 1;", "if has_@(line) {"] {
            assert!(!has_unsafe(&line.replace('@', UNSAFE)), "{line}");
        }
    }

    #[test]
    fn problems_are_found() {
        let found = |file: &str, text: &str| {
            let mut problems = Vec::new();
            check_file(file, text, &mut problems);
            problems.len()
        };
        assert_eq!(found("crates/edgellm-luc/src/lib.rs", "fn f() { println!(\"\"); }"), 1);
        assert_eq!(found("crates/edgellm-luc/src/lib.rs", "/// println!(\"\");"), 0);
        assert_eq!(found("crates/edgellm/src/main.rs", "fn f() { println!(\"\"); }"), 0);
        let block = format!("fn f() {{ {UNSAFE} {{ g() }} }}");
        assert_eq!(found("crates/edgellm-luc/src/lib.rs", &block), 1);
        assert_eq!(found("crates/edgellm-kernels/src/arch/avx2.rs", &block), 0);
        assert_eq!(found("docs/a.md", concat!("TO", "DO: later")), 1);
        let mut problems = Vec::new();
        check_names(&BTreeSet::from(["notes.txt", "crates/a/src/Big.rs", ".ci/run"]), &mut problems);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(is_path("crates/edgellm/src") && !is_path("a / b") && !is_path("burn::Tensor"));
    }
}
