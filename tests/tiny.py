"""Tiny pretrained models made on the spot, so the tests need no network and no weights in the repository.

Each is a real Hugging Face model directory of its family: its own config class, its own tokenizer model and special
tokens, weights saved with the head that real checkpoints of the family carry (masked or causal language model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

VOCAB_SIZE = 300
MAX_POSITIONS = 128
SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Please explain in a few words why the sky is blue.",
    "A short answer is better, because you asked for a short one.",
    "Here is a longer answer that takes its time and explains every step with care.",
    "How do I write a function that adds two numbers? def add(a, b): return a + b",
    "I am sorry, but I cannot help you with that request.",
    "The quick brown fox jumps over the lazy dog, 12 times in 3 days!",
    "user: hello there. assistant: hello, how can I help you today?",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Train = Callable[[tuple[str, ...]], Tokenizer]


def _word_piece(specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The trainer numbers the inner letters in the order of a hash map, which is another one at each call, and breaks
    # ties by number; named beforehand they have theirs. They are no special tokens of the tokenizer itself.
    inner = [f"##{letter}" for letter in sorted(set("".join(SENTENCES).lower()) - {" "})]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=[*specials, *inner], show_progress=False)
    trained = Tokenizer.from_str(tokenizer.to_str())
    trained.train_from_iterator(SENTENCES, trainer)
    tokenizer.model = models.WordPiece(trained.get_vocab(), unk_token="[UNK]")
    return tokenizer


def _unigram(specials: tuple[str, ...]) -> Tokenizer:
    """Pieces of a BPE, the earlier the likelier: the trainer of Unigram gives other pieces at each call."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,  # [MASK] is added behind the trained pieces, as in the published tokenizer
        special_tokens=list(specials),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    pieces = sorted(bpe.get_vocab().items(), key=lambda piece: piece[1])
    scores = [(piece, 0.0 if piece in specials else -5 - number / 100) for piece, number in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=specials.index("[UNK]")))
    tokenizer.normalizer, tokenizer.pre_tokenizer = bpe.normalizer, bpe.pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _byte_bpe(specials: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How one kind is built. `frame` and `pair_frame` are put around one text and around two, as the post-processor
    writes them. The first special token has id 0, the next 1, and so on."""

    config: type[PretrainedConfig]
    train: Train
    specials: tuple[str, ...]
    roles: dict[str, str]
    frame: str = ""
    pair_frame: str = ""
    causal: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


_LLAMA_LIKE = {"intermediate_size": 64, "num_key_value_heads": 2}
_ENCODER = {"intermediate_size": 64}
_BERT_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

_FAMILIES: dict[str, _Family] = {
    "bert": _Family(
        config=BertConfig,
        train=_word_piece,
        specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        roles=_BERT_ROLES,
        frame="[CLS] $A [SEP]",
        pair_frame="[CLS] $A [SEP] $B:1 [SEP]:1",
        settings=_ENCODER,
    ),
    "deberta-v2": _Family(
        config=DebertaV2Config,
        train=_unigram,
        specials=("[PAD]", "[CLS]", "[SEP]", "[UNK]"),
        roles=_BERT_ROLES,
        frame="[CLS] $A [SEP]",
        pair_frame="[CLS] $A [SEP] $B:1 [SEP]:1",
        settings={
            **_ENCODER,
            "relative_attention": True,
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "max_relative_positions": -1,
            "type_vocab_size": 0,
        },
    ),
    "roberta": _Family(
        config=RobertaConfig,
        train=_byte_bpe,
        specials=("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        roles={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
        frame="<s> $A </s>",
        pair_frame="<s> $A </s> </s> $B </s>",
        # RoBERTa counts positions from pad_token_id + 1, so two rows of the table are never used
        settings={**_ENCODER, "max_position_embeddings": MAX_POSITIONS + 2, "type_vocab_size": 1},
    ),
    "modernbert": _Family(
        config=ModernBertConfig,
        train=_byte_bpe,
        specials=("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
        roles=_BERT_ROLES,
        frame="[CLS] $A [SEP]",
        pair_frame="[CLS] $A [SEP] $B:1 [SEP]:1",
        settings={
            **_ENCODER,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "gpt2": _Family(
        config=GPT2Config,
        train=_byte_bpe,
        specials=("<|endoftext|>",),
        roles={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        causal=True,
    ),
    "llama": _Family(
        config=LlamaConfig,
        train=_byte_bpe,
        specials=("<|begin_of_text|>", "<|end_of_text|>"),
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|end_of_text|>",
        },
        frame="<|begin_of_text|> $A",
        pair_frame="<|begin_of_text|> $A <|begin_of_text|> $B",
        causal=True,
        settings=_LLAMA_LIKE,
    ),
    "qwen2": _Family(
        config=Qwen2Config,
        train=_byte_bpe,
        specials=_QWEN_SPECIALS,
        roles=_QWEN_ROLES,
        causal=True,
        settings={**_LLAMA_LIKE, "tie_word_embeddings": True},
        chat_template=CHAT_TEMPLATE,
    ),
    "qwen3": _Family(
        config=Qwen3Config,
        train=_byte_bpe,
        specials=_QWEN_SPECIALS,
        roles=_QWEN_ROLES,
        causal=True,
        settings={**_LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": True},
    ),
}
KINDS: tuple[str, ...] = tuple(_FAMILIES)
DECODERS: tuple[str, ...] = tuple(kind for kind, family in _FAMILIES.items() if family.causal)
ENCODERS: tuple[str, ...] = tuple(kind for kind in KINDS if kind not in DECODERS)


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind. `gpt2` has no pad token, `llama` pads with eos, `qwen2` has a chat template."""
    family = _FAMILIES[kind]
    tokenizer = family.train(family.specials)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in family.roles.values()])
    if family.frame:
        framing = {token for token in family.frame.split() if not token.startswith("$")}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=family.frame,
            pair=family.pair_frame,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(framing)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        chat_template=family.chat_template,
        **family.roles,
    )


def make_backbone(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write a random model of `kind` (one of KINDS) with its tokenizer into `folder`, and return `folder`.

    Hidden 32, 2 layers, 4 heads, at most 300 tokens, 128 positions. The same seed gives the same weights, and the
    caller's random state stays as it was.
    """
    family = _FAMILIES[kind]
    tokenizer = make_tokenizer(kind)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **family.settings,
    }
    auto = AutoModelForCausalLM if family.causal else AutoModelForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(family.config(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
