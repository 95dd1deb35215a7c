//! `cargo xtask doctor`: what each target needs, what of it is here, and what installs the rest.

use anyhow::Result;
use clap::Args;

use crate::android::{ABIS, Ndk};
use crate::bindings::kotlinc;
use crate::repo::has_program;
use crate::toolchain::{HOST, Toolchain};
use crate::{ios, jetson};

/// Shows what each target needs, what is here, and the command that installs the rest.
#[derive(Args)]
pub(crate) struct Doctor {}

/// One need of one target.
struct Row {
    target: String,
    needs: String,
    /// What was found, or what installs it.
    found: Result<String, String>,
}

impl Doctor {
    pub(crate) fn run(&self) -> Result<()> {
        print!("{}", table(&rows()));
        Ok(())
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |target: &str, needs: &str, found: Result<String, String>| {
        rows.push(Row { target: target.to_owned(), needs: needs.to_owned(), found });
    };
    add("this machine", "Rust", std(HOST));
    for abi in &ABIS {
        add(&format!("android {}", abi.name), "standard library", std(abi.target));
    }
    let ndk = Ndk::find(None).map(|ndk| ndk.version).map_err(|error| format!("{error:#}"));
    add("android, linking", "NDK 25 or later", ndk);
    let kotlin = kotlinc::missing().map_or_else(|| Ok(kotlinc::COMPILER.to_owned()), Err);
    add("android, bindings", "Java, npm, JNA", kotlin);
    add("android, devices", "adb", program("adb", "apt-get install adb"));
    for slice in [&ios::DEVICE, &ios::SIMULATOR] {
        add(slice.target, "standard library", std(slice.target));
    }
    let xcode = "a Mac with Xcode, from the App Store (the library and the framework are built without)";
    add("ios, running", "xcrun", program("xcrun", xcode));
    add("jetson", "standard library", std(jetson::TARGET));
    if HOST != jetson::TARGET {
        let linker = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross";
        add("jetson", "linker", program(jetson::LINKER, linker));
    }
    add("qemu devices", "qemu-aarch64-static", program("qemu-aarch64-static", "apt-get install qemu-user-static"));
    add("ssh devices", "ssh", program("ssh", "apt-get install openssh-client"));
    add("ssh devices, test", "sshd", program("/usr/sbin/sshd", "apt-get install openssh-server"));
    rows
}

fn std(target: &str) -> Result<String, String> {
    Toolchain::find(target).map(|toolchain| toolchain.describe()).map_err(|_| Toolchain::advice(target))
}

fn program(name: &str, install: &str) -> Result<String, String> {
    if has_program(name) { Ok(name.to_owned()) } else { Err(install.to_owned()) }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<24} {:<20} {:<5} {}\n", "target", "needs", "here", "which, or what installs it");
    for Row { target, needs, found } in rows {
        let (here, what) = match found {
            Ok(what) => ("yes", what),
            Err(what) => ("no", what),
        };
        text += &format!("{target:<24} {needs:<20} {here:<5} {what}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_row_and_every_lack_a_remedy() {
        let rows = rows();
        for target in
            ["this machine", "android arm64-v8a", "aarch64-apple-ios", "jetson", "qemu devices", "ssh devices"]
        {
            assert!(rows.iter().any(|row| row.target == target), "{target}");
        }
        assert!(
            rows.iter().all(|row| row.found.as_ref().is_ok_and(|t| !t.is_empty())
                || row.found.as_ref().is_err_and(|t| t.contains(' ')))
        );
        let lack = Row { target: "a".into(), needs: "b".into(), found: Err("apt-get install b".into()) };
        assert!(table(&[lack]).contains("no    apt-get install b"));
    }
}
