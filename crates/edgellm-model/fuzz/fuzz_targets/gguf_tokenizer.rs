//! A tokenizer from GGUF metadata: the bytes are cut at zeros into tokens and merges of a file that is otherwise good.
#![no_main]

use edgellm_model::gguf::Gguf;
use edgellm_model::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

fn array(element: u32, items: &[Vec<u8>]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
}

fuzz_target!(|content: (bool, u8, String, String)| {
    let (sentence_piece, pre, tokens, merges) = content;
    let tokens: Vec<&str> = tokens.split('\0').collect();
    let merges: Vec<&str> = merges.split('\0').filter(|m| !m.is_empty()).collect();
    let strings = |list: &[&str]| array(8, &list.iter().map(|t| text(t)).collect::<Vec<_>>());
    let numbers = |scale: f32| {
        array(6, &(0..tokens.len()).map(|i| (i as f32 * scale).to_le_bytes().to_vec()).collect::<Vec<_>>())
    };
    let pre = ["gpt-2", "smollm", "llama-bpe", "qwen2"][usize::from(pre % 4)];
    let entries = [
        entry("tokenizer.ggml.model", 8, &text(if sentence_piece { "llama" } else { "gpt2" })),
        entry("tokenizer.ggml.pre", 8, &text(pre)),
        entry("tokenizer.ggml.tokens", 9, &strings(&tokens)),
        entry("tokenizer.ggml.merges", 9, &strings(&merges)),
        entry("tokenizer.ggml.scores", 9, &numbers(-1.0)),
    ];
    let head = [b"GGUF", &3u32.to_le_bytes()[..], &0u64.to_le_bytes(), &(entries.len() as u64).to_le_bytes()].concat();
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), [head, entries.concat()].concat()).expect("a temporary file");
    let gguf = Gguf::open(file.path()).expect("a good file");
    let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) else { return };
    if let Ok(ids) = tokenizer.encode("a text, 123 \u{1f642}", true) {
        let _ = tokenizer.decode(&ids, false);
    }
    let _ = tokenizer.to_json();
});
