//! The checks of the bindings that CI runs: a program in each language goes through the whole cycle on the fixture model.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use super::{FFI, Language, generate, kotlinc, library, library_name};
use crate::repo;
use crate::suite::Outcome;

/// Milliseconds from the start of a program to the first token of the fixture.
const COLD_START_MS: f64 = 150.0;
/// Runs of which the best counts: other programs on the machine make a start slower, nothing makes it faster.
const STARTS: usize = 7;

/// A program or test file of the crate.
fn test_file(name: &str) -> Result<PathBuf> {
    Ok(repo::root()?.join(FFI).join("tests").join(name))
}

fn fixture() -> Result<PathBuf> {
    Ok(repo::root()?.join("fixtures/model"))
}

/// The bindings of one language, made from the release build.
fn bindings(language: Language) -> Result<(PathBuf, PathBuf)> {
    let library = library("release")?;
    let folder = repo::scratch(&format!("bindings/{}", language.name()))?;
    generate(&library, language, &folder)?;
    Ok((library, folder))
}

/// Runs the cycle through the Python bindings.
pub(crate) fn python() -> Result<Outcome> {
    let (library, folder) = bindings(Language::Python)?;
    fs::copy(&library, folder.join(library_name()))?;
    let (shell, script, model, scratch) =
        (repo::shell()?, test_file("cycle.py")?, fixture()?, repo::scratch("bindings/run")?);
    let ran = cmd!(shell, "python3 -B {script} {folder} {model} {scratch}").quiet().read()?;
    Ok(Outcome::Passed(ran))
}

/// Compiles the Kotlin bindings and the cycle, and runs it on this machine's Java.
pub(crate) fn kotlin() -> Result<Outcome> {
    if let Some(missing) = kotlinc::missing() {
        return Ok(Outcome::NotRun(missing));
    }
    let (library, folder) = bindings(Language::Kotlin)?;
    let (shell, classes, cycle) = (repo::shell()?, repo::scratch("bindings/kotlin-classes")?, test_file("Cycle.kt")?);
    kotlinc::compile(&[&folder, &cycle], &classes).context("the Kotlin bindings and their test do not compile")?;
    let (model, scratch) = (fixture()?, repo::scratch("bindings/run")?);
    let classpath = format!("{}:{}:{}", classes.display(), kotlinc::jna().display(), kotlinc::stdlib()?.display());
    let libraries = library.parent().context("a library lies in a folder")?;
    let ran = cmd!(shell, "java -cp {classpath} -Djna.library.path={libraries} CycleKt {model} {scratch}");
    Ok(Outcome::Passed(format!("{} on the host's Java, {}", ran.quiet().read()?, kotlinc::COMPILER)))
}

/// Generates the Swift bindings, and parses them where there is a compiler.
pub(crate) fn swift() -> Result<Outcome> {
    let (_, folder) = bindings(Language::Swift)?;
    let source = fs::read_to_string(folder.join("EdgeLLM.swift"))?;
    for name in ["class Engine", "protocol TokenListener", "protocol ProgressListener", "func lastError() -> String?"] {
        ensure!(source.contains(name), "the Swift bindings lack `{name}`");
    }
    if !repo::has_program("swiftc") {
        return Ok(Outcome::NotRun("no Swift compiler; the bindings were generated, not compiled".to_owned()));
    }
    let (shell, file, map) = (repo::shell()?, folder.join("EdgeLLM.swift"), folder.join("EdgeLLMFFI.modulemap"));
    cmd!(shell, "swiftc -typecheck -Xcc -fmodule-map-file={map} -I {folder} {file}").quiet().run()?;
    Ok(Outcome::Passed("typechecked".to_owned()))
}

/// The C program, compiled against the header.
fn c_program(library: &Path) -> Result<PathBuf> {
    let (shell, include) = (repo::shell()?, repo::root()?.join(FFI).join("include"));
    let folder = library.parent().context("a library lies in a folder")?;
    let (source, program) = (test_file("cycle.c")?, repo::scratch("bindings/run")?.join("cycle-c"));
    cmd!(
        shell,
        "cc -std=c11 -Wall -Wextra -Werror -I {include} {source} -o {program} -L {folder} -ledgellm_ffi -Wl,-rpath,{folder}"
    )
    .quiet()
    .run()?;
    Ok(program)
}

/// Compiles and runs the cycle in C; the header declares what the library has, and nothing else.
pub(crate) fn c() -> Result<Outcome> {
    if !repo::has_program("cc") {
        return Ok(Outcome::NotRun("no C compiler".to_owned()));
    }
    let library = library("release")?;
    let (shell, header) = (repo::shell()?, repo::root()?.join(FFI).join("include/edgellm.h"));
    let declared = functions(&fs::read_to_string(&header)?);
    let symbols = cmd!(shell, "nm -D --defined-only {library}").quiet().read()?;
    let defined: BTreeSet<String> = symbols
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .filter(|name| name.starts_with("edgellm_"))
        .map(str::to_owned)
        .collect();
    ensure!(declared == defined, "the header declares {declared:?}, the library has {defined:?}");
    let (program, model, scratch) = (c_program(&library)?, fixture()?, repo::scratch("bindings/run")?);
    let ran = cmd!(shell, "{program} {model} {scratch}").quiet().read()?;
    Ok(Outcome::Passed(format!("{} functions: {ran}", declared.len())))
}

/// The functions that a header declares: names that begin with `edgellm_` before a parenthesis, outside of comments.
fn functions(header: &str) -> BTreeSet<String> {
    let code: String = header.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect();
    let names = code.match_indices('(').filter_map(|(at, _)| {
        let name = code[..at].rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next()?;
        name.starts_with("edgellm_").then(|| name.to_owned())
    });
    names.collect()
}

/// The time from the start of a program to the fixture's first token, in fresh processes.
pub(crate) fn cold_start() -> Result<Outcome> {
    if !repo::has_program("cc") {
        return Ok(Outcome::NotRun("no C compiler".to_owned()));
    }
    let library = library("release")?;
    let (shell, program, model) = (repo::shell()?, c_program(&library)?, fixture()?);
    let (mut inside, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let start = Instant::now();
        let text = cmd!(shell, "{program} {model}").quiet().read()?;
        whole.push(start.elapsed().as_secs_f64() * 1e3);
        inside.push(text.trim().parse::<f64>().with_context(|| format!("the program printed {text}"))?);
    }
    inside.sort_by(f64::total_cmp);
    whole.sort_by(f64::total_cmp);
    let (best, median) = (inside[0], inside[STARTS / 2]);
    ensure!(best < COLD_START_MS, "{best:.0} ms to the first token, more than {COLD_START_MS:.0}");
    Ok(Outcome::Passed(format!(
        "load and first token: best {best:.0} ms, median {median:.0} ms; the whole process: best {:.0} ms",
        whole[0]
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_a_header_are_found() {
        let header = "/* edgellm_no(a) */ int edgellm_a(int (*edgellm_type)(int));\ntypedef bool (*edgellm_on)(int);\n\
                      edgellm_t *edgellm_b(void);";
        let found: Vec<String> = functions(header).into_iter().collect();
        assert_eq!(found, ["edgellm_a", "edgellm_b"]);
    }
}
