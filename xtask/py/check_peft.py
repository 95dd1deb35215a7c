"""Loads an adapter with Python's peft on the transformers model and compares its logits with edgellm's.

usage: check_peft.py MODEL_DIRECTORY ADAPTER_DIRECTORY PROMPT.txt LOGITS.safetensors
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ALLOWED = 1e-2


def main(model_path, adapter_path, prompt_path, dumped):
    ours = load_file(dumped)
    prompt = Path(prompt_path).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours["token_ids"].tolist(), "transformers' token ids of the prompt are others"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(ids).logits[0]
        tuned = PeftModel.from_pretrained(model, adapter_path).eval()(ids).logits[0]
    shift = float((tuned - plain).abs().max())
    diff = float((tuned - ours["logits"]).abs().max())
    assert shift > 10 * ALLOWED, f"the adapter changes the logits by only {shift:.1e}: this would prove nothing"
    assert diff <= ALLOWED, f"logits differ by {diff:.2e}, allowed {ALLOWED:.0e}"
    print(f"peft's logits and ours differ by at most {diff:.1e} (the adapter moves them by {shift:.1f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
