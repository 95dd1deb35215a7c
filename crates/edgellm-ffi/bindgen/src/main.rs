//! Generates the Kotlin, Swift and Python bindings from the built library: uniffi's own generator, in the version that the
//! library was built with.

#![forbid(unsafe_code)]

fn main() {
    uniffi::uniffi_bindgen_main();
}
