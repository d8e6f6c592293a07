"""Reward models that others trained: what stands in a directory, what is wrong with it, and the module that computes
what its makers' code computes.

Three kinds of directories are known, all of safetensors and of architectures that transformers has itself:

- `classifier`: a `*ForSequenceClassification` of one label, as TRL's `RewardTrainer` and our own merged exports are;
- `value_head`: a language model beside `value_head.safetensors` (LLaMA-Factory: `v_head.summary.weight` and `.bias`);
- `openrlhf`: a transformer with a bias-free or biased `score.weight` or `value_head.weight` (`value_head_prefix` in its
  config.json) and, where it was normalised, `mean` and `std` there.

N conversations, T tokens, D hidden.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moreward.data.batches import Encoder
from moreward.errors import BackboneError, ConfigError, DataError
from moreward.nn.backbone import directory_sha256, load_tokenizer, quiet
from moreward.types import Conversation, OwnIds, Rendered

Kind = Literal["classifier", "value_head", "openrlhf"]

VALUE_HEAD = "value_head.safetensors"
VALUE_HEAD_TENSOR = "v_head.summary"
OPENRLHF_HEADS = ("score", "value_head")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
TOKENS_PER_FORWARD = 4096
NO_LIMIT = 1_000_000
"""Tokenizers without a limit say a number of this size or more."""
PROBES = ("Yes.", "The answer is no, and here is why it has to be so.", "It depends.")


class Stranger(BaseModel):
    """All that is needed to build an imported model again without its directory, but for weights and tokenizer.

    `shape` is its config.json; `head` the tensor of the head without `.weight`, empty for a classifier, whose class has
    it. `mean` and `std` are OpenRLHF's: what the expert says is (r - mean) / std. `max_length` is in tokens of its own
    tokenizer. `padded`: several conversations may be computed at once. `has_types`: the model is told which text of a
    joined pair a token is of.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    folder: str
    sha256: str
    kind: Kind
    architecture: str
    shape: dict[str, Any]
    head: str = ""
    has_bias: bool = False
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    max_length: int = Field(gt=1)
    padded: bool = True
    has_types: bool = False
    reads_turns: str = ""
    num_parameters: int = 0
    notes: tuple[str, ...] = ()


# ---- the module --------------------------------------------------------------------------------------------------


