"""Compares an adapter that llama.cpp converted to GGUF with the PEFT directory that it came from.

usage: check_lora_gguf.py ADAPTER_DIRECTORY ADAPTER.gguf

Every lora_A and lora_B must be there with the same values; the rows of lora_B of the query and key projections are in
another order, as llama.cpp's own rotation asks for, so these are compared sorted.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def main(adapter, converted):
    adapter = Path(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    reader = GGUFReader(converted)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert alpha == config["lora_alpha"], f"alpha {alpha}, expected {config['lora_alpha']}"
    theirs = {t.name: np.array(t.data) for t in reader.tensors}
    ours = load_file(adapter / "adapter_model.safetensors")
    for name, value in ours.items():
        block, module = name.removeprefix("base_model.model.model.layers.").split(".", 1)
        module, part = module.removesuffix(".weight").rsplit(".lora_", 1)
        found = theirs.pop(f"blk.{block}.{NAMES[module]}.weight.lora_{part.lower()}")
        assert found.shape == value.shape, f"{name}: {found.shape}, expected {value.shape}"
        if part == "B" and NAMES[module] in ("attn_q", "attn_k"):
            found, value = (v[np.lexsort(v.T)] for v in (found, value))
        assert np.array_equal(found, value), f"{name}: other values"
    assert not theirs, f"tensors of unknown origin: {sorted(theirs)[:5]}"
    print(f"{len(ours)} tensors are the same in llama.cpp's adapter file, alpha {alpha:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
