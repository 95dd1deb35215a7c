//! A `config.json` of any text; what is read is written and read again the same.
#![no_main]

use std::path::Path;

use edgellm_model::config::ModelConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let path = Path::new("config.json");
    let Ok(config) = ModelConfig::parse(path, text) else { return };
    let (frequencies, _) = config.inv_freq();
    assert!(frequencies.len() <= config.head_dim / 2);
    assert_eq!(ModelConfig::from_json(path, config.to_json()).expect("its own JSON"), config);
    let mut config = config;
    let _ = config.add_generation_config(path, text);
});
