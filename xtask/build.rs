//! Tells the tasks which triple they run on.

fn main() {
    println!("cargo:rustc-env=XTASK_HOST={}", std::env::var("TARGET").unwrap_or_default());
    println!("cargo:rerun-if-changed=build.rs");
}
