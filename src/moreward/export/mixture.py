"""The whole mixture, router included, as one directory of transformers.

`modeling_moreward` computes it; a copy of that file may travel in the directory. N texts, E experts.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moreward.checkpoint import write_json, write_manifest
from moreward.errors import ConfigError
from moreward.export import modeling_moreward
from moreward.export.card import write_card
from moreward.export.merged import PAD, Exported
from moreward.export.modeling_moreward import MorewardConfig, MorewardForSequenceClassification
from moreward.export.parts import (
    NOTE,
    Part,
    allowed,
    compare,
    encoded,
    need_golden,
    new_folder,
    padded,
    parts_of,
    rounding,
)
from moreward.nn.backbone import Backbone, quiet
from moreward.nn.lora import LoRABank, parameter_key
from moreward.nn.mixture import Routed
from moreward.nn.routers import PromptRouter, TopKRouter
from moreward.scoring import Scorer
from moreward.systems._base import GatedSystem

KIND = "moreward-hf"
PROMPT_END = "<|moreward_prompt_end|>"
CODE = "modeling_moreward.py"


def export_hf(
    scorer: Scorer, out: Path, *, with_code: bool = False, evaluation: dict[str, Any] | None = None
) -> list[Exported]:
    """Write the mixture as `out`, for AutoModelForSequenceClassification: after `import moreward`, or `with_code` with
    `trust_remote_code=True` alone.

    Nothing is left behind unless the directory, loaded anew, gives the golden rewards again. ConfigError for recipes
    and settings that the class does not compute, before anything is written; RunError where rewards differ.
    """
    parts, router = mixture_of(scorer, "hf")
    need_golden(scorer)
    with new_folder(out) as temporary:
        tokenizer, prompt_end = _tokenizer(scorer)
        model = mixture_model(scorer, parts, router, prompt_end)
        model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(temporary)
        with quiet():
            model.save_pretrained(temporary)
        _finish_config(temporary, with_code=with_code)
        write_json(temporary / NOTE, mixture_note(scorer, parts, KIND))
        difference = _compare(temporary)
        write_card(temporary, scorer, KIND, "", evaluation)
        write_manifest(temporary, kind=KIND)
    return [Exported(out, "", difference, 0.0)]


def mixture_of(scorer: Scorer, to: str) -> tuple[list[Part], PromptRouter]:
    """Experts and router. ConfigError for what the class does not compute; `to` is the form that was asked for."""
    system = scorer.system
    routed = system.routed if isinstance(system, GatedSystem) else None
    router = routed.router if type(routed) is Routed else None
    if type(router) is not PromptRouter or type(router.router) is not TopKRouter:
        raise ConfigError(
            f"export: --to {to} writes mixtures with a router over whole experts, arliss and rodos (this run is "
            f"{scorer.card['recipe']!r}). A single model leaves as --to merged."
        )
    parts = parts_of(system)
    if router.reads_trunk:
        raise ConfigError(f"export: --to {to} needs a router that reads the backbone (router_reads=trunk in this run)")
    check_parts(parts)
    return parts, router


def check_parts(parts: list[Part]) -> None:
    """ConfigError for experts that the class does not compute."""
    for backbone in {id(part.backbone): part.backbone for part in parts}.values():
        if backbone.pooling == "spans":
            raise ConfigError("export: pooling 'spans' is computed by no class of transformers; use own, mean or first")
        if backbone.bank is not None and backbone.bank.active_tokens is not None:
            raise ConfigError("export: adapters that act on the last tokens only (active_tokens) stay here")


@torch.no_grad()
def mixture_model(
    scorer: Scorer, parts: list[Part], router: PromptRouter | None, prompt_end: int
) -> MorewardForSequenceClassification:
    """The plain model with the run's weights, zeros and units folded into the heads. Without a router its gate says
    nothing."""
    first, gate = parts[0].backbone, router.router if router is not None else None
    bank = first.bank
    base = copy.deepcopy(first.config)
    base.num_labels = 1
    separate = any(part.backbone is not first for part in parts)
    separate |= router is not None and router.backbone is not first
    config = MorewardConfig(
        base=base.to_dict(),
        experts=[part.expert for part in parts],
        separate=separate,
        pooling=first.pooling,
        last_linear=first.last_linear,
        heads=[0 if len(part.head.layers) == 1 else part.head.last.in_features for part in parts],
        targets=[] if bank is None else [_in_classifier(first, module) for module in bank.shapes],
        rank=0 if bank is None else bank.rank,
        scale=1.0 if bank is None else bank.scale,
        experts_per_prompt=gate.top_k if isinstance(gate, TopKRouter) else 1,
        position_offset=first._position_offset(),
        max_tokens=scorer.encoder.max_length,
        prompt_end=prompt_end,
        drops_prompt_end=not scorer.encoder.joins_pairs,
    )
    with torch.random.fork_rng(devices=[]):
        model = MorewardForSequenceClassification(config)
    backbones = [part.backbone for part in parts] if separate else [first]
    if separate and router is not None:
        backbones.append(router.backbone)
    for plain, backbone in zip(model.models, backbones, strict=True):
        _fill(plain, backbone)
    for head, part in zip(model.heads, parts, strict=True):
        _fill_head(head, part)
    if isinstance(gate, TopKRouter):
        model.gate.weight.copy_(gate.gate.weight)
        model.gate.bias.copy_(gate.gate.bias)
    if bank is not None:
        names = [str(part.adapter) for part in parts]
        router_name = bank.names[router.adapter] if router is not None and router.adapter is not None else ""
        for adapter, name in zip(model.adapters, [*names, router_name], strict=True):
            _fill_adapter(adapter, bank, first, name)
    model.train(False)
    return model


def _in_classifier(backbone: Backbone, module: str) -> str:
    """The name of one of our modules in the classifier."""
    return module if backbone.pooling == "own" else f"{backbone.base_prefix}.{module}"


def _fill(plain: nn.Module, backbone: Backbone) -> None:
    own = {_in_classifier(backbone, key): value for key, value in backbone.model.state_dict().items()}
    plain.load_state_dict({**plain.state_dict(), **{key: value.detach().cpu() for key, value in own.items()}})


def _fill_head(head: Any, part: Part) -> None:
    state = {key.removeprefix("layers."): value.detach().cpu() for key, value in part.head.state_dict().items()}
    head.load_state_dict(state)
    last, mean, std = head[-1], part.standardize.mean.cpu(), part.standardize.std.cpu()
    last.weight.copy_(last.weight.double() / std)
    last.bias.copy_((last.bias.double() - mean) / std)


def _fill_adapter(adapter: Any, bank: LoRABank, backbone: Backbone, name: str) -> None:
    own: Any = bank.adapters[name] if name else None
    for module in bank.shapes if name else ():
        theirs = modeling_moreward.key_of(_in_classifier(backbone, module))
        adapter.A[theirs].copy_(own.A[parameter_key(module)])
        adapter.B[theirs].copy_(own.B[parameter_key(module)])


def _tokenizer(scorer: Scorer) -> tuple[Any, int]:
    """With a pad token of its own, and the token that ends a prompt: for pairs the separator, else one that is new."""
    tokenizer = copy.deepcopy(scorer.encoder.tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
    prompt_end = tokenizer.sep_token_id
    if not scorer.encoder.joins_pairs:
        tokenizer.add_tokens([PROMPT_END], special_tokens=True)
        prompt_end = tokenizer.convert_tokens_to_ids(PROMPT_END)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = scorer.encoder.max_length
    return tokenizer, int(prompt_end)


def _finish_config(folder: Path, *, with_code: bool) -> None:
    """What other programs read in `config.json`; the copy of the code where it is asked for."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {
        "architectures": ["MorewardForSequenceClassification"],
        "id2label": {"0": "REWARD"},
        "label2id": {"REWARD": 0},
        "problem_type": "regression",
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    }
    if with_code:
        shutil.copyfile(modeling_moreward.__file__, folder / CODE)
        module = CODE.removesuffix(".py")
        config["auto_map"] = {
            "AutoConfig": f"{module}.MorewardConfig",
            "AutoModelForSequenceClassification": f"{module}.MorewardForSequenceClassification",
        }
    write_json(file, config)


