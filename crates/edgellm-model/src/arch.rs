//! The table of architectures: everything in which the supported decoders differ, as data.
//!
//! All of them are pre-norm decoders with RMSNorm, rotary embedding, grouped-query attention and a gated
//! feed-forward part, under the same Hugging Face tensor names. A new one of this kind is a line in
//! [`ARCHITECTURES`]. Sources: the configuration and modelling files of Hugging Face transformers, and llama.cpp's
//! `convert_hf_to_gguf.py` for the GGUF side.

/// Where a yes or no of the architecture comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// Fixed by the architecture.
    Always(bool),
    /// A field of `config.json`, false if it is not there.
    Field(&'static str),
}

/// Which blocks have a sliding window, where `layer_types` does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowRule {
    /// None.
    Never,
    /// All, if `sliding_window` is set.
    All,
    /// Blocks from `max_window_layers` on, if `use_sliding_window`.
    FromLayer,
    /// Blocks without rotary embedding, if `use_sliding_window`.
    WithoutRope,
}

/// An architecture.
#[derive(Debug, PartialEq)]
pub struct Architecture {
    /// Hugging Face's class, in `architectures`.
    pub name: &'static str,
    /// Hugging Face's `model_type`.
    pub model_type: &'static str,
    /// `general.architecture` in GGUF files.
    pub gguf: &'static str,
    /// Biases of the query, key and value projections.
    pub qkv_bias: Switch,
    /// Bias of the attention's output projection.
    pub o_bias: Switch,
    /// Biases of the feed-forward part.
    pub mlp_bias: Switch,
    /// RMSNorm on every head's query and key.
    pub qk_norm: bool,
    /// Sliding windows.
    pub windows: WindowRule,
    /// Every so-many-th block has no rotary embedding, unless `no_rope_layers` says it.
    pub no_rope_interval: Option<usize>,
    /// `head_dim` where the file does not say it; otherwise `hidden_size / num_attention_heads`.
    pub default_head_dim: Option<usize>,
    /// `rope_theta` where the file does not say it.
    pub default_rope_theta: f64,
    /// `tie_word_embeddings` where the file does not say it.
    pub default_tied: bool,
    /// Whether GGUF files hold the rows of the query and key projections in the order of interleaved pairs, which
    /// [`interleaved_row`] undoes.
    pub gguf_interleaved: bool,
}

const BASE: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    gguf: "llama",
    qkv_bias: Switch::Field("attention_bias"),
    o_bias: Switch::Field("attention_bias"),
    mlp_bias: Switch::Field("mlp_bias"),
    qk_norm: false,
    windows: WindowRule::Never,
    no_rope_interval: None,
    default_head_dim: None,
    default_rope_theta: 10_000.0,
    default_tied: false,
    gguf_interleaved: true,
};

/// Every architecture that is supported. GGUF's `llama` is read as the first; Mistral models are converted to it.
pub const ARCHITECTURES: &[Architecture] = &[
    BASE,
    Architecture {
        name: "MistralForCausalLM",
        model_type: "mistral",
        qkv_bias: Switch::Always(false),
        o_bias: Switch::Always(false),
        mlp_bias: Switch::Always(false),
        windows: WindowRule::All,
        ..BASE
    },
    Architecture {
        name: "Qwen2ForCausalLM",
        model_type: "qwen2",
        gguf: "qwen2",
        qkv_bias: Switch::Always(true),
        o_bias: Switch::Always(false),
        mlp_bias: Switch::Always(false),
        windows: WindowRule::FromLayer,
        gguf_interleaved: false,
        ..BASE
    },
    Architecture {
        name: "Qwen3ForCausalLM",
        model_type: "qwen3",
        gguf: "qwen3",
        mlp_bias: Switch::Always(false),
        qk_norm: true,
        windows: WindowRule::FromLayer,
        default_head_dim: Some(128),
        gguf_interleaved: false,
        ..BASE
    },
    Architecture {
        name: "SmolLM3ForCausalLM",
        model_type: "smollm3",
        gguf: "smollm3",
        windows: WindowRule::WithoutRope,
        no_rope_interval: Some(4),
        default_rope_theta: 2_000_000.0,
        default_tied: true,
        ..BASE
    },
];

