"""The twelve bad adapters, written by peft and then damaged: each is refused with every fault told, none is half read,
and the good ones beside them are read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from moreward.adapters import Base, base_of, read_adapter, read_adapters
from moreward.errors import RunError
from moreward.nn.backbone import Backbone
from moreward.nn.lora import LoRABank
from moreward.nn.peft_format import CONFIG, HEAD, ORIGIN, WEIGHTS
from tiny import make_tokenizer

Get = Callable[[str], Path]
Damage = Callable[[Path], object]
TARGETS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
HEADS = {"llama": "base_model.model.score", "bert": "base_model.model.classifier"}
LAYER = {"llama": "layers.0.self_attn", "bert": "layer.0.attention.self"}
RANK, ALPHA = 4, 8

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@torch.no_grad()
def adapted(base: Path, kind: str, seed: int) -> PeftModel:
    """A classifier with an adapter whose every tensor is random, as peft makes it."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    saved = ["pooler.dense"] if kind == "bert" else None
    told = LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[kind], modules_to_save=saved
    )
    made = get_peft_model(model, told)
    pooler = Backbone.load(str(base)).model.state_dict().get("bert.pooler.dense.weight")
    for name, parameter in made.named_parameters():
        if "pooler" in name and name.endswith("weight"):
            assert pooler is not None
            parameter.copy_(pooler)
        elif "lora_" in name or ("modules_to_save" in name and "pooler" not in name):
            parameter.normal_(std=0.3)
        elif "pooler" in name:
            parameter.zero_()
    return made.eval()


class Shelf:
    """A folder of adapters of one base, and a bank for them."""

    def __init__(self, base: Path, kind: str, folder: Path) -> None:
        self.base, self.kind, self.folder = base, kind, folder
        self.models = {name: adapted(base, kind, seed) for seed, name in enumerate(("code", "talk"))}
        for name, model in self.models.items():
            model.save_pretrained(str(folder / name))

    def backbone(self) -> Backbone:
        backbone = Backbone.load(str(self.base)).eval()
        targets = [*TARGETS[self.kind], *(["pooler.dense"] if self.kind == "bert" else [])]
        LoRABank(backbone, rank=RANK, alpha=float(ALPHA), targets=targets).eval()
        return backbone

    def copy(self, name: str, *damage: Damage) -> Path:
        folder = shutil.copytree(self.folder / "code", self.folder / name)
        for one in damage:
            one(folder)
        return folder

    @torch.no_grad()
    def check(self, name: str, head: torch.nn.Module, backbone: Backbone) -> None:
        """The bank's reward is the logit of peft's own model."""
        assert backbone.bank is not None
        adapter = torch.tensor([backbone.bank.names.index(name)])
        for num in (4, 9, 15):
            ids = torch.randint(6, 90, (1, num), generator=torch.Generator().manual_seed(num))
            wanted = self.models[name](input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
            found = head(backbone(ids, torch.ones_like(ids), adapter))[0]
            assert abs(found - wanted) <= 1e-5 * max(1.0, abs(wanted))


@pytest.fixture(params=["llama", "bert"])
def shelf(request: pytest.FixtureRequest, tiny_backbone: Get, tmp_path: Path) -> Shelf:
    return Shelf(tiny_backbone(request.param), request.param, tmp_path / "adapters")


def config(**change: Any) -> Damage:
    def edit(folder: Path) -> None:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**told, **change}), encoding="utf-8")

    return edit


