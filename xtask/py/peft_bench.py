"""Times steps of LoRA with Python's peft: rank 8 on all seven projections, AdamW, clipped gradients, random tokens.

Prints one line of JSON: wall and processor seconds of each step, and the peak resident memory of the process.

usage: peft_bench.py MODEL_DIRECTORY --type f32|bf16 --batch B --tokens N --threads T --repetitions R [--blocks N]
"""

import argparse
import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--type", choices=TYPES, required=True)
    for name in ["batch", "tokens", "threads", "repetitions"]:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--blocks", type=int, default=0, help="adapt the last blocks only; 0 for all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=TYPES[args.type], use_cache=False)
    # PEFT's way to adapt the last blocks only.
    last = list(range(base.config.num_hidden_layers))[-args.blocks:] if args.blocks else None
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM", layers_to_transform=last)
    model = get_peft_model(base, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.tokens))
    wall, cpu = [], []
    for step in range(args.repetitions + 1):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The first step warms up.
        if step > 0:
            wall.append(time.perf_counter() - wall_start)
            cpu.append(time.process_time() - cpu_start)
    assert torch.isfinite(loss), f"the loss is {loss.item()}"
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"wall_seconds": wall, "cpu_seconds": cpu, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
