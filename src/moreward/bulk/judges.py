"""Judges that need no network: a trained run, or a Hugging Face reward model in a directory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moreward.checkpoint import sha256_file
from moreward.data.judge.judges import ByRewards
from moreward.errors import BackboneError, ConfigError, DataError, NonFiniteError
from moreward.types import Conversation

OF_POINT = "point"
"""As the name of an expert: in each point the expert of that name."""


def run_judge(
    run: Path,
    points: Sequence[str],
    *,
    expert: str = "",
    truncate: bool = False,
    backbone: str | None = None,
    device: str = "auto",
) -> ByRewards:
    """A run as the judge: its reward, or that of one `expert`, or (`point`) in each point the expert of that name.

    ConfigError with the experts that there are, where one is missing.
    """
    from moreward.scoring import Scorer

    scorer = Scorer.load(run, backbone=backbone, device=device)
    on_long = "truncate" if truncate else scorer.on_long
    wanted = list(dict.fromkeys(points)) if expert == OF_POINT else [expert] * bool(expert)
    if missing := [name for name in wanted if name not in scorer.experts]:
        raise ConfigError(
            f"expert: {', '.join(missing)} is not in {run}; it has {', '.join(scorer.experts) or 'no experts'}"
        )

    def rewards(items: Sequence[Conversation], point: str) -> list[float]:
        if not expert:
            return [r.number for r in scorer.score(items, on_long=on_long)]
        name = point if expert == OF_POINT else expert
        return [r.expert_rewards[name] for r in scorer.score(items, explain=True, on_long=on_long)]

    name = " ".join(["run", scorer.identity, on_long, *([expert] if expert else [])])
    return ByRewards(name, rewards, by_point=expert == OF_POINT)


def classifier_judge(folder: Path, *, truncate: bool = False, max_length: int = 0, device: str = "auto") -> ByRewards:
    """A directory that `AutoModelForSequenceClassification` loads, with one output, as the judge in all points.

    Each text is computed alone: no padding, so the reward is read at the true end of the text even where the padding
    token also ends texts. Weights must be safetensors; code in the directory is not run. `max_length` in tokens; by
    default what the model's positions allow.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from moreward.data.batches import Encoder
    from moreward.nn.backbone import load_tokenizer
    from moreward.scoring import pick_device

    if not list(folder.glob("*.safetensors")):
        raise BackboneError(f"{folder}: holds no safetensors weights; other kinds can run code when loaded")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(f"{folder}: no reward model can be loaded: {str(error).splitlines()[0]}") from error
    _check_head(model.config, sorted(info["missing_keys"]), folder)
    place = pick_device(device)
    model = model.eval().to(place)
    model.config.pad_token_id = None
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder(tokenizer, max_length or min(_positions(model.config), tokenizer.model_max_length))

    @torch.no_grad()
    def rewards(items: Sequence[Conversation], point: str) -> list[float]:
        return [_finite(float(model(_ids(encoder, item, truncate).to(place)).logits), item) for item in items]

    weights = "".join(sha256_file(file) for file in sorted(folder.glob("*.safetensors")))
    identity = hashlib.sha256(weights.encode()).hexdigest()[:16]
    return ByRewards(f"classifier {identity} {encoder.max_length}{' truncate' if truncate else ''}", rewards)


def _check_head(config: Any, missing: Sequence[str], folder: Path) -> None:
    if config.num_labels != 1:
        raise ConfigError(f"{folder}: a reward model has one output, this one has {config.num_labels}")
    if missing:
        raise BackboneError(
            f"{folder}: {len(missing)} tensors are not in the weights, e.g. {missing[0]!r}; they would be random, "
            "and so would the rewards. Is this a backbone without a reward head?"
        )


def _positions(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", 0) or 512)


def _ids(encoder: Any, item: Conversation, truncate: bool) -> Any:
    import torch

    encoded = encoder.conversation(item)
    if encoded.truncated and not truncate:
        raise DataError(
            f"{item.id}: {len(encoded.ids) + encoded.num_dropped} tokens, the limit is {encoder.max_length}. "
            "Shorten it, or allow truncation with --truncate"
        )
    return torch.tensor([encoded.ids])


def _finite(reward: float, item: Conversation) -> float:
    if not math.isfinite(reward):
        raise NonFiniteError(f"{item.id}: the judge's reward is NaN or infinite")
    return reward