def weights(edit: Callable[[dict[str, Tensor], str], object]) -> Damage:
    """`edit` is given the tensors and the kind of the base."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors, "llama" if any("score" in k for k in tensors) else "bert")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def only_one_target(folder: Path) -> None:
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config(target_modules=sorted(told["target_modules"])[:1])(folder)


def poison(tensors: dict[str, Tensor], kind: str) -> None:
    next(v for k, v in sorted(tensors.items()) if "lora_B" in k)[0, 0] = float("nan")


def lose_head_and_layer(tensors: dict[str, Tensor], kind: str) -> None:
    for key in [k for k in tensors if k == f"{HEADS[kind]}.weight" or LAYER[kind] in k]:
        del tensors[key]


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def marker_of(folder: Path) -> Path:
    return folder.parents[1] / f"{folder.name}-was-run"


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump(Trap(marker_of(folder)), file)


def two_labels(tensors: dict[str, Tensor], kind: str) -> None:
    for key in [k for k in tensors if k.startswith(HEADS[kind])]:
        tensors[key] = torch.cat([tensors[key]] * 2)


def another_tokenizer(folder: Path) -> None:
    make_tokenizer("gpt2").save_pretrained(folder)


# The wording is that of the list which adapters are refused by, the places those of each refusal.
TWELVE: Sequence[tuple[str, str, tuple[Damage, ...], tuple[str, ...]]] = [
    ("bad-01", "other base name", (config(base_model_name_or_path="other/base"),), (CONFIG, "'other/base' is not")),
    (
        "bad-02",
        "target_modules not in the base",
        (config(target_modules=["qkv_proj"]),),
        (CONFIG, "target_modules qkv_proj: no such linear layer"),
    ),
    ("bad-03", "rank 4 -> 8", (config(r=8),), (CONFIG, "rank 8 and alpha 8", "the bank has 4 and 8.0")),
    ("bad-04", "lora_alpha 1e9", (config(lora_alpha=1e9),), (CONFIG, "alpha 1000000000.0")),
    ("bad-05", "subset of targets", (only_one_target,), (CONFIG, "leave out layers that have weights")),
    ("bad-06", "task_type CAUSAL_LM", (config(task_type="CAUSAL_LM"),), (CONFIG, "task_type 'CAUSAL_LM'")),
    ("bad-07", "NaN weights", (weights(poison),), (WEIGHTS, "NaN or Inf in base_model.model.")),
    (
        "bad-08",
        "head and a layer missing",
        (weights(lose_head_and_layer),),
        (WEIGHTS, "the reward head", "is missing", "declare layers without weights"),
    ),
    (
        "bad-09",
        "extra tensor",
        (weights(lambda tensors, kind: tensors.update(foreign=torch.zeros(2))),),
        (WEIGHTS, "no place for: foreign"),
    ),
    ("bad-10", "cut safetensors", (cut,), (WEIGHTS, "cannot be read as safetensors", "is it cut or damaged?")),
    (
        "bad-11",
        ".bin pickle",
        (as_pickle,),
        ("adapter_model.bin: refused, files of this kind can run code", f"{WEIGHTS}: missing"),
    ),
    (
        "bad-12",
        "two labels or another tokenizer hash",
        (weights(two_labels), another_tokenizer),
        (WEIGHTS, "has 2 labels", "tokenizer.json", "another tokenizer"),
    ),
]
IDS = [wording for _, wording, _, _ in TWELVE]


@pytest.mark.parametrize(("name", "wording", "damage", "said"), TWELVE, ids=IDS)
def test_a_bad_adapter_is_refused_and_the_old_one_stays(
    name: str, wording: str, damage: tuple[Damage, ...], said: tuple[str, ...], shelf: Shelf
) -> None:
    folder = shelf.copy(name, *damage)
    backbone = shelf.backbone()
    head = read_adapter(shelf.folder / "talk", backbone, "talk").eval()
    with pytest.raises(RunError) as refused:
        read_adapter(folder, backbone, name)
    for one in (str(folder), *said):
        assert one in str(refused.value), wording
    assert not marker_of(folder).exists()
    assert backbone.bank is not None
    assert backbone.bank.names == ["talk"]
    shelf.check("talk", head, backbone)


def test_the_good_of_a_folder_are_read_and_the_twelve_bad_refused(shelf: Shelf) -> None:
    for name, _, damage, _ in TWELVE:
        shelf.copy(name, *damage)
    backbone = shelf.backbone()
    found = read_adapters(shelf.folder, backbone)
    assert sorted(found.heads) == ["code", "talk"]
    assert sorted(found.refused) == [name for name, *_ in TWELVE]
    assert backbone.bank is not None
    assert sorted(backbone.bank.names) == ["code", "talk"]
    for name, head in found.heads.items():
        shelf.check(name, head.eval(), backbone)
    for name, _, _, said in TWELVE:
        assert all(any(one in fault for fault in found.refused[name]) for one in said)
    assert not list(shelf.folder.parent.glob("*-was-run"))


def test_the_trap_of_the_pickle_works(tmp_path: Path) -> None:
    with (tmp_path / "trap.bin").open("wb") as file:
        pickle.dump(Trap(tmp_path / "was-run"), file)
    with (tmp_path / "trap.bin").open("rb") as file:
        pickle.load(file)  # noqa: S301 - our own
    assert (tmp_path / "was-run").exists()


def test_all_faults_of_one_adapter_are_told_at_once(shelf: Shelf) -> None:
    damage = (
        another_tokenizer,
        config(base_model_name_or_path="other/base", r=8, task_type="CAUSAL_LM", use_dora=True, target_modules=["x"]),
        weights(poison),
        weights(two_labels),
    )
    folder = shelf.copy("all", *damage)
    with pytest.raises(RunError) as refused:
        read_adapter(folder, shelf.backbone(), "x")
    for said in (
        "'other/base' is not",
        "rank 8",
        "task_type 'CAUSAL_LM'",
        "use_dora True",
        "target_modules x: no such",
        "NaN or Inf",
        "has 2 labels",
        "another tokenizer",
    ):
        assert said in str(refused.value)
    assert all(line.startswith(str(folder)) for line in str(refused.value).splitlines())


@pytest.mark.parametrize("which", ["base", "tokenizer"])
def test_hashes_that_an_adapter_tells_are_compared(which: str, shelf: Shelf) -> None:
    backbone = shelf.backbone()
    base = base_of(backbone)
    told = {"base_sha256": base.sha256, "tokenizer_sha256": base.tokenizer_sha256}
    same = shelf.copy("same", lambda folder: (folder / ORIGIN).write_text(json.dumps(told), encoding="utf-8"))
    read_adapter(same, backbone, "same")
    other = {**told, f"{which}_sha256": "0" * 64}
    folder = shelf.copy("other", lambda folder: (folder / ORIGIN).write_text(json.dumps(other), encoding="utf-8"))
    with pytest.raises(RunError, match=f"trained with another {which} than this run's"):
        read_adapter(folder, backbone, "other")


def test_a_base_that_moved_is_known_by_its_hash_and_only_by_it(shelf: Shelf) -> None:
    backbone = shelf.backbone()
    gone = f"/nowhere/{shelf.base.name}"
    folder = shelf.copy("moved", config(base_model_name_or_path=gone))
    with pytest.raises(RunError, match=f"{gone}' is not this run's backbone"):
        read_adapter(folder, backbone, "moved")
    (folder / ORIGIN).write_text(json.dumps({"base_sha256": base_of(backbone).sha256}), encoding="utf-8")
    read_adapter(folder, backbone, "moved")
    with pytest.raises(RunError, match="is not this run's backbone"):
        read_adapter(folder, shelf.backbone(), "x", Base("hub/name", ""))


@pytest.mark.parametrize("name", ["Upper", "with.dot", "keys", "-x"])
def test_a_folder_that_is_no_name_of_an_expert_is_refused(name: str, shelf: Shelf) -> None:
    shelf.copy(name)
    found = read_adapters(shelf.folder, shelf.backbone())
    assert sorted(found.heads) == ["code", "talk"]
    assert "cannot be an expert's name" in found.refused[name][0]


def test_a_link_out_of_the_folder_is_refused_unread(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.copy("linked")
    outside = shutil.move(folder / WEIGHTS, tmp_path / WEIGHTS)
    (folder / WEIGHTS).symlink_to(outside)
    found = read_adapters(shelf.folder, shelf.backbone())
    assert found.refused["linked"] == (f"{folder / WEIGHTS}: leads out of {shelf.folder}; copy the file itself there",)
    assert sorted(found.heads) == ["code", "talk"]


DAMAGED: Sequence[tuple[Damage, str]] = [
    (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: missing"),
    (lambda folder: (folder / CONFIG).write_text("{", encoding="utf-8"), f"{CONFIG}: cannot be read as JSON"),
    (lambda folder: (folder / CONFIG).write_text("[]", encoding="utf-8"), f"{CONFIG}: is no JSON object"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: cannot be read as safetensors, 0 bytes"),
    (config(target_modules=None), "target_modules None: a list of names or a pattern"),
    (config(peft_type="IA3"), "peft_type 'IA3'"),
    (config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (config(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    (config(fan_in_fan_out=True), "fan_in_fan_out True"),
    (config(task_type="FEATURE_EXTRACTION"), f"{HEAD}: the reward head is missing"),
    (
        lambda folder: (folder / "calibration.json").write_text('{"offset": "much"}', encoding="utf-8"),
        "offset 'much' is no finite number",
    ),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_other_damage_is_refused_saying_what(damage: Damage, said: str, shelf: Shelf) -> None:
    with pytest.raises(RunError) as refused:
        read_adapter(shelf.copy("damaged", damage), shelf.backbone(), "x")
    assert said in str(refused.value)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|v_proj|query|value)"])
def test_targets_may_be_a_pattern(targets: str, shelf: Shelf) -> None:
    folder = shelf.copy("pattern", config(target_modules=targets))
    backbone = shelf.backbone()
    if targets == "all-linear":
        with pytest.raises(RunError, match="name layers that this run's adapters leave alone"):
            read_adapter(folder, backbone, "code")
    else:
        shelf.check("code", read_adapter(folder, backbone, "code").eval(), backbone)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=False) | st.sampled_from(["(", "q_proj", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "q_proj"]), inner, max_size=2),
    max_leaves=4,
)
SETTINGS = (
    *("r", "lora_alpha", "peft_type", "task_type", "base_model_name_or_path", "target_modules", "modules_to_save"),
    *("exclude_modules", "layers_to_transform", "rank_pattern", "bias", "fan_in_fan_out", "init_lora_weights"),
)


@pytest.fixture(scope="module")
def one_shelf(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Get) -> Shelf:
    return Shelf(tiny_backbone("llama"), "llama", tmp_path_factory.mktemp("fuzz") / "adapters")


@settings(max_examples=60, deadline=None)
@given(change=st.dictionaries(st.sampled_from(SETTINGS), VALUES, min_size=1, max_size=3))
def test_whatever_a_setting_is_there_is_no_other_error(change: dict[str, Any], one_shelf: Shelf) -> None:
    folder = one_shelf.folder.parent / "fuzz" / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(one_shelf.folder / "code", folder)
    config(**change)(folder)
    backbone = one_shelf.backbone()
    found = read_adapters(folder.parent, backbone)
    if "fuzzed" in found.heads:
        one_shelf.models["fuzzed"] = one_shelf.models["code"]
        one_shelf.check("fuzzed", found.heads["fuzzed"].eval(), backbone)
    else:
        assert all(fault.startswith(str(folder)) for fault in found.refused["fuzzed"])


@pytest.mark.parametrize("shape", [(), (3,), (1, 32, 1), (0, 32)])
def test_a_head_of_any_other_shape_is_refused(shape: tuple[int, ...], shelf: Shelf) -> None:
    def change(tensors: dict[str, Tensor], kind: str) -> None:
        tensors[f"{HEADS[kind]}.weight"] = torch.zeros(shape)

    with pytest.raises(RunError, match="a reward is one label of width 32"):
        read_adapter(shelf.copy("shape", weights(change)), shelf.backbone(), "x")
