"""All experts in one pass over mixed batches: for each expert what training it alone on its rows gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moreward.checkpoint import CheckpointStore
from moreward.config import TrainConfig
from moreward.data.batches import Encoder, encode_pairs
from moreward.errors import NonFiniteError
from moreward.nn.backbone import Backbone, load_tokenizer
from moreward.nn.losses import PairwiseLoss
from moreward.systems.arliss import ArlissConfig, Recipe
from moreward.train.loop import Fit, Surroundings, make_accelerator
from moreward.train.track import MetricsFile, Silent
from trained import card, trained, weights

DOMAINS = ("long", "short")


class Watched(Fit):
    """Keeps the gradients of its first step, clipped and not."""

    def _clip(self) -> float:
        if self.progress.step == 0:
            self.raw = {k: p.grad.clone() for k, p in self.names.items() if getattr(p, "grad", None) is not None}
        norm = super()._clip()
        if self.progress.step == 0:
            self.clipped = {k: p.grad.clone() for k, p in self.names.items() if getattr(p, "grad", None) is not None}
        return norm


def system_of(folder: Path, **settings) -> Recipe:
    torch.manual_seed(0)
    system = Recipe(ArlissConfig(rank=4, dropout=0.0, **settings), Backbone.load(str(folder)), DOMAINS)
    for name in system.expert_names:
        for matrix in system.routed.experts.backbone.bank.adapters[name].B.values():
            torch.nn.init.normal_(matrix, std=0.05)
    for backbone in system.backbones():
        backbone.without_dropout()
    return system


def fit_of(system: Recipe, stage, train, folder: Path, **settings) -> Watched:
    config = TrainConfig(learning_rate=0.01, batch_size=len(train), device="cpu", max_steps=1, **settings)
    folder.mkdir()
    learn = {id(p) for p in stage.learn}
    for parameter in system.parameters():
        parameter.requires_grad_(id(parameter) in learn)
    around = Surroundings(
        accelerator=make_accelerator(config, str(folder)),
        config=config,
        seed=0,
        pad_id=0,
        domains=DOMAINS,
        metrics=MetricsFile(folder / "metrics.jsonl"),
        reporter=Silent(),
    )
    names = {k: p for k, p in system.named_parameters() if id(p) in learn}
    store = CheckpointStore(folder / "checkpoints", hashes={"config_sha256": "c"})
    fit = Watched(stage, names, train, (), around, store)
    fit.run()
    return fit


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "roberta"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_equal_those_of_each_expert_alone_on_the_same_rows(kind, accumulate, tiny_backbone, pairs, tmp_path):
    encoder = Encoder(load_tokenizer(str(tiny_backbone(kind))), 128)
    by_domain = {d: [p for p in pairs if p.domain == d] for d in DOMAINS}
    some = [*by_domain["long"][:7], *by_domain["short"][:4]]  # not the same number of each
    rows = encode_pairs(encoder, some, DOMAINS, on_long="truncate").pairs
    settings = {"max_grad_norm": 0.05, "accumulate": accumulate}

    system = system_of(tiny_backbone(kind), train_together=True)
    together, router = system.stages(PairwiseLoss())
    assert (together.name, router.name) == ("experts", "router")
    joint = fit_of(system, together, rows, tmp_path / "together", **settings)

    for index, domain in enumerate(DOMAINS):
        system = system_of(tiny_backbone(kind))
        stage = system.stages(PairwiseLoss())[index]
        mine = [row for row in rows if row.preference.domain == domain]
        alone = fit_of(system, stage, mine, tmp_path / domain, **settings)
        assert alone.raw
        largest = max(float(g.abs().max()) for g in alone.raw.values())
        for name, grad in alone.raw.items():
            assert float((joint.raw[name] - grad).abs().max()) <= 5e-5 * largest, name
        for name, grad in alone.clipped.items():
            assert float((joint.clipped[name] - grad).abs().max()) <= 5e-5 * largest, name
        assert alone.raw.keys() < joint.raw.keys()


def test_a_run_trained_together_has_every_expert_moved_and_standardised(tmp_path, tiny_backbone, pairs):
    run = trained(tmp_path, tiny_backbone, pairs, "arliss", "bert", "system.train_together=true")
    told = card(run)
    assert [stage["stage"] for stage in told["stages"]] == ["experts", "router"]
    kept = weights(run)
    for domain in DOMAINS:
        assert int(kept[f"routed.experts.standardize.{domain}.num"]) > 0
        assert any(bool(value.abs().sum() > 0) for key, value in kept.items() if f"adapters.{domain}.B." in key)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_that_is_no_number_stops_the_step_whichever_expert_it_is_of(bad, tiny_backbone, pairs, tmp_path):
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 128)
    some = [next(p for p in pairs if p.domain == d) for d in DOMAINS]
    rows = encode_pairs(encoder, some, DOMAINS, on_long="truncate").pairs
    system = system_of(tiny_backbone("bert"), train_together=True)
    together = system.stages(PairwiseLoss())[0]
    together.experts[bad][0].register_hook(lambda grad: grad * float("nan"))
    before = [p.clone() for p in together.learn]
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        fit_of(system, together, rows, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before, together.learn, strict=True))
