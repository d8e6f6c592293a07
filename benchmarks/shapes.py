"""What is measured on: models of known shapes, adapters and heads with the same numbers in every process, texts.

N rows, T tokens, D hidden, R rank. Weights are random except MiniLM's; a time does not depend on them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    PretrainedConfig,
    Qwen2Config,
)

from moreward.nn.backbone import Backbone, last_linear_name, linear_names, quiet, resolve_backbone
from moreward.nn.lora import LoRABank, parameter_key

VOCABULARY = 8000
FIRST_ID, LAST_ID = 1000, 7999
ALPHA_PER_RANK = 2.0
TARGETS = {
    "minilm": ("query", "key", "value", "dense"),
    "bert": ("query", "key", "value", "dense"),
    "deberta": ("query_proj", "key_proj", "value_proj", "dense"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def targets(shape: str) -> list[str]:
    """Every linear layer of the shape's transformer and pooler, as suffixes that both sides understand."""
    return list(TARGETS[shape.partition("-")[0]])


def config(shape: str) -> PretrainedConfig:
    """`deberta-xsmall`, `deberta-base`, `bert-base`, `qwen2-512` and `qwen2-0.5b` as published but for the vocabulary;
    those called `tiny`, to try a benchmark out."""
    if shape.startswith("bert"):
        hidden, layers, heads = {"bert-base": (768, 12, 12), "bert-tiny": (64, 2, 2)}[shape]
        return BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            initializer_range=0.05,
            num_labels=1,
        )
    if shape.startswith("deberta"):
        known = {"deberta-xsmall": (384, 12, 6), "deberta-base": (768, 12, 12), "deberta-tiny": (64, 2, 2)}
        hidden, layers, heads = known[shape]
        return DebertaV2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=512,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=256,
            max_relative_positions=-1,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            pooler_hidden_size=hidden,
            initializer_range=0.05,
            num_labels=1,
        )
    known = {"qwen2-512": (512, 8, 8, 1536), "qwen2-0.5b": (896, 24, 14, 4864), "qwen2-tiny": (64, 2, 4, 192)}
    hidden, layers, heads, inner = known[shape]
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=inner,
        max_position_embeddings=2048,
        initializer_range=0.05,
        pad_token_id=0,
        num_labels=1,
    )


def classifier(shape: str, seed: int = 0) -> nn.Module:
    """A `*ForSequenceClassification` with one label, without dropout; the same weights in every process."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if shape == "minilm":
            model = AutoModelForSequenceClassification.from_pretrained(
                resolve_backbone("minilm"), num_labels=1, dtype=torch.float32
            )
        else:
            model = AutoModelForSequenceClassification.from_config(config(shape))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head = model.get_submodule(last_linear_name(model))
    fill_head(head, 0)
    return model.eval()  # type: ignore[no-any-return]


def headless(model: nn.Module) -> nn.Module:
    """Take the last layer off: the logits are then what a head reads."""
    model.set_submodule(last_linear_name(model), nn.Identity())
    return model


def backbone(shape: str, seed: int = 0) -> Backbone:
    """The same weights as `classifier`, as ours."""
    return Backbone(classifier(shape, seed), pooling="last" if shape.startswith("qwen2") else "own").eval()


def fill_head(head: nn.Linear, number: int) -> nn.Linear:
    """The weights of head `number`, bias zero."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features))
        if head.bias is not None:
            head.bias.zero_()
    return head


def head(size: int, number: int) -> nn.Linear:
    return fill_head(nn.Linear(size, 1), number)


def matrices(module: str, num_in: int, num_out: int, rank: int, adapter: int) -> tuple[Tensor, Tensor]:
    """`A` (R, in) and `B` (out, R) of an adapter at one module."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{adapter}/{module}".encode()))
    A_RI = (torch.rand(rank, num_in, generator=generator) * 2 - 1) / math.sqrt(num_in)
    return A_RI, torch.randn(num_out, rank, generator=generator) * 0.02


def bank(
    of: Backbone, shape: str, *, num_adapters: int, rank: int, trained: bool = True, **options: int | None
) -> LoRABank:
    """A bank of ours with adapters `0`, `1`, ...; `trained` False leaves their B at zero. `options` go to the bank."""
    made = LoRABank(of, rank=rank, alpha=ALPHA_PER_RANK * rank, targets=targets(shape), **options)  # type: ignore[arg-type]
    for number in range(num_adapters):
        made.add(str(number))
    fill_bank(made, trained=trained)
    return made


@torch.no_grad()
def fill_bank(bank: LoRABank, *, trained: bool = True) -> None:
    """Give adapter a of the bank the matrices of number a."""
    for number, adapter in enumerate(bank.adapters.values()):
        for name, (num_in, num_out) in bank.shapes.items():
            A_RI, B_OR = matrices(name, num_in, num_out, bank.rank, number)
            adapter.A[parameter_key(name)].copy_(A_RI)
            adapter.B[parameter_key(name)].copy_(B_OR if trained else torch.zeros_like(B_OR))


def peft_model(model: nn.Module, shape: str, *, num_adapters: int, rank: int, trained: bool = True) -> nn.Module:
    """The same adapters in PEFT, named `0`, `1`, ..."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=targets(shape), lora_dropout=0.0)
    names = [n for n in linear_names(model) if n.rsplit(".", 1)[-1] in targets(shape)]
    peft = get_peft_model(model, settings, adapter_name="0")
    for number in range(1, num_adapters):
        peft.add_adapter(str(number), settings)
    with torch.no_grad():
        for name in names:
            layer = peft.get_submodule(f"base_model.model.{name}")
            for number in range(num_adapters):
                A_RI, B_OR = matrices(name, layer.in_features, layer.out_features, rank, number)
                layer.lora_A[str(number)].weight.copy_(A_RI)
                layer.lora_B[str(number)].weight.copy_(B_OR if trained else torch.zeros_like(B_OR))
    return peft.eval()  # type: ignore[no-any-return]


def lognormal_lengths(num: int, seed: int = 0) -> list[int]:
    """Lengths of conversations: lognormal, median 160 tokens, sigma 0.7, from 16 to 512."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(num, generator=generator) * 0.7 + math.log(160)).exp()
    return [int(n) for n in drawn.round().clamp(16, 512)]


def texts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Token ids of texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST_ID, LAST_ID, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """`ids_NT` and `mask_NT`, padded on the right with 0 to the longest."""
    longest = max(map(len, rows))
    ids_NT = torch.zeros((len(rows), longest), dtype=torch.long)
    mask_NT = torch.zeros_like(ids_NT)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row)
        mask_NT[i, : len(row)] = 1
    return ids_NT, mask_NT


def in_turn_batches(num: int, size: int) -> list[list[int]]:
    """Rows in the order in which they came, so many at a time."""
    return [list(range(start, min(start + size, num))) for start in range(0, num, size)]


def budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows sorted by length, as many at a time as keep padded tokens within the budget."""
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and lengths[row] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches
