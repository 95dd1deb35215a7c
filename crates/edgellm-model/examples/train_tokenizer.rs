//! Trains a byte-level BPE tokenizer (GPT-2's pre-tokenizer and byte alphabet) on a text file and writes
//! `tokenizer.json` and `tokenizer_config.json` with a ChatML template. The same text gives the same bytes.
//!
//! ```text
//! cargo run --release -p edgellm-model --example train_tokenizer -- TEXT DIR VOCABULARY_SIZE
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, TokenizerBuilder, TokenizerImpl};

/// Their positions are their ids. The first ends a document, the other two enclose a turn of a chat.
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [text, folder, size] = args.as_slice() else {
        return Err("expected: train_tokenizer TEXT DIR VOCABULARY_SIZE".into());
    };
    let folder = PathBuf::from(folder);
    let tokenizer = train(&fs::read_to_string(text)?, size.parse()?)?;
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string(true)? + "\n")?;
    write_config(&folder)
}

type ByteLevelBpe = TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>;

/// The special tokens are cut out of the text first: pieces of them must not become merges.
fn train(text: &str, size: usize) -> Result<ByteLevelBpe, Failure> {
    let special: Vec<AddedToken> = SPECIAL_TOKENS.iter().map(|t| AddedToken::from(*t, true)).collect();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: ByteLevelBpe = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level))
        .build()?;
    let mut pieces = vec![text];
    for token in SPECIAL_TOKENS {
        pieces = pieces.into_iter().flat_map(|piece| piece.split(token)).collect();
    }
    tokenizer.train(&mut trainer, pieces.into_iter())?;
    let trained = tokenizer.get_vocab_size(true);
    if trained != size {
        return Err(format!("the text gave {trained} tokens, expected {size}: it has too few words").into());
    }
    Ok(tokenizer)
}

fn write_config(folder: &Path) -> Result<(), Failure> {
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": false,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    });
    fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)? + "\n")?;
    Ok(())
}
