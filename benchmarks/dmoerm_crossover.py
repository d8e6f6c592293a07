"""When a double layer pays: DMoERM beside a single model on pairs whose capabilities are known, at several sizes.

    python -m benchmarks.dmoerm_crossover --pairs 200 1600 --seeds 3

A response is a bag of words; each of a task's four capabilities reads its words in its own way, partly as other tasks
do; its level bends (tanh), and the true reward is the sum of four levels. Labels of the whole are right in 70 % of the
pairs, those of a capability in 85 %. A random, frozen one-layer BERT, pooled by its mean, carries the words; every
recipe is trained by the product's own runner with the same pairs of the whole, and tested on true labels. Whether a
size is "large" hangs on all of these: the table shows that there is a crossover, not where yours is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moreward.config import resolve
from moreward.data.split import split_by_group
from moreward.evals.run import evaluate_run
from moreward.scoring import load
from moreward.train.runner import Pairs, train_on
from moreward.types import Preference

TASKS = tuple(f"task{t}" for t in range(4))
POINTS = tuple(f"point{c}" for c in range(4))
NUM_WORDS, LENGTH, SHARED = 16, 8, 0.5
NUM_TEST = 1000
RIGHT_WHOLE, RIGHT_POINT = 0.70, 0.85
RECIPES: dict[str, dict[str, Any]] = {
    "single": {"recipe": "baseline"},
    "routed": {"recipe": "arliss"},
    "dmoerm-states": {"recipe": "dmoerm"},
    "dmoerm-rewards": {"recipe": "dmoerm", "system": {"fuse": "rewards", "fusion_learning_rate": 1e-2}},
}


class World:
    """Four tasks, four capabilities each, and what a word is worth to each: drawn by a seed."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shared = torch.randn(1, len(POINTS), NUM_WORDS, generator=draw)
        own = torch.randn(len(TASKS), len(POINTS), NUM_WORDS, generator=draw)
        self.worth_TCV = SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own
        self.rng = random.Random(seed)

    def levels(self, task: int, words: Sequence[int]) -> list[float]:
        return torch.tanh(self.worth_TCV[task][:, list(words)].sum(1) / LENGTH**0.5).tolist()

    def pairs(self, num: int, *, right: float, label_points: bool) -> list[Preference]:
        """`num` pairs of the whole, tasks in turn, and where asked one of each capability for each."""
        made = []
        for n in range(num):
            task = n % len(TASKS)
            prompt = f"{TASKS[task]} q{self.rng.randrange(10)} q{self.rng.randrange(10)} n{n}"
            answers = [[self.rng.randrange(NUM_WORDS) for _ in range(LENGTH)] for _ in range(2)]
            levels = [self.levels(task, words) for words in answers]
            texts = [" ".join(f"w{w}" for w in words) for words in answers]
            made.append(self._judged(prompt, task, texts, [sum(one) for one in levels], right, ""))
            for c, point in enumerate(POINTS if label_points else ()):
                made.append(self._judged(prompt, task, texts, [one[c] for one in levels], RIGHT_POINT, point))
        return made

    def _judged(
        self, prompt: str, task: int, texts: Sequence[str], worth: Sequence[float], right: float, point: str
    ) -> Preference:
        first = (worth[0] > worth[1]) == (self.rng.random() < right)
        chosen, rejected = texts if first else texts[::-1]
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, domain=TASKS[task], capability=point)


def make_backbone(folder: Path) -> Path:
    """A random one-layer BERT over the words of this world."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *TASKS,
        *(f"q{n}" for n in range(10)),
        *(f"w{n}" for n in range(NUM_WORDS)),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.02,
    )
    model = BertForMaskedLM(shape)
    model.bert.embeddings.position_embeddings.weight.data.zero_()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def accuracy(
    name: str, pairs: Sequence[Preference], test: Sequence[Preference], backbone: Path, out: Path, seed: int
) -> float:
    """Of one recipe, trained on `pairs` into `out`, over all pairs of `test`."""
    told = RECIPES[name]
    config = resolve(
        {
            "backbone": str(backbone),
            "pooling": "mean",
            "tune": "frozen",
            "out": str(out),
            "seed": seed,
            "data": {"max_length": 64},
            "train": {"epochs": 12, "batch_size": 64, "learning_rate": 2e-3, "patience": 4, "device": "cpu"},
            **told,
        }
    )
    sides = split_by_group(pairs, {"train": 0.9, "val": 0.1}, seed=seed)
    run = train_on(config, Pairs(sides["train"], sides["val"]))
    return evaluate_run(load(run, device="cpu"), test).evaluation.micro.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[200, 400, 1600, 8000], help="of the whole, in all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("runs/dmoerm-crossover"))
    told = parser.parse_args()
    backbone = make_backbone(told.out / "backbone")
    for num in told.pairs:
        for name in told.recipes:
            started, reached = time.monotonic(), []
            for seed in range(told.seeds):
                world = World(seed)
                pairs = world.pairs(num, right=RIGHT_WHOLE, label_points=True)
                test = world.pairs(NUM_TEST, right=1.0, label_points=False)
                reached.append(accuracy(name, pairs, test, backbone, told.out / f"{name}-{num}-{seed}", seed))
            spread = statistics.stdev(reached) if len(reached) > 1 else 0.0
            said = {"pairs": num, "recipe": name, "mean": statistics.mean(reached), "sd": spread, "seeds": reached}
            print(json.dumps({**said, "seconds": round(time.monotonic() - started)}), flush=True)


if __name__ == "__main__":
    main()
