use serde_json::json;

use super::*;

fn read(value: Value) -> Result<ModelConfig> {
    ModelConfig::from_json(Path::new("config.json"), value)
}

/// A small configuration with some fields changed; `null` removes one.
fn config(changes: Value) -> Value {
    let mut json = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 2, "some_future_field": {"kept": [1, 2]}
    });
    for (field, value) in changes.as_object().unwrap() {
        json[field] = value.clone();
    }
    json
}

#[test]
fn llama_and_unknown_fields() {
    let json = config(json!({}));
    let c = read(json.clone()).unwrap();
    assert_eq!((c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim), (64, 8, 4, 2, 16));
    assert_eq!(
        (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, c.tie_word_embeddings),
        (false, false, false, false, false)
    );
    assert_eq!((c.bos_token_id, c.eos_token_ids.as_slice(), c.pad_token_id), (Some(1), &[2][..], None));
    assert_eq!(c.to_json(), json, "unknown fields are kept");
    assert_eq!(c.projection_shape(Projection::K), [32, 64]);
    assert_eq!(c.attention_scale(), 0.25);
    assert_eq!((c.window_of(0), c.uses_rope(3)), (None, true));
    let biased = read(config(json!({"attention_bias": true, "mlp_bias": true}))).unwrap();
    assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
}

#[test]
fn mistral_has_its_window_on_every_block() {
    let mistral = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 64});
    assert_eq!(read(config(mistral)).unwrap().windows, [Some(64); 8]);
    let without = json!({"architectures": ["MistralForCausalLM"], "sliding_window": null});
    assert_eq!(read(config(without)).unwrap().windows, [None; 8]);
}

#[test]
fn qwen2_has_biases_and_late_windows() {
    let qwen = |changes: Value| {
        let mut all = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 6});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        read(config(all)).unwrap()
    };
    let c = qwen(json!({"use_sliding_window": false}));
    assert!(c.qkv_bias && !c.o_bias && !c.qk_norm);
    assert_eq!(c.windows, [None; 8]);
    let c = qwen(json!({"use_sliding_window": true}));
    assert_eq!(c.windows[5..], [None, Some(64), Some(64)]);
    let kinds: Vec<_> = (0..8).map(|i| if i == 0 { "sliding_attention" } else { "full_attention" }).collect();
    let c = qwen(json!({"use_sliding_window": true, "layer_types": kinds}));
    assert_eq!(c.windows[..2], [Some(64), None]);
}

#[test]
fn qwen3_has_norms_and_its_own_head_width() {
    let c = read(config(json!({"architectures": ["Qwen3ForCausalLM"]}))).unwrap();
    assert!(c.qk_norm && !c.qkv_bias);
    assert_eq!(c.head_dim, 128);
    assert_eq!(c.projection_shape(Projection::O), [64, 512]);
}

#[test]
fn smollm3_leaves_rope_out_of_every_fourth_block() {
    let smollm3 = json!({"architectures": ["SmolLM3ForCausalLM"], "rope_theta": null});
    let c = read(config(smollm3)).unwrap();
    assert_eq!(c.rope_layers, [true, true, true, false, true, true, true, false]);
    assert!(c.tie_word_embeddings);
    assert_eq!(c.rope.theta, 2e6);
    let listed = json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [0, 1, 1, 1, 1, 1, 1, 1]});
    assert!(!read(config(listed)).unwrap().uses_rope(0));
}

#[test]
fn rope_in_its_three_spellings() {
    let c = read(config(json!({"rope_scaling": {"type": "linear", "factor": 4}}))).unwrap();
    assert_eq!(c.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let c = read(config(json!({"rope_scaling": llama3}))).unwrap();
    assert!(matches!(c.rope.scaling, RopeScaling::Llama3 { original_context: 8192, .. }));
    let yarn = json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
        "original_max_position_embeddings": 128}});
    let c = read(config(yarn)).unwrap();
    assert_eq!(c.rope.theta, 1e6);
    let RopeScaling::Yarn { attention_factor, original_context, .. } = c.rope.scaling else { panic!("{:?}", c.rope) };
    assert_eq!(original_context, 128);
    assert!((attention_factor - 1.138_629_436).abs() < 1e-9);
    let c = read(config(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}))).unwrap();
    assert_eq!((c.rope.theta, c.rope.scaling), (5e5, RopeScaling::None));
}

#[test]
fn ends_of_text_are_collected() {
    let mut c = read(config(json!({"eos_token_id": [7, 8]}))).unwrap();
    c.add_generation_config(Path::new("generation_config.json"), r#"{"eos_token_id": [9, 7], "pad_token_id": 0}"#)
        .unwrap();
    assert_eq!((c.eos_token_ids.as_slice(), c.pad_token_id), (&[9, 7, 8][..], Some(0)));
    assert_eq!(read(config(json!({"eos_token_id": null}))).unwrap().eos_token_ids, [0u32; 0]);
}

#[test]
fn nonsense_is_named() {
    let check = |changes: Value, expected: &str| {
        let error = read(config(changes)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not say '{expected}'");
    };
    check(json!({"architectures": ["BertModel"]}), "architecture 'BertModel' is not supported");
    check(json!({"architectures": null, "model_type": "bert"}), "model type 'bert'");
    check(json!({"architectures": null, "model_type": null}), "'architectures'");
    check(json!({"hidden_size": null}), "'hidden_size': expected an integer from 1 to 1048576, found nothing");
    check(json!({"hidden_size": -3}), "found -3");
    check(json!({"num_hidden_layers": 1e18}), "'num_hidden_layers'");
    check(json!({"num_hidden_layers": 4097}), "4097");
    check(json!({"num_key_value_heads": 3}), "a divisor of num_attention_heads = 4");
    check(json!({"head_dim": 15}), "an even number");
    check(json!({"hidden_act": "gelu"}), "activation 'gelu'");
    check(json!({"rms_norm_eps": "small"}), "'rms_norm_eps'");
    check(json!({"rope_theta": -1}), "'rope_theta'");
    check(json!({"rope_scaling": {"rope_type": "longrope"}}), "rope scaling 'longrope'");
    check(json!({"rope_scaling": {"rope_type": "linear"}}), "'factor'");
    check(json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), "'factor'");
    check(json!({"rope_scaling": []}), "'rope_scaling'");
    check(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "per kind of layer");
    check(json!({"eos_token_id": "two"}), "a token id");
    check(json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}), "a list of 8");
}