class Headed(nn.Module):
    """A transformer and a linear head on the last attended token, as OpenRLHF and LLaMA-Factory compute rewards."""

    def __init__(self, base: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self.config: Any = base.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        hidden_NTD = self.base(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        last_N = attention_mask.sum(1) - 1
        hidden_ND = hidden_NTD[torch.arange(len(last_N), device=last_N.device), last_N]
        return self.head(hidden_ND.float())  # type: ignore[no-any-return]


class ForeignModel(nn.Module):
    """A stranger's model as it is: float32, never trained, dropout always off."""

    def __init__(self, stranger: Stranger, model: nn.Module) -> None:
        super().__init__()
        self.stranger = stranger
        self.model = model.eval().requires_grad_(False)
        text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._text_config = text
        self._vocab_size = int(text.vocab_size)
        self._pad_id = text.pad_token_id

    def train(self, mode: bool = True) -> ForeignModel:
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[OwnIds]) -> Tensor:
        """`reward_N` as its makers' code gives it, float32."""
        device = next(self.parameters()).device
        reward_N = torch.zeros(len(texts), device=device)
        for rows in self._chunks(texts):
            said = self._at_once([texts[n] for n in rows], device)
            reward_N[torch.tensor(rows, device=device)] = said
        return (reward_N - self.stranger.mean) / self.stranger.std

    def bias_size(self) -> float:
        """Of the layer that makes the reward; 0 without one."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        return max((float(m.bias.abs().max()) for m in layers if m.bias is not None), default=0.0)

    def _chunks(self, texts: Sequence[OwnIds]) -> list[list[int]]:
        chunks: list[list[int]] = []
        for n in sorted(range(len(texts)), key=lambda n: len(texts[n].ids)):
            size = len(texts[n].ids)
            if not chunks or not self.stranger.padded or (len(chunks[-1]) + 1) * size > TOKENS_PER_FORWARD:
                chunks.append([])
            chunks[-1].append(n)
        return chunks

    def _at_once(self, texts: Sequence[OwnIds], device: torch.device) -> Tensor:
        pad_id = self._safe_pad(texts)
        longest = max(len(text.ids) for text in texts)
        ids_NT = torch.full((len(texts), longest), pad_id)
        mask_NT, types_NT = torch.zeros_like(ids_NT), torch.zeros_like(ids_NT)
        for n, text in enumerate(texts):
            ids_NT[n, : len(text.ids)] = torch.tensor(text.ids)
            mask_NT[n, : len(text.ids)] = 1
            types_NT[n, text.second : len(text.ids)] = 1
        inputs = {"input_ids": ids_NT.to(device), "attention_mask": mask_NT.to(device)}
        if self.stranger.has_types:
            inputs["token_type_ids"] = types_NT.to(device)
        said = self.model(**inputs)
        logits_N1 = said if isinstance(said, Tensor) else said.logits
        return logits_N1[:, 0].float()

    def _safe_pad(self, texts: Sequence[OwnIds]) -> int:
        """Classifiers read at the last token that is not the pad token, so theirs is kept, even where it ends texts:
        they were trained so. One without reads at the last token; then any id that is in no text pads."""
        if self._pad_id is not None and 0 <= self._pad_id < self._vocab_size:
            return int(self._pad_id)
        used = {i for text in texts for i in text.ids}
        pad_id = next((i for i in range(self._vocab_size) if i not in used), 0)
        self._text_config.pad_token_id = pad_id
        return pad_id


def unfilled(stranger: Stranger) -> ForeignModel:
    """The module with weights that mean nothing yet: a run's file has them."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    shape = dict(stranger.shape)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.dtype = torch.float32
    auto: Any = AutoModelForSequenceClassification if stranger.kind == "classifier" else AutoModel
    with quiet(), torch.random.fork_rng(devices=[]):
        model = auto.from_config(config)
        if stranger.kind != "classifier":
            size = config.get_text_config().hidden_size
            model = Headed(model, nn.Linear(size, 1, bias=stranger.has_bias))
    return ForeignModel(stranger, model.float())


def fill(foreign: ForeignModel) -> None:
    """Put the weights of its directory in. ConfigError where that is not the directory that was examined.

    They are copied: a product over the tensors of a mapped file may round differently, by their alignment.
    """
    stranger = foreign.stranger
    if directory_sha256(stranger.folder) != stranger.sha256:
        raise ConfigError(
            f"{stranger.name}: {stranger.folder} is gone or has changed since it was examined: import again"
        )
    model, faults = _loaded(stranger)
    if model is None or faults:
        raise ConfigError([f"{stranger.name}: {fault}" for fault in faults])
    foreign.model.load_state_dict(model.state_dict())


# ---- a directory ---------------------------------------------------------------------------------------------------


def examine(name: str, folder: str | Path, *, max_length: int | None = None) -> Stranger:
    """What stands in a directory, its weights read and tried. ConfigError with everything that is wrong with it; code
    and pickles of the directory are never run."""
    folder = Path(folder)
    faults = _file_faults(folder)
    if faults:
        raise ConfigError([f"{name}: {folder}: {fault}" for fault in faults])
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: list[str] = []
    stranger: Stranger | None = None
    model: nn.Module | None = None
    try:
        stranger = _described(name, folder, shape)
        model, found = _loaded(stranger)
    except ConfigError as error:
        found = list(error.faults)
    tokenizer, tokenizer_faults = _tokenizer(folder)
    found += tokenizer_faults
    if stranger is not None and model is not None and tokenizer is not None and not found:
        stranger, found = _tried(stranger, model, tokenizer, max_length)
    if stranger is None or found:
        raise ConfigError([f"{name}: {folder}: {fault}" for fault in found])
    return stranger


def examine_all(folders: Mapping[str, str | Path], *, max_length: int | None = None) -> list[Stranger]:
    """Each directory under its expert's name. ConfigError with the faults of all."""
    strangers: list[Stranger] = []
    faults: list[str] = []
    for name, folder in folders.items():
        try:
            strangers.append(examine(name, folder, max_length=max_length))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return strangers


def _file_faults(folder: Path) -> list[str]:
    """What can be seen without opening any weights."""
    if not folder.is_dir():
        return ["there is no such directory; give that of a model, already downloaded"]
    faults = []
    has_safetensors = any(path.name != VALUE_HEAD for path in folder.glob("*.safetensors"))
    pickles = sorted(
        path.name for pattern in PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin"
    )
    if (folder / "adapter_config.json").exists():
        faults.append(
            "is an adapter alone; merge it into its base first (merge_and_unload of peft, then save_pretrained)"
        )
    elif not has_safetensors:
        told = f": {', '.join(pickles)} may hold a pickle and is not opened" if pickles else ""
        faults.append(f"no weights as safetensors{told}; save the model again with save_pretrained")
    head_pickle = [name for name in pickles if name.startswith("value_head")]
    if head_pickle and not (folder / VALUE_HEAD).exists() and has_safetensors:
        faults.append(f"its head {head_pickle[0]} may hold a pickle and is not opened; save it as {VALUE_HEAD}")
    if not (folder / "config.json").is_file():
        return [*faults, "no config.json"]
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return [*faults, f"config.json cannot be read: {error}"]
    return [*faults, *_config_faults(folder, shape)]


def _config_faults(folder: Path, shape: Any) -> list[str]:
    if not isinstance(shape, dict) or not isinstance(shape.get("model_type"), str):
        return ["config.json names no model_type"]
    faults = []
    tokenizer_config = folder / "tokenizer_config.json"
    told = json.loads(tokenizer_config.read_text(encoding="utf-8")) if tokenizer_config.is_file() else {}
    if "auto_map" in shape or "auto_map" in told:
        faults.append(
            "asks for code of its own (auto_map), which is never run: only architectures of transformers can come in"
        )
    if "quantization_config" in shape:
        faults.append("its weights are quantised; save it in float32, bfloat16 or float16")
    if shape.get("is_encoder_decoder"):
        faults.append("is an encoder-decoder; encoders and decoders can come in")
    return faults


def _described(name: str, folder: Path, shape: dict[str, Any]) -> Stranger:
    """Kind and head by what stands in the directory. ConfigError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"config.json is of no architecture that transformers has: {_first_line(error)}") from error
    architecture = str((shape.get("architectures") or [""])[0])
    common: dict[str, Any] = {
        "name": name,
        "folder": str(folder),
        "sha256": directory_sha256(str(folder)),
        "architecture": architecture,
        "shape": shape,
        "max_length": NO_LIMIT,
    }
    if (folder / VALUE_HEAD).is_file():
        names = _tensor_names([folder / VALUE_HEAD])
        if f"{VALUE_HEAD_TENSOR}.weight" not in names:
            raise ConfigError(f"{VALUE_HEAD} has no {VALUE_HEAD_TENSOR}.weight (it has {_some(names)})")
        has_bias = f"{VALUE_HEAD_TENSOR}.bias" in names
        return Stranger(kind="value_head", head=VALUE_HEAD_TENSOR, has_bias=has_bias, **common)
    if architecture.endswith("ForSequenceClassification") and "value_head_prefix" not in shape:
        if config.num_labels != 1:
            raise ConfigError(
                f"has {config.num_labels} labels ({_some(map(str, config.id2label.values()))}); a reward model has one"
            )
        return Stranger(kind="classifier", **common)
    names = _tensor_names(_weight_files(folder))
    prefixes = [shape["value_head_prefix"]] if "value_head_prefix" in shape else list(OPENRLHF_HEADS)
    head = next((prefix for prefix in prefixes if f"{prefix}.weight" in names), None)
    if head is None:
        wanted = " or ".join(f"{prefix}.weight" for prefix in prefixes)
        raise ConfigError(
            f"has no reward head: it is a {architecture or 'model without a class'}, and there is neither {VALUE_HEAD} "
            f"nor a tensor {wanted}"
        )
    normalised = {key: float(shape[key]) for key in ("mean", "std") if shape.get(key) is not None}
    if not 0 < normalised.get("std", 1.0) < float("inf"):
        raise ConfigError(f"std in config.json must be a positive number (got {normalised['std']})")
    return Stranger(kind="openrlhf", head=head, has_bias=f"{head}.bias" in names, **normalised, **common)


def _loaded(stranger: Stranger) -> tuple[nn.Module | None, list[str]]:
    """The model with its own weights, or what is missing or not finite in them."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(stranger.folder)
    auto: Any = AutoModelForSequenceClassification if stranger.kind == "classifier" else AutoModel
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            model, info = auto.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        return None, [f"cannot be loaded: {_first_line(error)}"]
    if stranger.kind == "classifier" and type(model).__name__ != stranger.architecture:
        return None, [f"is a {stranger.architecture}, which transformers would load as {type(model).__name__}"]
    missing = {*info["missing_keys"]}
    if stranger.kind != "classifier":  # nothing reads a pooler there
        missing = {key for key in missing if "pooler" not in key}
    if missing:
        return None, [f"its weights lack {_some(missing)}, which would be random; save the trained model whole"]
    if stranger.kind != "classifier":
        size = model.config.get_text_config().hidden_size
        head, faults = _head(stranger, folder, size)
        if head is None:
            return None, faults
        model = Headed(model, head)
    bad = [key for key, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    return model, [f"its weights are not finite: {_some(bad)}"] if bad else []


@torch.no_grad()
def _head(stranger: Stranger, folder: Path, size: int) -> tuple[nn.Linear | None, list[str]]:
    """The linear head that no class of transformers has."""
    files = [folder / VALUE_HEAD] if stranger.kind == "value_head" else _weight_files(folder)
    wanted = [f"{stranger.head}.weight", *([f"{stranger.head}.bias"] if stranger.has_bias else [])]
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key).float() for key in wanted if key in opened.keys()}  # noqa: SIM118
    shapes = {f"{stranger.head}.weight": (1, size), f"{stranger.head}.bias": (1,)}
    faults = [
        f"its head {key} has shape {tuple(value.shape)}; a reward head on {size} hidden units has {shapes[key]}"
        for key, value in tensors.items()
        if tuple(value.shape) != shapes[key]
    ]
    if faults:
        return None, faults
    head = nn.Linear(size, 1, bias=stranger.has_bias)
    for key, value in tensors.items():
        getattr(head, key.rpartition(".")[2]).copy_(value)
    return head, []


