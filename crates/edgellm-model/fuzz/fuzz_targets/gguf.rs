//! A GGUF file of any bytes: opening it, its configuration, and decoding every tensor end in values or errors.
#![no_main]

use edgellm_model::files::ModelFiles;
use edgellm_model::gguf::{Gguf, dequantize};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), content).expect("a temporary file");
    let Ok(gguf) = Gguf::open(file.path()) else { return };
    for name in gguf.tensors().keys() {
        let (tensor, bytes) = gguf.tensor(name).expect("a listed tensor");
        let mut values = vec![0.0; tensor.shape.iter().product()];
        dequantize(tensor.ggml_type, bytes, &mut values);
    }
    let Ok(files) = ModelFiles::open(file.path()) else { return };
    for name in files.names() {
        let _ = files.matrix(name);
        let _ = files.vector(name);
    }
    let _ = files.chat_template();
});
