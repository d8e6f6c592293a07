"""An expert's directory gives the expert's reward to plain PEFT, and comes back as the same expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from moreward.adapters import read_adapter
from moreward.errors import RunError
from moreward.nn.backbone import Backbone
from moreward.nn.experts import RewardHead
from moreward.nn.lora import LoRABank
from moreward.nn.peft_format import CALIBRATION, CONFIG, HEAD, WEIGHTS, write_adapter
from moreward.registry import find_recipe
from moreward.systems._base import System
from tiny import KINDS

EXPERTS = ("code", "talk")
Get = Callable[[str], Path]

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Written:
    """A random ARLISS, its experts' directories, and texts with every expert's reward."""

    def __init__(self, base: Path, folder: Path, pooling: str, head: str = "linear") -> None:
        self.base, self.folder = base, folder
        self.texts = [torch.randint(6, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in (4, 9, 15, 7)]
        recipe = find_recipe("arliss")
        self.system: System = recipe(recipe.Config(head=head), Backbone.load(str(base), pooling=pooling), EXPERTS)
        self.system.eval()
        self.backbone = self.system.backbones()[0]
        self.rewards = self._randomise()
        for name, (one, standardize) in self.system.adapter_experts().items():
            write_adapter(folder / name, self.backbone, name, one, standardize, str(base))

    @torch.no_grad()
    def _randomise(self) -> dict[str, Tensor]:
        torch.manual_seed(5)
        assert self.backbone.bank is not None
        rewards = {}
        for e, (name, (head, standardize)) in enumerate(self.system.adapter_experts().items()):
            for B in self.backbone.bank.adapters[name].B.values():
                B.normal_(std=0.1)
            for parameter in head.parameters():
                parameter.normal_(mean=0.1 * e, std=0.5)
            standardize.fit(reward_of(self.backbone, head, e, self.texts) + 3.0)
            rewards[name] = standardize(reward_of(self.backbone, head, e, self.texts))
        return rewards

    def check(self, name: str, found: Tensor) -> None:
        wanted = self.rewards[name]
        assert wanted.std() > 0.5
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
def reward_of(backbone: Backbone, head: RewardHead, adapter: int, texts: list[Tensor]) -> Tensor:
    hidden_ND = [backbone(ids_1T, torch.ones_like(ids_1T), torch.tensor([adapter])) for ids_1T in texts]
    return head(torch.cat(hidden_ND))  # type: ignore[no-any-return]


@pytest.fixture
def write(tiny_backbone: Get, tmp_path: Path) -> Callable[..., Written]:
    return lambda kind, pooling="own", head="linear": Written(tiny_backbone(kind), tmp_path / "experts", pooling, head)


@torch.no_grad()
def peft_reward(model: Any, folder: Path, texts: list[Tensor]) -> Tensor:
    """As a user of plain PEFT reads it: the logit, and for decoders the offset beside it."""
    offset = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))["offset"]
    logits = [model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0] for ids in texts]
    return torch.stack(logits) + offset


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_gives_each_experts_standardised_reward(kind: str, write: Callable[..., Written]) -> None:
    written = write(kind)
    for name in EXPERTS:
        torch.manual_seed(99)  # what is new at load is drawn anew, and must come from the directory
        base = AutoModelForSequenceClassification.from_pretrained(written.base, num_labels=1)
        model = PeftModel.from_pretrained(base, written.folder / name)
        written.check(name, peft_reward(model, written.folder / name, written.texts))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_directory_is_enough_for_the_auto_class(kind: str, write: Callable[..., Written]) -> None:
    written = write(kind)
    model = AutoPeftModelForSequenceClassification.from_pretrained(written.folder / "talk", num_labels=1)
    written.check("talk", peft_reward(model, written.folder / "talk", written.texts))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden_TD: hidden_TD.mean(0),
    "first": lambda hidden_TD: hidden_TD[0],
    "last": lambda hidden_TD: hidden_TD[-1],
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "pooling", "head"),
    [("bert", "mean", "linear"), ("bert", "last", "linear"), ("roberta", "first", "mlp"), ("gpt2", "mean", "linear")],
)
def test_other_poolings_are_a_peft_transformer_with_the_head_beside_it(
    kind: str, pooling: str, head: str, write: Callable[..., Written]
) -> None:
    written = write(kind, pooling, head)
    for name in EXPERTS:
        folder = written.folder / name
        assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["task_type"] == "FEATURE_EXTRACTION"
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(written.base), folder).eval()
        hidden = [POOLS[pooling](model(input_ids=ids).last_hidden_state[0]) for ids in written.texts]
        stored = load_file(folder / HEAD)
        own = RewardHead(32, head).eval()
        own.load_state_dict({k: v for k, v in stored.items() if not k.startswith("standardize.")})
        mean, std = stored["standardize.mean"], stored["standardize.std"]
        written.check(name, ((own(torch.stack(hidden)) - mean) / std).float())


def bank_without_adapters(written: Written) -> Backbone:
    backbone = Backbone.load(str(written.base), pooling=written.backbone.pooling).eval()
    old = written.backbone.bank
    assert old is not None
    LoRABank(backbone, rank=old.rank, alpha=old.alpha).eval()
    return backbone


@pytest.mark.parametrize(
    ("kind", "pooling", "head"),
    [(kind, "own", "linear") for kind in KINDS] + [("bert", "mean", "linear"), ("bert", "own", "mlp")],
)
def test_a_directory_of_ours_comes_back_as_the_same_expert(
    kind: str, pooling: str, head: str, write: Callable[..., Written]
) -> None:
    written = write(kind, pooling, head)
    backbone = bank_without_adapters(written)
    for e, name in enumerate(reversed(EXPERTS)):
        own = read_adapter(written.folder / name, backbone, f"new-{name}").eval()
        written.check(name, reward_of(backbone, own, e, written.texts))


def damaged(written: Written, change: Callable[[Path], None]) -> Path:
    folder = shutil.copytree(written.folder / "code", written.folder / "damaged")
    change(folder)
    return folder


def edit_config(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**config, **change}), encoding="utf-8")

    return edit


def edit_weights(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("llama", edit_config(r=13), "rank 13 and alpha 24.0, the bank has 12 and 24.0"),
    ("llama", edit_config(lora_alpha=99), "rank 12 and alpha 99"),
    ("llama", edit_weights(lambda t: t.pop("base_model.model.score.weight")), "reward head 'score' is missing"),
    ("bert", edit_weights(lambda t: t.pop("base_model.model.classifier.weight")), "head 'classifier' is missing"),
    ("llama", edit_weights(lambda t: t.update(foreign=torch.zeros(2))), "no place for: foreign"),
    (
        "bert",
        edit_weights(lambda t: t.update({"base_model.model.bert.pooler.dense.weight": torch.randn(32, 32)})),
        "'bert.pooler.dense' was replaced by one that is not a rank 12 change",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_a_directory_that_does_not_fit_is_refused_saying_why(
    kind: str, change: Callable[[Path], None], message: str, write: Callable[..., Written]
) -> None:
    written = write(kind)
    with pytest.raises(RunError, match=message):
        read_adapter(damaged(written, change), bank_without_adapters(written), "x")


def test_a_head_file_that_is_missing_is_refused(write: Callable[..., Written]) -> None:
    written = write("bert", "mean")
    folder = damaged(written, lambda folder: (folder / HEAD).unlink())
    with pytest.raises(RunError, match="head"):
        read_adapter(folder, bank_without_adapters(written), "x")


def test_a_refused_directory_leaves_no_half_read_adapter(write: Callable[..., Written]) -> None:
    written = write("llama")
    backbone = bank_without_adapters(written)
    with pytest.raises(RunError):
        read_adapter(damaged(written, edit_weights(lambda t: t.update(foreign=torch.zeros(2)))), backbone, "x")
    assert backbone.bank is not None
    assert backbone.bank.names == []


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
@pytest.mark.parametrize("left", [None, torch.zeros(5, 5)], ids=["gone", "of another shape"])
def test_an_adapter_with_one_matrix_lost_is_refused(
    lost: str, left: Tensor | None, write: Callable[..., Written]
) -> None:
    written = write("llama")
    name = f"base_model.model.model.layers.1.self_attn.q_proj.{lost}.weight"
    folder = damaged(written, edit_weights(lambda t: t.pop(name) if left is None else t.update({name: left})))
    with pytest.raises(RunError, match="q_proj' needs A of 12×32 and B of 32×12"):
        read_adapter(folder, bank_without_adapters(written), "x")


@torch.no_grad()
@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ({"layers_to_transform": [1]}, "layers.0."),
        ({"target_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}, "q_proj"),
    ],
)
def test_an_adapter_that_says_it_has_fewer_layers_leaves_the_others_alone(
    said: dict[str, Any], lost: str, write: Callable[..., Written]
) -> None:
    written = write("llama")
    folder = damaged(written, edit_weights(lambda t: [t.pop(k) for k in list(t) if lost in k]))
    with pytest.raises(RunError, match="declare layers without weights"):
        read_adapter(folder, bank_without_adapters(written), "x")
    edit_config(**said)(folder)
    backbone = bank_without_adapters(written)
    read_adapter(folder, backbone, "x")
    assert backbone.bank is not None
    for module in backbone.bank.shapes:
        assert bool(backbone.bank.merged_delta("x", module).any()) == (lost not in f"{module}.")


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("gpt2", "first")])
def test_a_classifier_is_refused_by_a_backbone_that_pools_otherwise(
    kind: str, pooling: str, write: Callable[..., Written]
) -> None:
    written = write(kind)
    backbone = Backbone.load(str(written.base), pooling=pooling)
    LoRABank(backbone, rank=12, alpha=24.0)
    with pytest.raises(RunError, match=f"pooling is '{pooling}'"):
        read_adapter(written.folder / "code", backbone, "x")
