//! Kotlin's compiler, from npm: Debian's is too old for the bindings.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::repo;

/// The package.
pub(super) const COMPILER: &str = "kotlin-compiler@2.4.20";
/// JNA, which the Kotlin bindings call the library through: Debian's libjna-java.
pub(super) const JNA: &str = "/usr/share/java/jna.jar";

/// What is missing here to compile and run Kotlin, if anything.
pub(crate) fn missing() -> Option<String> {
    let programs = [("java", "no Java runtime (Debian: default-jre-headless)"), ("npm", "no npm")];
    if let Some((_, text)) = programs.into_iter().find(|(program, _)| !repo::has_program(program)) {
        return Some(text.to_owned());
    }
    (!Path::new(JNA).exists()).then(|| "no JNA (Debian: libjna-java)".to_owned())
}

/// Compiles Kotlin sources (files and folders) into a folder of classes.
pub(crate) fn compile(sources: &[&Path], classes: &Path) -> Result<()> {
    let (shell, compiler) = (repo::shell()?, compiler()?);
    let jars = compiler.join("lib/*");
    cmd!(
        shell,
        "java -Xmx1g -cp {jars} org.jetbrains.kotlin.cli.jvm.K2JVMCompiler -kotlin-home {compiler} -nowarn
            -classpath {JNA} -d {classes} {sources...}"
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
