"""Checks an adapter directory in PEFT's layout on a Llama-layout model, and the logits that follow from it.

usage: check_adapter.py MODEL_DIRECTORY ADAPTER_DIRECTORY LOGITS.safetensors

Names, shapes and orientation are PEFT's: y = W x + (alpha / r) B (A x), with lora_A [r, in] and lora_B [out, r]. The
decoder below is written from the published formulas with numpy alone; its logits with the adapter merged into the
weights must be those that edgellm wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ALLOWED = 1e-2


def load(directory):
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    tensors = {}
    for part in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(part))
    return config, tensors


def merge(tensors, directory):
    """Adds the adapter to the weights; returns how many projections it changes."""
    directory = Path(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    adapter = load_file(directory / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA", config["peft_type"]
    assert config["task_type"] == "CAUSAL_LM", config["task_type"]
    assert config.get("bias", "none") == "none", config["bias"]
    assert "base_model_name_or_path" in config
    rank, scaling = config["r"], config["lora_alpha"] / config["r"]
    prefix, changed, targets = "base_model.model.", 0, set()
    for name in [n for n in adapter if n.endswith(".lora_A.weight")]:
        a, b = adapter.pop(name), adapter.pop(name.replace("lora_A", "lora_B"))
        assert name.startswith(prefix), name
        weight = name.removeprefix(prefix).replace(".lora_A.weight", ".weight")
        rows, cols = tensors[weight].shape
        assert a.shape == (rank, cols), f"{name}: {a.shape}, expected {(rank, cols)}"
        assert b.shape == (rows, rank), f"{name}: lora_B {b.shape}, expected {(rows, rank)}"
        assert np.abs(b).max() > 0, f"{name}: lora_B is all zero: nothing was tuned"
        tensors[weight] = tensors[weight] + scaling * (b @ a)
        targets.add(weight.split(".")[-2])
        changed += 1
    assert not adapter, f"names that PEFT does not know: {sorted(adapter)[:5]}"
    assert targets == set(config["target_modules"]), (targets, config["target_modules"])
    return changed


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """Rotary position embedding, halves convention; x is [heads, T, head_dim]."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def logits(config, w, ids):
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    embedding = w["model.embed_tokens.weight"]
    x = embedding[ids].astype(np.float64)
    length = len(ids)
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        linear = lambda name, v: v @ w[f"{block}{name}.weight"].T
        h = norm(x, w[block + "input_layernorm.weight"], eps)
        split = lambda v, n: v.reshape(length, n, -1).swapaxes(0, 1)
        q = rotate(split(linear("self_attn.q_proj", h), heads), config["rope_theta"])
        k = rotate(split(linear("self_attn.k_proj", h), kv_heads), config["rope_theta"])
        v = split(linear("self_attn.v_proj", h), kv_heads)
        k, v = (np.repeat(t, heads // kv_heads, 0) for t in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear("self_attn.o_proj", mixed.swapaxes(0, 1).reshape(length, -1))
        h = norm(x, w[block + "post_attention_layernorm.weight"], eps)
        gate = linear("mlp.gate_proj", h)
        x = x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", h))
    return norm(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", embedding).T


def main(model, adapter, dumped):
    config, weights = load(model)
    ours = load_file(dumped)
    plain = logits(config, weights, ours["token_ids"])
    changed = merge(weights, adapter)
    tuned = logits(config, weights, ours["token_ids"])
    shift = float(np.abs(tuned - plain).max())
    diff = float(np.abs(tuned - ours["logits"]).max())
    assert shift > 10 * ALLOWED, f"the adapter changes the logits by only {shift:.1e}: this would prove nothing"
    assert diff <= ALLOWED, f"logits differ by {diff:.2e}, allowed {ALLOWED:.0e}"
    print(f"{changed} projections in PEFT's layout; logits within {diff:.1e} of numpy's (the adapter moves them by {shift:.1f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
