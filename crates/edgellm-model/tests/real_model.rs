//! SmolLM2-135M-Instruct from its GGUF file, against values made by Hugging Face's tokenizer.
//!
//! `EDGELLM_TEST_MODEL` is the GGUF file, `EDGELLM_TEST_GOLDEN` the folder with `smollm2.json`; without them, the
//! tests say "not run".
#![allow(clippy::print_stdout, reason = "says what was not run")]

mod common;

use std::path::{Path, PathBuf};

use edgellm_kernels::Format;
use edgellm_model::chat::ChatMessage;
use edgellm_model::files::ModelFiles;
use edgellm_model::save::ModelWriter;
use serde_json::Value;

/// The model and the golden values; `None` where they are not given.
fn setup() -> Option<(PathBuf, Value)> {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(model), Some(golden)) = (path("EDGELLM_TEST_MODEL"), path("EDGELLM_TEST_GOLDEN")) else {
        println!("not run: EDGELLM_TEST_MODEL and EDGELLM_TEST_GOLDEN are not set");
        return None;
    };
    let text = std::fs::read_to_string(golden.join("smollm2.json")).expect("the golden values");
    Some((model, serde_json::from_str(&text).expect("golden values are JSON")))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn check_texts(files: &ModelFiles, golden: &Value) {
    let tokenizer = files.tokenizer().unwrap();
    let prompts = golden["prompts"].as_object().unwrap();
    assert!(prompts.len() >= 6);
    for (name, prompt) in prompts {
        let (text, expected) = (prompt["text"].as_str().unwrap(), ids(&prompt["ids"]));
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "prompt {name}");
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text, "prompt {name}");
        let mut stream = tokenizer.stream(false);
        let mut streamed: String = expected.iter().map(|&id| stream.push(id).unwrap()).collect();
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, text, "prompt {name}, streamed");
    }
    let template = files.chat_template().unwrap().expect("a chat template");
    let chats = golden["chats"].as_array().unwrap();
    assert!(!chats.is_empty());
    for chat in chats {
        let messages: Vec<ChatMessage> = serde_json::from_value(chat["messages"].clone()).unwrap();
        let text = template.render(&messages, true).unwrap();
        assert_eq!(text, chat["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids(&chat["ids"]));
    }
    for (prompt, greedy) in golden["greedy"].as_object().unwrap() {
        let text = greedy["text"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&ids(&greedy["ids"]), true).unwrap(), text, "continuation of {prompt:?}");
    }
}

#[test]
fn texts_are_tokenized_as_by_hugging_face() {
    let Some((model, golden)) = setup() else { return };
    check_texts(&ModelFiles::open(&model).unwrap(), &golden);
}

#[test]
fn the_configuration_is_the_published_one() {
    let Some((model, _)) = setup() else { return };
    let files = ModelFiles::open(&model).unwrap();
    let c = files.config();
    assert_eq!((c.hidden_size, c.intermediate_size, c.n_layers), (576, 1536, 30));
    assert_eq!((c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size), (9, 3, 64, 49152));
    assert_eq!((c.rms_norm_eps, c.rope.theta, c.max_position_embeddings), (1e-5, 100_000.0, 8192));
    assert_eq!((c.bos_token_id, c.eos_token_ids.as_slice(), c.tie_word_embeddings), (Some(1), &[2][..], true));
    assert_eq!(files.names().count(), 272);
    assert_eq!(files.layout("model.embed_tokens.weight").unwrap().format, Format::parse("q8g32s").unwrap());
    let q = files.layout("model.layers.29.self_attn.q_proj.weight").unwrap();
    assert_eq!((q.rows, q.cols, q.format), (576, 576, Format::parse("q4g32a").unwrap()));
}

fn read_all(path: &Path) -> u64 {
    let files = ModelFiles::open(path).unwrap();
    let mut kept = Vec::new();
    for name in files.names() {
        if files.shape(name).unwrap().len() == 2 {
            kept.push(files.matrix(name).unwrap());
        }
    }
    let tokenizer = files.tokenizer().unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(kept.len(), 211);
    files.file_bytes()
}

#[test]
fn loading_takes_little_more_memory_than_the_file() {
    let Some((model, _)) = setup() else { return };
    let file = read_all(&model);
    let Some(peak) = common::peak_rss() else {
        println!("not run: this system does not say how much memory was used");
        return;
    };
    println!("file {} MB, peak {} MB", file >> 20, peak >> 20);
    assert!(peak <= file + (100 << 20), "peak {peak} bytes for a file of {file}");
}

#[test]
fn a_directory_made_from_it_is_the_same_model() {
    let Some((model, golden)) = setup() else { return };
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    let files = ModelFiles::open(&model).unwrap();
    let mut writer = ModelWriter::create(&target, &files, None, |_, layout| layout.format).unwrap();
    for name in writer.layouts().keys().cloned().collect::<Vec<_>>() {
        writer.write(&name, &files.matrix(&name).unwrap()).unwrap();
    }
    writer.finish(false).unwrap();
    let copy = ModelFiles::open(&target).unwrap();
    assert!(copy.names().eq(files.names()));
    for name in files.names() {
        if files.shape(name).unwrap().len() == 2 {
            assert!(copy.matrix(name).unwrap() == files.matrix(name).unwrap(), "{name}");
        } else {
            assert_eq!(copy.vector(name).unwrap(), files.vector(name).unwrap(), "{name}");
        }
    }
    assert_eq!(copy.config().eos_token_ids, files.config().eos_token_ids);
    assert_eq!(copy.config().rope, files.config().rope);
    assert_eq!(copy.quantization().unwrap().tensors.len(), 211);
    check_texts(&copy, &golden);
}
