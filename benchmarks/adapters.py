"""Mixed-adapter batches and the fp32 product, as ratios against their peers in the same run.

    python benchmarks/adapters.py [--write]

Peers: PEFT's `set_adapter` once per group of rows, and `F.linear`. CPU time of one thread, the least of several
rounds in turns, so that a busy machine does not decide. `--write` appends to benchmarks/results/adapters.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from moreward.nn.backbone import Backbone, resolve_backbone
from moreward.nn.linear import FastLinear, use_onednn
from moreward.nn.lora import LoRABank, parameter_key

ROUNDS, ROWS, TOKENS, ADAPTERS, RANK = 5, 16, 128, 5, 12
TARGETS = ["query", "key", "value", "dense"]


def measure(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of CPU time, the least of several rounds, the variants taking turns."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(ROUNDS):
        for name, run in variants.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def adapters() -> dict[str, object]:
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    adapter_N = torch.arange(ROWS) % ADAPTERS
    backbone = Backbone.load("minilm", pooling="mean").eval()
    bank = LoRABank(backbone, rank=RANK, alpha=2.0 * RANK, targets=TARGETS)
    peer = AutoModel.from_pretrained(resolve_backbone("minilm"), add_pooling_layer=False).eval()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    peft = get_peft_model(peer, config, adapter_name="0")
    for a in range(ADAPTERS):
        adapter = bank.add(str(a))
        if a:
            peft.add_adapter(str(a), config)
        for name in bank.shapes:
            torch.nn.init.normal_(adapter.B[parameter_key(name)], std=0.02)
            layer = peft.get_submodule(f"base_model.model.{name}")
            layer.lora_A[str(a)].weight.data.copy_(adapter.A[parameter_key(name)])
            layer.lora_B[str(a)].weight.data.copy_(adapter.B[parameter_key(name)])

    def per_group() -> torch.Tensor:
        hidden = torch.empty(ROWS, backbone.hidden_size)
        for a in range(ADAPTERS):
            peft.set_adapter(str(a))
            rows = adapter_N == a
            hidden[rows] = peft(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state.mean(1)
        return hidden

    with torch.no_grad():
        ours, theirs = backbone(ids, mask, adapter_N), per_group()
        seconds = measure({"ours": lambda: backbone(ids, mask, adapter_N), "peft": per_group})
    return {
        "what": f"MiniLM, {ROWS} rows of {TOKENS} tokens, {ADAPTERS} adapters, forward",
        "seconds": seconds,
        "ours_over_peft": seconds["ours"] / seconds["peft"],
        "largest_relative_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
    }


def product() -> dict[str, object]:
    layer = torch.nn.Linear(384, 1536)
    x = torch.randn(1024, 384)
    fast = FastLinear(384, 1536)
    fast.load_state_dict(layer.state_dict())
    with torch.no_grad():
        seconds = measure(
            {
                "ours": lambda: [fast(x) for _ in range(10)],
                "plain": lambda: [F.linear(x, layer.weight, layer.bias) for _ in range(10)],
            }
        )
    return {
        "what": "1024 x 384 x 1536 fp32 product",
        "onednn": use_onednn(),
        "ours_over_plain": seconds["ours"] / seconds["plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/adapters.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "adapters": adapters(),
        "product": product(),
    }
    print(json.dumps(record, indent=1))
    if arguments.write:
        path = Path(__file__).parent / "results" / "adapters.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
