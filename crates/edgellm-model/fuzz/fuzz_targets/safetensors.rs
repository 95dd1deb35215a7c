//! A safetensors file of any bytes: opening it and taking every tensor ends in a value or an error.
#![no_main]

use edgellm_model::safetensors::Safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), content).expect("a temporary file");
    if let Ok(tensors) = Safetensors::open(file.path()) {
        for name in tensors.names() {
            assert_eq!(
                tensors.slice(name).expect("a listed tensor").len(),
                tensors.entry(name).expect("it").range.len()
            );
        }
    }
});
