"""Writes a small GGUF model of the llama architecture with one block of each tensor type, full of random values.

usage: make_gguf.py TOKENIZER.json OUT.gguf

Types that the gguf package can quantize are quantized from normal values; the K types get random bits with small finite
scales, so that every field of their blocks is exercised.
"""

import json
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]
# Byte offsets of the f16 scales in the blocks that cannot be quantized by the package.
SCALES = {T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
HIDDEN, MIDDLE, HEADS, KV_HEADS = 256, 512, 4, 2
HEAD_DIM = HIDDEN // HEADS


def encoded(rng, kind, rows, cols):
    if kind not in SCALES:
        return gguf.quantize(rng.normal(0, 0.05, (rows, cols)).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.normal(0, 0.002, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def tokenizer(writer, path):
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    special = {token["content"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in data["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    return len(vocabulary)


def main(tokenizer_path, out):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("one block of each type")
    vocabulary = tokenizer(writer, tokenizer_path)
    writer.add_block_count(len(TYPES))
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)

    def matrix(name, kind, rows, cols):
        writer.add_tensor(name, encoded(rng, kind, rows, cols), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, rng.normal(1, 0.1, HIDDEN).astype(np.float32))

    matrix("token_embd.weight", T.Q8_0, vocabulary, HIDDEN)
    matrix("output.weight", T.Q6_K, vocabulary, HIDDEN)
    norm("output_norm.weight")
    for i, kind in enumerate(TYPES):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", kind, HIDDEN, HIDDEN)
        matrix(f"blk.{i}.attn_k.weight", kind, KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_v.weight", kind, KV_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{i}.attn_output.weight", kind, HIDDEN, HIDDEN)
        matrix(f"blk.{i}.ffn_gate.weight", kind, MIDDLE, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", kind, MIDDLE, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", kind, HIDDEN, MIDDLE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
