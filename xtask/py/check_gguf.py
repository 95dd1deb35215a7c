"""Compares every tensor of a GGUF file, as the gguf package dequantizes it, with an f32 directory made from it.

usage: check_gguf.py FILE.gguf DIRECTORY
"""

import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def published_name(name):
    if name in WHOLE:
        return WHOLE[name]
    _, block, kind, end = name.split(".")
    return f"model.layers.{block}.{BLOCK[kind]}.{end}"


def rotate_half_order(rows, heads):
    """GGUF stores the rows of q and k with the two halves of each head interleaved."""
    cols = rows.shape[1]
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows.shape)


def main(file, directory):
    reader = gguf.GGUFReader(file)
    field = lambda name: int(reader.get_field(name).contents())
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    ours = {}
    for part in sorted(Path(directory).glob("*.safetensors")):
        ours.update(load_file(part))
    types, worst, wrong = set(), 0.0, []
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            expected = rotate_half_order(expected, heads[kind])
        name = published_name(tensor.name)
        found = ours.pop(name, None)
        if found is None:
            wrong.append(f"{name} is missing")
        elif found.dtype != np.float32 or found.shape != expected.shape:
            wrong.append(f"{name} is {found.dtype} {found.shape}, expected float32 {expected.shape}")
        elif not np.array_equal(found, expected):
            diff = float(np.abs(found - expected).max())
            worst = max(worst, diff)
            wrong.append(f"{name} ({tensor.tensor_type.name}) differs by up to {diff:.2e}")
        types.add(tensor.tensor_type.name)
    ours.pop("lm_head.weight", None)
    wrong += [f"{name} is in the directory only" for name in ours]
    if wrong or not types:
        sys.exit("not the package's values:\n  " + "\n  ".join(wrong[:20]))
    print(f"{len(reader.tensors)} tensors equal to the last bit: {', '.join(sorted(types))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
