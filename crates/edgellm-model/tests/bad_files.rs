//! Bad input: truncated, corrupted and hostile files. Each gives one clear error that says what, where, expected and
//! found; none panics, and none makes the program take much memory.

mod common;

use std::path::Path;

use common::{GgufFile, array, blocks, kind, safetensors, small_gguf, text};
use edgellm_model::ModelError;
use edgellm_model::data::{ExampleEncoder, PromptTemplate, ReadOptions, read_examples, read_records};
use edgellm_model::files::ModelFiles;
use edgellm_model::gguf::GgmlType;
use edgellm_model::safetensors::Safetensors;
use edgellm_model::testing::tiny_model_dir;
use edgellm_model::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

type Outcome = Result<(), ModelError>;

/// How a case's file is read.
#[derive(Clone, Copy)]
enum Read {
    /// As a safetensors file.
    Safetensors,
    /// As the `model.safetensors.index.json` of a directory with one good shard `a.safetensors` that holds `x`.
    Index,
    /// As a GGUF model, everything in it.
    Gguf,
    /// As the `config.json` of an otherwise good model.
    Config,
    /// As the `tokenizer.json` of an otherwise good model.
    Tokenizer,
    /// As the `tokenizer_config.json` of an otherwise good model.
    TokenizerConfig,
    /// As the `model.safetensors` of an otherwise good model.
    Weights,
    /// As JSON lines.
    Data,
    /// As CSV.
    Table,
}

