//! Tokenizers rebuilt from GGUF metadata: each pre-tokenizer cuts text in its own way, and SentencePiece merges by score
//! and falls back to bytes.

mod common;

use common::GgufFile;
use edgellm_model::gguf::Gguf;
use edgellm_model::tokenizer::Tokenizer;

fn build(file: &GgufFile) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap()
}

/// GPT-2's printable stand-ins for the bytes 0 to 255.
fn byte_symbols() -> Vec<String> {
    let mut next = 0x100;
    (0..256u32)
        .map(|byte| {
            let code = if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

const FIRST: u32 = 256;
/// Tokens after those of single bytes; the first six are made by merges.
const MORE: &[&str] = &["12", "123", "1234", "Ġa", "ab", "'M", "Ġthe", "<s>", "</s>", "<tool>", "<pad>"];

fn byte_level(pre: &str) -> GgufFile {
    let symbols = byte_symbols();
    let tokens: Vec<&str> = symbols.iter().map(String::as_str).chain(MORE.iter().copied()).collect();
    let mut types = vec![1; tokens.len()];
    // Control, control, user-defined, unused.
    types[FIRST as usize + 7..].copy_from_slice(&[3, 3, 4, 5]);
    GgufFile::default()
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &tokens)
        .ints("tokenizer.ggml.token_type", &types)
        .strings("tokenizer.ggml.merges", &["1 2", "12 3", "123 4", "Ġ a", "a b", "' M"])
        .u32("tokenizer.ggml.bos_token_id", FIRST + 7)
        .u32("tokenizer.ggml.eos_token_id", FIRST + 8)
}

/// Checks the tokens that a text is cut into, written as in the vocabulary.
fn check(tokenizer: &Tokenizer, text: &str, expected: &[&str]) {
    let ids = tokenizer.encode(text, false).unwrap();
    let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.id_to_token(id).unwrap()).collect();
    assert_eq!(tokens, expected, "{text:?}");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn digits_are_cut_by_the_pre_tokenizer() {
    for default in ["gpt-2", "default"] {
        check(&build(&byte_level(default)), "12345", &["1234", "5"]);
    }
    check(&build(&byte_level("smollm")), "12345", &["1", "2", "3", "4", "5"]);
    check(&build(&byte_level("qwen2")), "12345", &["1", "2", "3", "4", "5"]);
    check(&build(&byte_level("llama-bpe")), "12345", &["123", "4", "5"]);
    check(&build(&byte_level("gpt-2").without("tokenizer.ggml.pre")), "1234", &["1234"]);
}

#[test]
fn words_keep_their_space() {
    for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2"] {
        let tokenizer = build(&byte_level(pre));
        check(&tokenizer, "ab a  a", &["ab", "Ġa", "Ġ", "Ġa"]);
        check(&tokenizer, "<s>ab</s><tool>", &["<s>", "ab", "</s>", "<tool>"]);
    }
}

#[test]
fn llama_3_takes_whole_words_and_large_contractions() {
    let (llama, gpt2) = (build(&byte_level("llama-bpe")), build(&byte_level("gpt-2")));
    // In the vocabulary, but no merge makes it: only Llama 3 looks words up.
    check(&llama, " the", &["Ġthe"]);
    check(&gpt2, " the", &["Ġ", "t", "h", "e"]);
    // GPT-2 knows only small letters after an apostrophe; both end in the same tokens here, by different pieces.
    check(&llama, "I'M", &["I", "'M"]);
    check(&gpt2, "I'M", &["I", "'", "M"]);
}

#[test]
fn qwen_2_composes_characters() {
    let qwen = build(&byte_level("qwen2"));
    assert_eq!(qwen.encode("e\u{301}", false).unwrap(), qwen.encode("\u{e9}", false).unwrap());
    let gpt2 = build(&byte_level("gpt-2"));
    assert_eq!(gpt2.encode("e\u{301}", false).unwrap(), [101, 204, 129]);
}

#[test]
fn start_and_end_are_added_where_the_file_wants_them() {
    let (bos, eos) = (FIRST + 7, FIRST + 8);
    let check = |file: GgufFile, expected: &[u32]| {
        let tokenizer = build(&file);
        assert_eq!(tokenizer.encode("a", true).unwrap(), expected);
        assert_eq!(tokenizer.encode("a", false).unwrap(), [97]);
    };
    check(byte_level("smollm"), &[97]);
    check(byte_level("llama-bpe"), &[bos, 97]);
    check(byte_level("llama-bpe").bool("tokenizer.ggml.add_bos_token", false), &[97]);
    check(byte_level("qwen2").bool("tokenizer.ggml.add_bos_token", true), &[bos, 97]);
    check(byte_level("gpt-2").bool("tokenizer.ggml.add_eos_token", true), &[97, eos]);
}

#[test]
fn special_tokens_can_be_left_out() {
    let tokenizer = build(&byte_level("smollm"));
    let ids = tokenizer.encode("<s>a<tool>b</s>", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<tool>b", "what a user defined is text");
    assert_eq!(tokenizer.vocab_size(), FIRST as usize + MORE.len());
}

#[test]
fn json_made_of_it_is_the_same_tokenizer() {
    for file in
        [byte_level("gpt-2"), byte_level("smollm"), byte_level("llama-bpe"), byte_level("qwen2"), sentence_piece()]
    {
        let tokenizer = build(&file);
        let json = tokenizer.to_json().unwrap();
        let again = Tokenizer::from_json(std::path::Path::new("tokenizer.json"), &json).unwrap();
        for text in ["hello 12345 I'M <s>x</s>", " \u{e9}\n\n\u{1f642}", ""] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(again.encode(text, true).unwrap(), ids);
            assert_eq!(again.decode(&ids, true).unwrap(), tokenizer.decode(&ids, true).unwrap());
        }
    }
}

/// Pieces with scores after the 256 bytes.
const PIECES: &[(&str, f32)] = &[
    ("▁", -20.0),
    ("h", -21.0),
    ("e", -22.0),
    ("l", -23.0),
    ("o", -24.0),
    ("▁h", -1.0),
    ("el", -2.0),
    ("lo", -3.0),
    ("▁hel", -4.0),
    ("▁hello", -5.0),
    ("ll", -6.0),
    ("▁▁", -7.0),
];

fn sentence_piece() -> GgufFile {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let special = ["<unk>", "<s>", "</s>"];
    let tokens: Vec<&str> =
        special.into_iter().chain(bytes.iter().map(String::as_str)).chain(PIECES.iter().map(|(p, _)| *p)).collect();
    let scores: Vec<f32> = vec![0.0; 259].into_iter().chain(PIECES.iter().map(|(_, s)| *s)).collect();
    let mut types = vec![6; tokens.len()];
    types[..3].copy_from_slice(&[2, 3, 3]);
    types[259..].fill(1);
    GgufFile::default()
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .floats("tokenizer.ggml.scores", &scores)
        .ints("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.unknown_token_id", 0)
}

#[test]
fn sentence_piece_merges_the_best_score_first() {
    let tokenizer = build(&sentence_piece());
    check(&tokenizer, "hello", &["▁hello"]);
    // "lo" (-3) goes before "ll" (-6), so that no "ll" is left to be made.
    check(&tokenizer, "llo", &["▁", "l", "lo"]);
    check(&tokenizer, "hell hello", &["▁hel", "l", "▁hello"]);
    check(&tokenizer, "  h", &["▁▁", "▁h"]);
    // Every piece of text between special tokens has a space before it, as in Hugging Face's legacy Llama tokenizer.
    assert_eq!(tokenizer.encode("<s>hello", false).unwrap(), [1, 268]);
    assert_eq!(tokenizer.encode("hello", true).unwrap(), [1, 268]);
}

#[test]
fn sentence_piece_falls_back_to_bytes() {
    let tokenizer = build(&sentence_piece());
    check(&tokenizer, "\u{e9}", &["▁", "<0xC3>", "<0xA9>"]);
    check(&tokenizer, "h\nh", &["▁h", "<0x0A>", "h"]);
    let mut stream = tokenizer.stream(true);
    let given: Vec<String> =
        tokenizer.encode("hello \u{1f642}!", true).unwrap().into_iter().map(|id| stream.push(id).unwrap()).collect();
    assert_eq!(given, ["", "hello", " ", "", "", "", "\u{1f642}", "!"]);
}

#[test]
fn the_leading_space_can_be_left_out() {
    let tokenizer = build(&sentence_piece().bool("tokenizer.ggml.add_space_prefix", false));
    check(&tokenizer, "hello", &["h", "el", "lo"]);
    check(&tokenizer, " hello", &["▁hello"]);
}
