//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`), put together as the original `tokenizer.json` was.
//!
//! `gpt2` is byte-level BPE with merges, whose pre-tokenizer `tokenizer.ggml.pre` names; `llama` is SentencePiece BPE
//! with scores and byte fallback. Names and defaults: llama.cpp's `llama-vocab.cpp`; regular expressions: the
//! `tokenizer.json` of the models.

use ahash::AHashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::tokenizer::{AddedToken, SplitDelimiterBehavior, Tokenizer};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use crate::error::{ModelError, Result, Shown};
use crate::gguf::Gguf;

/// SentencePiece's stand-in for a space, U+2581.
const SPACE: &str = "▁";

/// The longest token whose parts are looked for, in bytes; those of real models are below 100. All ways to split it
/// are tried, which takes time that grows with its square.
const LONGEST_PIECE: usize = 1024;

/// The pre-tokenizer of Llama 3; runs of up to three digits.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The pre-tokenizer of Qwen 2; single digits.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type`.
mod token_type {
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
}

/// How text is cut before byte-level BPE.
#[derive(Clone, Copy, PartialEq)]
enum PreTokenizer {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl PreTokenizer {
    /// By the names that llama.cpp's converter writes.
    fn by_name(name: &str) -> Option<Self> {
        match name {
            "gpt-2" | "gpt2" | "default" => Some(Self::Gpt2),
            "smollm" => Some(Self::SmolLm),
            "llama3" | "llama-v3" | "llama-bpe" => Some(Self::Llama3),
            "qwen2" => Some(Self::Qwen2),
            _ => None,
        }
    }
}

/// The vocabulary of a GGUF file.
struct Vocabulary<'a> {
    gguf: &'a Gguf,
    tokens: Vec<String>,
    ids: AHashMap<String, u32>,
    types: Vec<i64>,
}