impl Architecture {
    /// The architecture of a Hugging Face class.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|a| a.name == name)
    }

    /// The architecture of a Hugging Face `model_type`.
    pub fn by_model_type(model_type: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|a| a.model_type == model_type)
    }

    /// The architecture of a GGUF file.
    pub fn by_gguf(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|a| a.gguf == name)
    }

    /// All Hugging Face classes, for messages.
    pub fn names() -> String {
        ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", ")
    }
}

/// Parts of tensor names outside the blocks: GGUF's and Hugging Face's.
const GLOBAL_PARTS: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Parts of tensor names within a block: GGUF's and Hugging Face's.
const BLOCK_PARTS: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The GGUF tensor with the divisors of rotary frequencies; it is a part of the configuration.
pub const GGUF_ROPE_FACTORS: &str = "rope_freqs.weight";

/// The Hugging Face name of a GGUF tensor.
pub fn hf_name(gguf: &str) -> Option<String> {
    let (stem, kind) = gguf.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let find =
        |parts: &'static [(&str, &'static str)], part: &str| parts.iter().find(|(g, _)| *g == part).map(|(_, hf)| *hf);
    if let Some(hf) = find(GLOBAL_PARTS, stem) {
        return Some(format!("{hf}.{kind}"));
    }
    let (index, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let index: usize = index.parse().ok()?;
    Some(format!("model.layers.{index}.{}.{kind}", find(BLOCK_PARTS, part)?))
}

/// Which of its rows a GGUF file's query or key projection holds row `row` of Hugging Face's in.
///
/// Hugging Face's rotary embedding pairs dimension `j` of a head with `j + head_dim / 2`; llama.cpp's pairs `2 j` with
/// `2 j + 1`, and its converter permutes the rows of these projections accordingly (`LlamaModel.permute`).
pub fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
    head * head_dim + 2 * j + half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped() {
        let check = |gguf: &str, hf: Option<&str>| assert_eq!(hf_name(gguf).as_deref(), hf, "{gguf}");
        check("token_embd.weight", Some("model.embed_tokens.weight"));
        check("output.weight", Some("lm_head.weight"));
        check("output_norm.weight", Some("model.norm.weight"));
        check("blk.12.attn_q.bias", Some("model.layers.12.self_attn.q_proj.bias"));
        check("blk.0.attn_q_norm.weight", Some("model.layers.0.self_attn.q_norm.weight"));
        check("blk.3.ffn_down.weight", Some("model.layers.3.mlp.down_proj.weight"));
        check("blk.3.ffn_gate_exps.weight", None);
        check("blk.x.ffn_down.weight", None);
        check("blk.3", None);
        check("weight", None);
    }

    #[test]
    fn rows_go_back_to_halves() {
        // The converter's permutation of one head of 8 rows, from its definition: reshape to (2, 4), swap, flatten.
        let converted: Vec<usize> = (0..4).flat_map(|j| [j, j + 4]).collect();
        for row in 0..8 {
            assert_eq!(converted[interleaved_row(row, 8)], row);
            assert_eq!(interleaved_row(row + 8, 8), interleaved_row(row, 8) + 8);
        }
    }

    #[test]
    fn every_architecture_is_found_by_its_names() {
        for a in ARCHITECTURES {
            assert_eq!(Architecture::by_name(a.name), Some(a));
            assert_eq!(Architecture::by_model_type(a.model_type), Some(a));
        }
        assert_eq!(Architecture::by_gguf("llama").unwrap().name, "LlamaForCausalLM");
        assert_eq!(Architecture::by_gguf("mamba"), None);
    }
}
