//! A `model.safetensors.index.json` of any bytes, beside one good shard.
#![no_main]

use edgellm_model::safetensors::{Dtype, Safetensors, SafetensorsWriter, TensorSpec};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spec = TensorSpec::new("x", Dtype::U8, [1]);
    let shard = folder.path().join("a.safetensors");
    let mut writer = SafetensorsWriter::create(&shard, &[spec]).expect("a shard");
    writer.write("x", &[7]).expect("a tensor");
    writer.finish().expect("a shard");
    std::fs::write(folder.path().join("model.safetensors.index.json"), content).expect("an index");
    if let Ok(tensors) = Safetensors::open_dir(folder.path()) {
        assert!(tensors.names().all(|name| name == "x"));
    }
});