/// Builds the tokenizer of a file.
pub(super) fn build(gguf: &Gguf) -> Result<Tokenizer> {
    const KEY: &str = "tokenizer.ggml.model";
    let kind =
        gguf.str(KEY)?.ok_or_else(|| ModelError::tokenizer(gguf.path(), KEY, "the kind of tokenizer", "nothing"))?;
    let vocabulary = Vocabulary::read(gguf)?;
    let mut tokenizer = match kind {
        "gpt2" => byte_level(&vocabulary)?,
        "llama" => sentence_piece(&vocabulary)?,
        other => {
            let what = format!("tokenizer model '{}'", Shown(other));
            return Err(ModelError::unsupported(gguf.path(), what, "gpt2, llama"));
        }
    };
    vocabulary.add_special_tokens(&mut tokenizer)?;
    Ok(tokenizer)
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        const KEY: &str = "tokenizer.ggml.tokens";
        let list = gguf.strings(KEY)?;
        let list = list.ok_or_else(|| ModelError::tokenizer(gguf.path(), KEY, "the tokens", "nothing"))?;
        let mut tokens: Vec<String> = Vec::new();
        let mut ids = AHashMap::new();
        for token in list {
            let id = tokens.len() as u32;
            // As in llama.cpp: a token without text can still be generated.
            let token = if token.is_empty() { format!("[EMPTY_{id}]") } else { token.to_owned() };
            if let Some(first) = ids.insert(token.clone(), id) {
                let found = format!("'{}' as {first} and as {id}", Shown(&token));
                return Err(ModelError::tokenizer(gguf.path(), KEY, "every token once", found));
            }
            tokens.push(token);
        }
        if tokens.is_empty() {
            return Err(ModelError::tokenizer(gguf.path(), KEY, "at least one token", "none"));
        }
        let types: Vec<i64> = gguf.integers("tokenizer.ggml.token_type")?.map(Iterator::collect).unwrap_or_default();
        if !types.is_empty() && types.len() != tokens.len() {
            let (expected, found) = (format!("{} types, one for each token", tokens.len()), types.len());
            return Err(ModelError::tokenizer(gguf.path(), "tokenizer.ggml.token_type", expected, found));
        }
        Ok(Self { gguf, tokens, ids, types })
    }

    fn wrong(&self, what: &str, expected: impl Into<String>, found: impl std::fmt::Display) -> ModelError {
        ModelError::tokenizer(self.gguf.path(), what, expected, found)
    }

    fn library(&self, what: &str) -> impl Fn(tokenizers::Error) -> ModelError + '_ {
        let what = what.to_owned();
        move |e| self.wrong(&what, "parts that fit together", Shown(&e.to_string()))
    }

    fn has_type(&self, id: usize, kind: i64) -> bool {
        self.types.get(id) == Some(&kind)
    }

    /// The token of `tokenizer.ggml.<name>_token_id`.
    fn named(&self, name: &str) -> Result<Option<(u32, &str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.gguf.u64(&key)? else { return Ok(None) };
        match usize::try_from(id).ok().and_then(|id| self.tokens.get(id)) {
            Some(token) => Ok(Some((id as u32, token))),
            None => Err(self.wrong(&key, format!("an id below {}", self.tokens.len()), id)),
        }
    }

    /// Start and end tokens around every text, where the file wants them.
    fn post_process(&self, tokenizer: &mut Tokenizer, default_bos: bool) -> Result<()> {
        let flag = |name: &str, default| Ok::<_, ModelError>(self.gguf.bool(name)?.unwrap_or(default));
        let mut template = Vec::new();
        let mut special = Vec::new();
        let bos = flag("tokenizer.ggml.add_bos_token", default_bos)?.then(|| self.named("bos")).transpose()?.flatten();
        if let Some((id, token)) = bos {
            template.push(token.to_owned());
            special.push((token.to_owned(), id));
        }
        template.push("$A".to_owned());
        let eos = flag("tokenizer.ggml.add_eos_token", false)?.then(|| self.named("eos")).transpose()?.flatten();
        if let Some((id, token)) = eos {
            template.push(token.to_owned());
            if !special.iter().any(|(t, _)| t == token) {
                special.push((token.to_owned(), id));
            }
        }
        if special.is_empty() {
            return Ok(());
        }
        let processor = TemplateProcessing::builder()
            .try_single(template)
            .map(|builder| builder.special_tokens(special))
            .map_err(|e| self.wrong("special tokens", "a start and an end", Shown(&e)))?
            .build()
            .map_err(|e| self.wrong("special tokens", "a start and an end", Shown(&e.to_string())))?;
        tokenizer.with_post_processor(Some(processor));
        Ok(())
    }

    /// Control tokens, and those that users defined, are found in text before anything else.
    fn add_special_tokens(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let control = self.has_type(id, token_type::CONTROL) || self.has_type(id, token_type::UNKNOWN);
            if control || self.has_type(id, token_type::USER_DEFINED) {
                added.push(AddedToken::from(token.clone(), control).normalized(false));
            }
        }
        tokenizer.add_tokens(added).map(drop).map_err(self.library("special tokens"))
    }
}

/// Byte-level BPE as in GPT-2: every byte has a printable character, merges are listed in order.
fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let gguf = vocabulary.gguf;
    let name = gguf.str("tokenizer.ggml.pre")?.unwrap_or("default");
    let pre = PreTokenizer::by_name(name).ok_or_else(|| {
        let what = format!("pre-tokenizer '{}'", Shown(name));
        ModelError::unsupported(gguf.path(), what, "gpt-2, default, smollm, llama-bpe, qwen2")
    })?;
    let llama3 = pre == PreTokenizer::Llama3;
    let model = bpe(vocabulary, merges(vocabulary)?).ignore_merges(llama3).build();
    let mut tokenizer = Tokenizer::new(model.map_err(vocabulary.library("merges"))?);
    if pre == PreTokenizer::Qwen2 {
        tokenizer.with_normalizer(Some(NFC)).map_err(vocabulary.library("normalizer"))?;
    }
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(vocabulary.library("pre-tokenizer"))
    };
    // `ByteLevel` has GPT-2's regular expression built in; the others come with their own.
    let bytes = |own_regex: bool| ByteLevel::new(false, true, own_regex);
    let parts: Vec<PreTokenizerWrapper> = match pre {
        PreTokenizer::Gpt2 => vec![bytes(true).into()],
        PreTokenizer::SmolLm => vec![Digits::new(true).into(), bytes(true).into()],
        PreTokenizer::Llama3 => vec![split(LLAMA3_SPLIT)?.into(), bytes(false).into()],
        PreTokenizer::Qwen2 => vec![split(QWEN2_SPLIT)?.into(), bytes(false).into()],
    };
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(parts)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    vocabulary.post_process(&mut tokenizer, llama3)?;
    Ok(tokenizer)
}