def _tokenizer(folder: Path) -> tuple[Any | None, list[str]]:
    try:
        return load_tokenizer(str(folder)), []
    except BackboneError as error:
        return None, [str(error).removeprefix(f"backbone {str(folder)!r}: ")]


def _tried(stranger: Stranger, model: nn.Module, tokenizer: Any, max_length: int | None) -> tuple[Stranger, list[str]]:
    """With its limit, and with whether padding changes what it says; or why it does not run."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if token != tokenizer.pad_token}
    if (largest := max(vocabulary.values(), default=0)) >= text.vocab_size:
        return stranger, [
            f"its tokenizer has token ids up to {largest}, the model embeds {text.vocab_size}: of another model?"
        ]
    limits = [_positions(model), tokenizer.model_max_length, max_length]
    limit = min(int(one) for one in (*limits, NO_LIMIT) if one is not None)
    notes = () if text.pad_token_id is not None else ("no pad token in its configuration: a safe one is used",)
    names = inspect.signature(model.base.forward if isinstance(model, Headed) else model.forward).parameters
    has_types = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in names
    told = {"max_length": limit, "notes": notes, "has_types": has_types, "reads_turns": _turns_of(tokenizer)}
    stranger = stranger.model_copy(update=told)
    foreign = ForeignModel(stranger, model)
    try:
        encoder = ForeignEncoder(stranger, tokenizer)
        texts = [encoder.read(Conversation(prompt="Is it so?", response=probe))[0] for probe in PROBES]
        alone_N = torch.cat([foreign([one]) for one in texts])
        together_N = foreign(texts)
    except (DataError, ValueError, RuntimeError, IndexError, TypeError) as error:
        return stranger, [f"does not run: {_first_line(error)}"]
    if not bool(torch.isfinite(alone_N).all()):
        return stranger, ["gives rewards that are not finite"]
    apart = float((alone_N - together_N).abs().max()) / max(1.0, float(alone_N.abs().max()))
    num = sum(p.numel() for p in model.parameters())
    padded = apart < 1e-4
    if not padded:
        notes = (*notes, "padding changes its rewards: conversations are computed one by one")
    return stranger.model_copy(update={"padded": padded, "num_parameters": num, "notes": notes}), []


def _turns_of(tokenizer: Any) -> str:
    """How it is given turns, in words."""
    if getattr(tokenizer, "chat_template", None):
        return "turns by its own chat template"
    joins = tokenizer.sep_token_id is not None and tokenizer.cls_token_id is not None
    return f"no chat template: prompt and response {'as a pair of texts' if joins else 'joined, with its end token'}"


def _positions(model: nn.Module) -> int | None:
    """Tokens that its position table holds; None where there is no limit."""
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or getattr(text, "position_biased_input", True) is False:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return int(limit) - (0 if module.padding_idx is None else module.padding_idx + 1)
    return int(limit)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.name != VALUE_HEAD)


def _tensor_names(files: Sequence[Path]) -> set[str]:
    """Raises ConfigError for a file that is damaged."""
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file.name} cannot be read: {_first_line(error)}") from error
    return names


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


# ---- its input -----------------------------------------------------------------------------------------------------


class ForeignEncoder:
    """A stranger's own tokenizer and chat template."""

    def __init__(self, stranger: Stranger, tokenizer: Any) -> None:
        self.stranger = stranger
        self.encoder = Encoder(tokenizer, stranger.max_length)

    def read(self, item: Conversation | Rendered) -> tuple[OwnIds, int]:
        """Its tokens and how many were cut off. DataError where its template refuses the conversation."""
        try:
            encoded = self.encoder.conversation(item)
        except DataError as error:
            raise DataError(f"expert {self.stranger.name}: {error}") from error
        return OwnIds(encoded.ids, self._second(item, encoded.ids)), encoded.num_dropped

    def _second(self, item: Conversation | Rendered, ids: tuple[int, ...]) -> int:
        """Behind the first separator of a joined pair, which no text can write."""
        if isinstance(item, Rendered) or not self.encoder.joins_pairs:
            return len(ids)
        is_plain = isinstance(item.response, str) and isinstance(item.prompt, str)
        if self.encoder.has_template and not is_plain:
            return len(ids)
        return ids.index(self.encoder.tokenizer.sep_token_id) + 1