/// Writes `content` where it belongs below `dir`, and reads it.
fn read(dir: &Path, how: Read, content: &[u8]) -> Outcome {
    let put = |name: &str| {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let in_model = |name: &str| {
        tiny_model_dir(dir, 0)?;
        put(name);
        common::read_everything(dir)
    };
    match how {
        Read::Safetensors => Safetensors::open(&put("x.safetensors")).map(drop),
        Read::Index => {
            let good = r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
            std::fs::write(dir.join("a.safetensors"), safetensors(good, &[7])).unwrap();
            put("model.safetensors.index.json");
            Safetensors::open_dir(dir).map(drop)
        }
        Read::Gguf => common::read_everything(&put("m.gguf")),
        Read::Config => in_model("config.json"),
        Read::Tokenizer => in_model("tokenizer.json"),
        Read::TokenizerConfig => in_model("tokenizer_config.json"),
        Read::Weights => in_model("model.safetensors"),
        Read::Data => read_records(&put("d.jsonl"), &ReadOptions::default()).map(drop),
        Read::Table => read_records(&put("d.csv"), &ReadOptions::default()).map(drop),
    }
}

/// Name, how it is read, content, what the error says.
type Case = (&'static str, Read, Vec<u8>, &'static str);

fn safetensors_cases() -> Vec<Case> {
    use Read::{Index, Safetensors};
    let file = |header: &str, data: usize| safetensors(header, &vec![0; data]);
    let one = |fields: &str| file(&format!("{{\"x\":{{{fields}}}}}"), 8);
    let index = |map: Value| json!({"weight_map": map}).to_string().into_bytes();
    vec![
        ("empty", Safetensors, vec![], "expected at least 8 bytes, found 0 bytes"),
        ("length cut", Safetensors, vec![1, 0, 0], "found 3 bytes"),
        (
            "length of everything",
            Safetensors,
            vec![0xff; 16],
            "expected a length of at most 8 bytes, found 18446744073709551615",
        ),
        ("header cut", Safetensors, file("{\"x\":{\"dtype\":", 0), "expected a JSON object of tensors"),
        (
            "header no UTF-8",
            Safetensors,
            safetensors("{\"\u{fffd}\"", b"").iter().map(|&b| if b == 0xef { 0xff } else { b }).collect(),
            "expected UTF-8",
        ),
        ("header no object", Safetensors, file("[1,2]", 0), "expected a JSON object of tensors"),
        ("header very deep", Safetensors, file(&"[".repeat(100_000), 0), "expected a JSON object of tensors"),
        (
            "data cut",
            Safetensors,
            file(r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, 8),
            "exactly the bytes that the header describes",
        ),
        (
            "data too long",
            Safetensors,
            file(r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 8),
            "exactly the bytes",
        ),
        (
            "unknown type",
            Safetensors,
            one(r#""dtype":"Q4","shape":[2],"data_offsets":[0,8]"#),
            "expected a JSON object of tensors",
        ),
        (
            "shape overflows",
            Safetensors,
            one(r#""dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]"#),
            "consistent shapes",
        ),
        (
            "shape is not size",
            Safetensors,
            one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#),
            "consistent shapes",
        ),
        (
            "negative shape",
            Safetensors,
            one(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#),
            "expected a JSON object of tensors",
        ),
        (
            "offsets backwards",
            Safetensors,
            one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#),
            "without gaps or overlaps",
        ),
        ("gap", Safetensors, one(r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#), "without gaps or overlaps"),
        (
            "overlap",
            Safetensors,
            file(
                r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            "without gaps or overlaps",
        ),
        ("index no JSON", Index, b"{\"weight_map\": {".to_vec(), "expected a JSON object with a 'weight_map'"),
        ("index without map", Index, b"{}".to_vec(), "expected a JSON object with a 'weight_map'"),
        (
            "index leads out",
            Index,
            index(json!({"x": "../a.safetensors"})),
            "expected a file name without a folder, found '../a.safetensors'",
        ),
        ("index absolute", Index, index(json!({"x": "/a.safetensors"})), "without a folder"),
        ("index to its folder", Index, index(json!({"x": "."})), "without a folder"),
        ("shard missing", Index, index(json!({"x": "b.safetensors"})), "cannot open"),
        (
            "tensor in no shard",
            Index,
            index(json!({"x": "a.safetensors", "y": "a.safetensors"})),
            "tensor 'y': expected in a.safetensors, as the index says",
        ),
    ]
}

/// The header of a GGUF file with counts, then `rest`.
fn gguf_header(version: u32, tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    [b"GGUF", &version.to_le_bytes()[..], &tensors.to_le_bytes(), &entries.to_le_bytes(), rest].concat()
}

fn gguf_structure_cases() -> Vec<Case> {
    use Read::Gguf;
    let good = small_gguf();
    let whole = good.bytes();
    let entry = |key: &str, kind: u32, value: Vec<u8>| GgufFile::default().set(key, kind, value).bytes();
    let nested = (0..100).fold(Vec::new(), |inner, _| array(kind::ARRAY, &[inner]));
    let tensor =
        |dims: &[u64], id: u32, len: usize| small_gguf().tensor("output.weight", dims, id, vec![0; len]).bytes();
    let at = |needle: &[u8]| whole.windows(needle.len()).position(|w| w == needle).unwrap();
    let unaligned = {
        // The offset is the last field of the first tensor's entry.
        let mut bytes = whole.clone();
        let name = at(&text("token_embd.weight"));
        bytes[name + 8 + 17 + 4 + 16 + 4] = 1;
        bytes
    };
    vec![
        ("empty", Gguf, vec![], "GGUF magic: expected 4 bytes, found 0 bytes"),
        ("wrong magic", Gguf, b"GGML\x03\0\0\0".to_vec(), "expected the letters GGUF"),
        ("version 1", Gguf, gguf_header(1, 0, 0, b""), "GGUF version 1 is not supported"),
        ("big-endian", Gguf, gguf_header(3u32.swap_bytes(), 0, 0, b""), "a big-endian GGUF file is not supported"),
        (
            "counts cut",
            Gguf,
            gguf_header(3, 0, 0, b"")[..20].to_vec(),
            "GGUF metadata count: expected 8 bytes, found 4 bytes left at offset 16",
        ),
        (
            "tensors without number",
            Gguf,
            gguf_header(3, u64::MAX, 0, &[0; 64]),
            "GGUF tensor count: expected at most what 64 bytes hold",
        ),
        (
            "entries without number",
            Gguf,
            gguf_header(3, 0, 1 << 60, &[0; 64]),
            "GGUF metadata count: expected at most what 64 bytes hold",
        ),
        (
            "key longer than the file",
            Gguf,
            gguf_header(3, 0, 1, &[0xff; 32]),
            "GGUF metadata key: expected 18446744073709551615 bytes",
        ),
        (
            "key no UTF-8",
            Gguf,
            gguf_header(3, 0, 1, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 4, 0, 0, 0, 0, 0, 0, 0]),
            "expected UTF-8, found other bytes at offset 32",
        ),
        ("unknown value type", Gguf, entry("k", 13, vec![0; 8]), "expected a value type from 0 to 12, found 13"),
        (
            "array longer than the file",
            Gguf,
            entry("k", kind::ARRAY, [&4u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()),
            "expected as many elements as there is room for",
        ),
        (
            "array of strings without end",
            Gguf,
            entry("k", kind::ARRAY, [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[0xff; 16]].concat()),
            "GGUF array 'k': expected 18446744073709551615 bytes",
        ),
        ("arrays in arrays", Gguf, entry("k", kind::ARRAY, nested), "expected arrays at most 4 deep"),
        ("key twice", Gguf, good.clone().twice("llama.block_count").bytes(), "expected every key once"),
        (
            "alignment zero",
            Gguf,
            good.clone().u32("general.alignment", 0).bytes(),
            "expected a power of two from 8, found 0",
        ),
        ("alignment 48", Gguf, good.clone().u32("general.alignment", 48).bytes(), "found 48"),
        (
            "tensor table cut",
            Gguf,
            whole[..at(b"blk.0.ffn_up.weight") + 4].to_vec(),
            "GGUF tensor name: expected 19 bytes, found 4 bytes left",
        ),
        (
            "data cut",
            Gguf,
            whole[..whole.len() - 1].to_vec(),
            "tensor 'blk.0.ffn_down.weight': expected 131072 bytes from offset",
        ),
        ("unaligned", Gguf, unaligned, "expected an offset that is a multiple of 32, found 1"),
        ("no dimensions", Gguf, tensor(&[], 0, 0), "expected 1 to 4 dimensions, found 0"),
        (
            "dimensions overflow",
            Gguf,
            tensor(&[1 << 62, 1 << 62], 0, 64),
            "tensor 'output.weight': expected rows of whole blocks",
        ),
        ("dimension zero", Gguf, tensor(&[256, 0], 0, 64), "expected rows of whole blocks"),
        (
            "half a block",
            Gguf,
            tensor(&[100, 8], GgmlType::Q4_K.id(), 64),
            "expected rows of whole blocks of 256 elements of Q4_K",
        ),
        ("larger than the file", Gguf, tensor(&[256, 1 << 40], GgmlType::Q4_K.id(), 64), "from offset"),
        (
            "unknown tensor type",
            Gguf,
            tensor(&[256, 8], 999, 64),
            "tensor 'output.weight' of GGML type 999 is not supported",
        ),
        ("removed tensor type", Gguf, tensor(&[256, 8], 4, 64), "of GGML type 4 is not supported (supported: F32"),
    ]
}

fn gguf_model_cases() -> Vec<Case> {
    use Read::Gguf;
    let good = small_gguf;
    let types = |types: &[i32]| good().ints("tokenizer.ggml.token_type", types).bytes();
    let tokens = |tokens: &[&str]| good().strings("tokenizer.ggml.tokens", tokens).bytes();
    let sentence_piece = || good().string("tokenizer.ggml.model", "llama");
    let f32s = |n: usize| blocks(GgmlType::F32, n);
    vec![
        (
            "no architecture",
            Gguf,
            good().without("general.architecture").bytes(),
            "'general.architecture': expected the name of an architecture",
        ),
        (
            "unknown architecture",
            Gguf,
            good().string("general.architecture", "mamba\u{7}").bytes(),
            "GGUF architecture 'mamba\\u{7}' is not supported",
        ),
        (
            "architecture is a number",
            Gguf,
            good().u32("general.architecture", 3).bytes(),
            "expected a text, found an integer",
        ),
        (
            "no hidden size",
            Gguf,
            good().without("llama.embedding_length").bytes(),
            "'llama.embedding_length': expected an integer from 1, found nothing",
        ),
        (
            "heads per layer",
            Gguf,
            good().ints("llama.attention.head_count", &[4]).bytes(),
            "expected an integer from 0, found an array",
        ),
        (
            "no heads",
            Gguf,
            good().u32("llama.attention.head_count", 0).bytes(),
            "'num_attention_heads': expected an integer from 1",
        ),
        (
            "blocks without number",
            Gguf,
            good().u32("llama.block_count", u32::MAX).bytes(),
            "'num_hidden_layers': expected an integer from 1 to 4096, found 4294967295",
        ),
        ("experts", Gguf, good().u32("llama.expert_count", 8).bytes(), "a mixture of experts is not supported"),
        (
            "another value width",
            Gguf,
            good().u32("llama.attention.value_length", 32).bytes(),
            "expected the key length 64, found 32",
        ),
        (
            "unknown tensor",
            Gguf,
            good().tensor("blk.0.ffn_gate_exps.weight", &[32], 0, f32s(32)).bytes(),
            "tensor 'blk.0.ffn_gate_exps.weight' of a llama model is not supported",
        ),
        (
            "rows are not heads",
            Gguf,
            good().tensor("blk.0.attn_q.weight", &[256, 252], 0, f32s(256 * 252)).bytes(),
            "expected 4 heads of 64 rows, found 252 rows",
        ),
        (
            "matrix in three dimensions",
            Gguf,
            good().tensor("output.weight", &[256, 2, 4], 0, f32s(2048)).bytes(),
            "expected a matrix, found shape [4, 2, 256]",
        ),
        (
            "rope factors of another length",
            Gguf,
            good().tensor("rope_freqs.weight", &[8], 0, f32s(8)).bytes(),
            "expected 32 values, half of a head's width, found 8",
        ),
        (
            "unknown rope scaling",
            Gguf,
            good().string("llama.rope.scaling.type", "su").bytes(),
            "rope scaling 'su' is not supported",
        ),
        (
            "bias on query only",
            Gguf,
            good().tensor("blk.0.attn_q.bias", &[256], 0, f32s(256)).bytes(),
            "a bias on only some of the attention's projections",
        ),
        (
            "no tokenizer",
            Gguf,
            good().without("tokenizer.ggml.model").bytes(),
            "expected the kind of tokenizer, found nothing",
        ),
        (
            "unknown tokenizer",
            Gguf,
            good().string("tokenizer.ggml.model", "t5").bytes(),
            "tokenizer model 't5' is not supported",
        ),
        (
            "unknown pre-tokenizer",
            Gguf,
            good().string("tokenizer.ggml.pre", "viking").bytes(),
            "pre-tokenizer 'viking' is not supported",
        ),
        ("no tokens", Gguf, tokens(&[]), "expected at least one token"),
        (
            "tokens are numbers",
            Gguf,
            good().ints("tokenizer.ggml.tokens", &[1, 2]).bytes(),
            "expected an array of texts",
        ),
        ("token twice", Gguf, tokens(&["a", "b", "a"]), "expected every token once, found 'a' as 0 and as 2"),
        ("too few token types", Gguf, types(&[3, 3]), "expected 8 types, one for each token, found 2"),
        ("no merges", Gguf, good().without("tokenizer.ggml.merges").bytes(), "expected the merges, found nothing"),
        (
            "merge of unknown tokens",
            Gguf,
            good().strings("tokenizer.ggml.merges", &["a b", "x y"]).bytes(),
            "expected two tokens that make a third, found 'x y' as number 1",
        ),
        (
            "merge without a space",
            Gguf,
            good().strings("tokenizer.ggml.merges", &["ab"]).bytes(),
            "found 'ab' as number 0",
        ),
        (
            "merge that makes no token",
            Gguf,
            good().strings("tokenizer.ggml.merges", &["b a"]).bytes(),
            "found 'b a' as number 0",
        ),
        (
            "start token outside",
            Gguf,
            good().u32("tokenizer.ggml.bos_token_id", 8).bool("tokenizer.ggml.add_bos_token", true).bytes(),
            "expected an id below 8, found 8",
        ),
        ("no scores", Gguf, sentence_piece().bytes(), "expected 8 scores, one for each token, found 0"),
        (
            "scores are integers",
            Gguf,
            sentence_piece().ints("tokenizer.ggml.scores", &[0; 8]).bytes(),
            "expected 8 scores, one for each token, found 0",
        ),
        (
            "endless token",
            Gguf,
            sentence_piece()
                .strings("tokenizer.ggml.tokens", &["<unk>", "<s>", "</s>", &"a".repeat(5000)])
                .floats("tokenizer.ggml.scores", &[0.0; 4])
                .without("tokenizer.ggml.token_type")
                .bytes(),
            "expected tokens of at most 1024 bytes, found one of 5000",
        ),
        (
            "broken chat template",
            Gguf,
            good().string("tokenizer.chat_template", "{% for %}").bytes(),
            "m.gguf: chat template: ",
        ),
    ]
}

/// The good configuration of the tiny model with changes; `null` removes a field.
fn config(changes: Value) -> Vec<u8> {
    let mut config = edgellm_model::testing::tiny_config_json();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config.to_string().into_bytes()
}

fn directory_cases() -> Vec<Case> {
    use Read::{Config, Data, Table, Tokenizer, TokenizerConfig, Weights};
    let quantized = |tensors: Value| {
        config(json!({"quantization_config": {"quant_method": "edgellm", "format_version": 1, "tensors": tensors}}))
    };
    let empty = r#"{"x":{"dtype":"F64","shape":[1,1],"data_offsets":[0,8]}}"#;
    let template = |value: Value| json!({"chat_template": value}).to_string().into_bytes();
    vec![
        ("empty config", Config, vec![], "configuration: expected a JSON object"),
        ("config no UTF-8", Config, vec![b'{', 0xff], "expected UTF-8, found other bytes at offset 1"),
        ("config very deep", Config, "[".repeat(1_000_000).into_bytes(), "expected a JSON object"),
        ("config is a list", Config, b"[]".to_vec(), "expected a JSON object"),
        (
            "another architecture",
            Config,
            config(json!({"architectures": ["GPT2LMHeadModel"]})),
            "architecture 'GPT2LMHeadModel' is not supported (supported: LlamaForCausalLM",
        ),
        (
            "layers without number",
            Config,
            config(json!({"num_hidden_layers": 1u64 << 60})),
            "'num_hidden_layers': expected an integer from 1 to 4096",
        ),
        (
            "hidden size a text",
            Config,
            config(json!({"hidden_size": "64"})),
            "'hidden_size': expected an integer from 1 to 1048576, found \"64\"",
        ),
        (
            "another quantization",
            Config,
            config(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})),
            "quantization method 'gptq' is not supported",
        ),
        (
            "quantization of the future",
            Config,
            config(json!({"quantization_config": {"quant_method": "edgellm", "format_version": 9}})),
            "quantization_config of version 9 is not supported",
        ),
        (
            "quantization without method",
            Config,
            config(json!({"quantization_config": []})),
            "expected an object with 'quant_method'",
        ),
        (
            "unknown packed format",
            Config,
            quantized(json!({"a.weight": {"format": "q7g32a", "shape": [1, 32]}})),
            "'quantization_config': expected formats and shapes",
        ),
        (
            "packed tensor missing",
            Config,
            quantized(json!({"a.weight": {"format": "q4g32a", "shape": [1, 32]}})),
            "no tensor 'a.qweight'",
        ),
        (
            "packed shape overflows",
            Config,
            quantized(json!({"a.weight": {"format": "q4g32a", "shape": [u64::MAX, u64::MAX]}})),
            "tensor 'a.weight'",
        ),
        (
            "packed as floats",
            Config,
            quantized(json!({"a.weight": {"format": "f32", "shape": [1, 32]}})),
            "expected a quantized format, found f32",
        ),
        ("empty tokenizer", Tokenizer, vec![], "tokenizer.json: expected a tokenizer"),
        ("tokenizer is a list", Tokenizer, b"[1]".to_vec(), "expected a tokenizer"),
        (
            "tokenizer of nothing",
            Tokenizer,
            b"{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}".to_vec(),
            "",
        ),
        (
            "merge of nothing",
            Tokenizer,
            b"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [[\"a\", \"a\"]]}}".to_vec(),
            "expected a tokenizer, found",
        ),
        ("template is a number", TokenizerConfig, template(json!(3)), "'chat_template': expected a text, or a list"),
        (
            "no default template",
            TokenizerConfig,
            template(json!([{"name": "rag", "template": "x"}])),
            "a list with a template named 'default'",
        ),
        ("template fails", TokenizerConfig, template(json!("{{ messages[0].content.nothing() }}")), "chat template: "),
        (
            "template without end",
            TokenizerConfig,
            template(json!(
                "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
            )),
            "chat template: ",
        ),
        ("tokenizer config no JSON", TokenizerConfig, b"{".to_vec(), "expected a JSON object"),
        ("weights of doubles", Weights, safetensors(empty, &[0; 8]), "tensor 'x' of type F64 is not supported"),
        (
            "weights of no rows",
            Weights,
            safetensors(r#"{"x":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}"#, &[]),
            "0 rows",
        ),
        ("data no JSON", Data, b"{\"text\": \"a\"}\n{\"text\":".to_vec(), "d.jsonl line 2: expected a JSON object"),
        ("data very deep", Data, "[".repeat(1_000_000).into_bytes(), "line 1: expected a JSON object"),
        (
            "data of another kind",
            Data,
            b"{\"question\": \"a\"}".to_vec(),
            "line 1: expected an object with 'instruction' and 'output'",
        ),
        (
            "data without response",
            Data,
            b"{\"prompt\": \"a\"}".to_vec(),
            "expected a text as 'response', found nothing",
        ),
        ("data no UTF-8", Data, b"{\"text\": \"\xc3\x28\"}".to_vec(), "line 1: expected UTF-8"),
        ("data with an endless line", Data, vec![b'a'; (16 << 20) + 1], "line 1: expected at most 16777216 bytes"),
        (
            "table without columns",
            Table,
            b"question,answer\na,b\n".to_vec(),
            "d.csv line 1: expected a header row with the columns 'instruction' and 'output'",
        ),
        (
            "table with an open quote",
            Table,
            b"prompt,response\na,b\nc,\"d\n".to_vec(),
            "d.csv line 3: expected a quote that ends the field",
        ),
        ("table with a short row", Table, b"prompt,response\n\na\n".to_vec(), "line 3: expected 2 fields"),
        ("empty data", Data, vec![], "expected at least one line with an example, found none"),
    ]
}

#[test]
fn every_bad_file_gives_its_error() {
    let cases = [safetensors_cases(), gguf_structure_cases(), gguf_model_cases(), directory_cases()].concat();
    assert!(cases.len() >= 100, "{} cases", cases.len());
    let mut failures = Vec::new();
    for (name, how, content, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        match read(folder.path(), how, &content) {
            // A tokenizer without tokens is one that says nothing.
            Ok(()) if expected.is_empty() => {}
            Ok(()) => failures.push(format!("{name}: no error")),
            Err(error) => {
                let said = error.to_string();
                if !said.contains(expected) || said.chars().count() > 600 {
                    failures.push(format!("{name}: '{said}' does not say '{expected}'"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    if let Some(peak) = common::peak_rss() {
        assert!(peak < 400 << 20, "{peak} bytes of memory for files of at most 17 MB");
    }
}

#[test]
fn good_files_are_good() {
    let folder = tempfile::tempdir().unwrap();
    read(folder.path(), Read::Gguf, &small_gguf().bytes()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    read(folder.path(), Read::Config, &config(json!({}))).unwrap();
}

#[test]
fn what_is_no_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let error = |path: &Path| ModelFiles::open(path).unwrap_err().to_string();
    assert!(error(&folder.path().join("nothing")).contains("cannot open"));
    assert!(error(folder.path()).contains("config.json"));
    std::fs::create_dir(folder.path().join("config.json")).unwrap();
    assert!(error(folder.path()).contains("expected a regular file, found a folder"));
    #[cfg(target_os = "linux")]
    assert!(error(Path::new("/dev/zero")).contains("expected a regular file"));
    assert!(Tokenizer::open(folder.path()).is_err());
}

/// Good files to damage: name in its folder, how it is read, content.
fn good_files() -> Vec<(&'static str, Read, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    tiny_model_dir(folder.path(), 0).unwrap();
    let file = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let spm = small_gguf()
        .string("tokenizer.ggml.model", "llama")
        .floats("tokenizer.ggml.scores", &[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]);
    let line = r#"{"instruction": "a", "input": "b", "output": "c"}"#;
    let chat = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    vec![
        ("m.gguf", Read::Gguf, small_gguf().bytes()),
        ("spm.gguf", Read::Gguf, spm.bytes()),
        ("model.safetensors", Read::Weights, file("model.safetensors")),
        ("config.json", Read::Config, file("config.json")),
        ("tokenizer.json", Read::Tokenizer, file("tokenizer.json")),
        ("tokenizer_config.json", Read::TokenizerConfig, file("tokenizer_config.json")),
        ("index", Read::Index, br#"{"weight_map": {"x": "a.safetensors"}}"#.to_vec()),
        ("d.jsonl", Read::Data, format!("{line}\n{chat}\n{{\"text\": \"d\"}}\n").into_bytes()),
        ("d.csv", Read::Table, b"prompt,response\na,b\n\"c, \"\"c\"\"\",\"d\nd\"\n".to_vec()),
    ]
}

/// Replaces bytes, mostly in the first part, where headers are, and perhaps cuts the end off.
fn damage(content: &[u8], flips: &[(u32, bool, u8)], cut: Option<u32>) -> Vec<u8> {
    let mut out = content.to_vec();
    for &(at, early, value) in flips {
        let within = if early { out.len().min(3000) } else { out.len() };
        if within > 0 {
            let at = at as usize % within;
            out[at] = value;
        }
    }
    if let Some(cut) = cut {
        out.truncate(cut as usize % (out.len() + 1));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to a file, reading it ends in a value or an error.
    #[test]
    fn damaged_files_never_panic(
        which in 0usize..9,
        flips in prop::collection::vec((any::<u32>(), any::<bool>(), any::<u8>()), 0..4),
        cut in prop::option::weighted(0.3, any::<u32>()),
    ) {
        let (_, how, content) = good_files().swap_remove(which);
        let folder = tempfile::tempdir().unwrap();
        let _ = read(folder.path(), how, &damage(&content, &flips, cut));
    }

    /// Lines of any kind become examples or errors.
    #[test]
    fn any_text_is_encoded_or_refused(prompt in ".{0,40}", response in ".{0,40}", max_len in 1usize..64) {
        let folder = tempfile::tempdir().unwrap();
        tiny_model_dir(folder.path(), 0).unwrap();
        let files = ModelFiles::open(folder.path()).unwrap();
        let (tokenizer, chat) = (files.tokenizer().unwrap(), files.chat_template().unwrap());
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, json!({"prompt": prompt, "response": response}).to_string()).unwrap();
        for template in [PromptTemplate::Chat, PromptTemplate::Alpaca, PromptTemplate::Text] {
            let encoder =
                ExampleEncoder { tokenizer: &tokenizer, chat: chat.as_ref(), template, end_tokens: &[256], max_len };
            if let Ok(data) = read_examples(&path, &encoder, &ReadOptions::default()) {
                prop_assert!(data.examples[0].ids.len() <= max_len);
                prop_assert!(data.examples[0].n_targets() > 0);
            }
        }
    }
}
