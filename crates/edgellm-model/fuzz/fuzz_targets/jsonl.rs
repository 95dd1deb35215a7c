//! JSON lines of any bytes.
#![no_main]

use edgellm_model::data::read_records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), content).expect("a temporary file");
    if let Ok(records) = read_records(file.path()) {
        let lines = content.split(|&b| b == b'\n').count();
        assert!(records.iter().all(|(line, _)| (1..=lines).contains(line)));
    }
});
