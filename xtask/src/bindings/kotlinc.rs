//! Kotlin's compiler, from npm: Debian's is too old for the bindings.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::repo;

/// The package.
pub(crate) const COMPILER: &str = "kotlin-compiler@2.4.20";
/// Where Debian's libjna-java has JNA, which the Kotlin bindings call the library through.
const DEBIAN_JNA: &str = "/usr/share/java/jna.jar";

/// JNA: what the variable `JNA_JAR` names, or Debian's.
pub(super) fn jna() -> PathBuf {
    env::var_os("JNA_JAR").filter(|path| !path.is_empty()).map_or_else(|| DEBIAN_JNA.into(), PathBuf::from)
}

/// What is missing here to compile and run Kotlin, if anything, and what brings it.
pub(crate) fn missing() -> Option<String> {
    let programs = [
        ("java", "no Java (Debian: apt-get install default-jre-headless)"),
        ("npm", "no npm, which fetches Kotlin's compiler (Debian: apt-get install npm)"),
    ];
    if let Some((_, text)) = programs.into_iter().find(|(program, _)| !repo::has_program(program)) {
        return Some(text.to_owned());
    }
    no_jna(&jna())
}

fn no_jna(jar: &Path) -> Option<String> {
    let place = jar.display();
    let how = "Debian: apt-get install libjna-java; elsewhere set JNA_JAR to a jna.jar of net.java.dev.jna:jna";
    (!jar.is_file()).then(|| format!("no JNA at {place} ({how})"))
}

/// Compiles Kotlin sources (files and folders) into a folder of classes.
pub(crate) fn compile(sources: &[&Path], classes: &Path) -> Result<()> {
    let (shell, compiler, jna) = (repo::shell()?, compiler()?, jna());
    let jars = compiler.join("lib/*");
    cmd!(
        shell,
        "java -Xmx1g -cp {jars} org.jetbrains.kotlin.cli.jvm.K2JVMCompiler -kotlin-home {compiler} -nowarn
            -classpath {jna} -d {classes} {sources...}"
    )
    .quiet()
    .run()?;
    Ok(())
}

/// Kotlin's standard library, which compiled programs need.
pub(super) fn stdlib() -> Result<PathBuf> {
    Ok(compiler()?.join("lib/kotlin-stdlib.jar"))
}

/// The compiler, fetched and unpacked once.
fn compiler() -> Result<PathBuf> {
    let (shell, folder) = (repo::shell()?, repo::scratch("kotlin")?);
    let (package, stamp) = (folder.join("package"), folder.join("version"));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == COMPILER) {
        return Ok(package);
    }
    let archive = cmd!(shell, "npm pack --silent --pack-destination {folder} {COMPILER}").quiet().read()?;
    let archive = folder.join(archive.lines().last().context("npm pack names no file")?.trim());
    cmd!(shell, "tar -xzf {archive} -C {folder}").quiet().run()?;
    fs::remove_file(&archive)?;
    ensure!(package.join("lib/kotlin-compiler.jar").is_file(), "{COMPILER} has no lib/kotlin-compiler.jar");
    fs::write(&stamp, COMPILER)?;
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_jna_is_said_with_what_brings_it() {
        let text = no_jna(Path::new("/none/jna.jar")).unwrap();
        assert!(text.starts_with("no JNA at /none/jna.jar") && text.contains("JNA_JAR"), "{text}");
    }
}
