//! The package, read as a board's owner reads it. The files in it are stand-ins.

use xshell::{Shell, cmd};

use super::*;

#[test]
fn the_package_installs_into_the_usual_places() {
    let folder = tempfile::tempdir().unwrap();
    let deb = folder.path().join("edgellm.deb");
    let entries = tree("./usr", "lib/aarch64-linux-gnu", "./usr/share/doc/edgellm", b"stand-in", b"stand-in").unwrap();
    write_deb(&deb, &control("0.1.0", Glibc(2, 34), Cpu::Orin), &entries).unwrap();
    if !has_program("dpkg-deb") {
        return;
    }
    let shell = Shell::new().unwrap();
    let fields = cmd!(shell, "dpkg-deb -f {deb}").quiet().read().unwrap();
    for line in ["Package: edgellm", "Architecture: arm64", "Depends: libc6 (>= 2.34), libgcc-s1"] {
        assert!(fields.lines().any(|l| l == line), "{line}: {fields}");
    }
    let files = cmd!(shell, "dpkg-deb -c {deb}").quiet().read().unwrap();
    for path in ["./usr/bin/edgellm", "./usr/lib/aarch64-linux-gnu/libedgellm_ffi.so", "./usr/include/edgellm.h"] {
        assert!(files.lines().any(|l| l.ends_with(path)), "{path}: {files}");
    }
}

#[test]
fn glibc_versions_are_read() {
    assert_eq!(parse("2.31").unwrap(), Glibc(2, 31));
    for wrong in ["2", "two.31", "", "2.x"] {
        assert!(parse(wrong).unwrap_err().to_string().contains("expected a version such as 2.35"), "{wrong}");
    }
}

#[test]
fn programs_of_this_machine_are_no_programs_of_a_board() {
    if HOST.starts_with("x86_64") {
        let error = format!("{:#}", check(&std::env::current_exe().unwrap()).unwrap_err());
        assert!(error.contains("built for x86-64, expected aarch64"), "{error}");
    }
}
