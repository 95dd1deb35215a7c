//! Comma-separated values of any bytes.
#![no_main]

use edgellm_model::data::{DataFormat, ReadOptions, read_records};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), content).expect("a temporary file");
    for skip_bad_lines in [false, true] {
        let options = ReadOptions { format: Some(DataFormat::Csv), skip_bad_lines };
        if let Ok((records, _)) = read_records(file.path(), &options) {
            let lines = content.iter().filter(|b| matches!(b, b'\n' | b'\r')).count() + 1;
            assert!(records.iter().all(|(line, _)| (1..=lines).contains(line)));
        }
    }
});