def mixture_note(scorer: Scorer, parts: list[Part], kind: str) -> dict[str, Any]:
    """What `moreward.json` of a whole mixture, or of a single model, holds."""
    golden = []
    for one in scorer.card["golden"]:
        tokens = encoded(scorer, one)
        told = {key: one[key] for key in ("prompt", "response", "reward", "experts")}
        golden.append({**told, "ids": list(tokens.ids), "prompt_ids": list(tokens.prompt_ids)})
    return {
        "kind": kind,
        "recipe": scorer.card["recipe"],
        "expert": "",
        "experts": [part.expert for part in parts],
        "run": scorer.identity,
        "offset": 0.0,
        "max_length": scorer.encoder.max_length,
        "tolerance": allowed([one["reward"] for one in golden], max(map(rounding, parts))),
        "golden": golden,
    }


def _compare(folder: Path) -> float:
    told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    rewards_N = mixture_rewards(
        folder, [one["ids"] for one in told["golden"]], [one["prompt_ids"] for one in told["golden"]]
    )
    return compare(rewards_N, told, "transformers")


def mixture_rewards(folder: Path, texts: list[list[int]], prompts: list[list[int]]) -> Tensor:
    """`reward_N`: the logits of token ids, the directory loaded anew."""
    return opened_mixture(folder)(texts, prompts)


def opened_mixture(folder: Path) -> Callable[[list[list[int]], list[list[int]]], Tensor]:
    """Token ids, and those of the prompts, to `reward_N`."""
    with quiet():
        model = MorewardForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    model.train(False)

    @torch.no_grad()
    def rewards(texts: list[list[int]], prompts: list[list[int]]) -> Tensor:
        ids_NT, mask_NT = padded(texts, model.config.pad_token_id)
        prompt_ids_NT, prompt_mask_NT = padded(prompts, model.config.pad_token_id)
        told = model(ids_NT, mask_NT, prompt_input_ids=prompt_ids_NT, prompt_attention_mask=prompt_mask_NT)
        return told.logits[:, 0]  # type: ignore[no-any-return]

    return rewards