fn bpe(vocabulary: &Vocabulary<'_>, merges: Merges) -> BpeBuilder {
    BPE::builder().vocab_and_merges(vocabulary.ids.clone(), merges)
}

/// `tokenizer.ggml.merges`: pairs with a space between, in the order in which they are tried.
fn merges(vocabulary: &Vocabulary<'_>) -> Result<Merges> {
    const KEY: &str = "tokenizer.ggml.merges";
    let list = vocabulary.gguf.strings(KEY)?.ok_or_else(|| vocabulary.wrong(KEY, "the merges", "nothing"))?;
    let mut merges = Vec::new();
    for (rank, merge) in list.enumerate() {
        // The first character of the left part may itself be a space.
        let skip = merge.chars().next().map_or(0, char::len_utf8);
        let pair = merge[skip..].find(' ').map(|at| (&merge[..skip + at], &merge[skip + at + 1..]));
        let known = |token: &str| vocabulary.ids.contains_key(token);
        match pair {
            Some((left, right)) if known(left) && known(right) && known(&format!("{left}{right}")) => {
                merges.push((left.to_owned(), right.to_owned()));
            }
            _ => {
                let found = format!("'{}' as number {rank}", Shown(merge));
                return Err(vocabulary.wrong(KEY, "two tokens that make a third", found));
            }
        }
    }
    Ok(merges)
}

/// SentencePiece BPE as in Llama 2: spaces are U+2581, the pair whose union has the highest score is merged first, and
/// what is not in the vocabulary falls back to bytes.
fn sentence_piece(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer> {
    let gguf = vocabulary.gguf;
    let unknown = match vocabulary.named("unknown")? {
        Some((_, token)) => token.to_owned(),
        None => vocabulary.tokens[0].clone(),
    };
    let model = bpe(vocabulary, merges_by_score(vocabulary)?)
        .unk_token(unknown)
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(vocabulary.library("merges"))?;
    let mut tokenizer = Tokenizer::new(model);
    let prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(vocabulary.library("normalizer"));
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
    }
    normalizers.push(replace(" ", SPACE)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(vocabulary.library("normalizer"))?;
    let mut decoders = vec![replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    vocabulary.post_process(&mut tokenizer, true)?;
    Ok(tokenizer)
}

/// Every way to make a token of two others, the token with the highest score first; ties as in Hugging Face's
/// conversion of SentencePiece models (`generate_merges` in `convert_slow_tokenizer.py`).
fn merges_by_score(vocabulary: &Vocabulary<'_>) -> Result<Merges> {
    const KEY: &str = "tokenizer.ggml.scores";
    let scores: Vec<f32> = vocabulary.gguf.floats(KEY)?.map(Iterator::collect).unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() {
        let expected = format!("{} scores, one for each token", vocabulary.tokens.len());
        return Err(vocabulary.wrong(KEY, expected, scores.len()));
    }
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (token, &score) in vocabulary.tokens.iter().zip(&scores) {
        if token.len() > LONGEST_PIECE {
            let expected = format!("tokens of at most {LONGEST_PIECE} bytes");
            return Err(vocabulary.wrong("tokenizer.ggml.tokens", expected, format!("one of {}", token.len())));
        }
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocabulary.ids.contains_key(left) && vocabulary.ids.contains_key(right) {
                merges.push((score, left, right));
            }
        }
        merges[first..].sort_by_key(|(_, left, right)| (vocabulary.ids[*left], vocabulary.ids[*right]));
    }
    // A stable sort, by descending score and then by descending lengths, as Python's `sorted(..., reverse=True)`.
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then(b.1.chars().count().cmp(&a.1.chars().count()))
            .then(b.2.chars().count().cmp(&a.2.chars().count()))
    });
    Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}
