"""What is fitted after training: temperatures, measures of calibration, covariances, and the sealed folder of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from moreward.calibration import (
    EVERYONE,
    MIN_PAIRS,
    Calibration,
    brier_score,
    calibration_error,
    fit_space,
    fit_temperature,
    fit_temperatures,
    out_of_fold,
    read_calibration,
    shrunk_covariance,
    sigmoid,
    tempered,
    write_calibration,
)
from moreward.errors import RunError

MARGINS = st.lists(st.floats(-50, 50), min_size=1, max_size=60).map(lambda m: np.array(m))


def drawn(num: int, temperature: float, seed: int = 0) -> np.ndarray:
    """Margins whose signs obey σ(margin / temperature)."""
    rng = np.random.default_rng(seed)
    size = rng.exponential(2.0 * temperature, num)
    return np.where(rng.random(num) < sigmoid(size / temperature), size, -size)


# ---- probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 1.0, 7.0, 300.0])
def test_a_temperature_recovers_the_scale_that_the_margins_were_drawn_with(temperature: float) -> None:
    assert fit_temperature(drawn(20_000, temperature)) == pytest.approx(temperature, rel=0.05)


@given(MARGINS)
def test_no_temperature_on_a_grid_is_likelier_than_the_fitted_one(margins: np.ndarray) -> None:
    target = (len(margins) + 1) / (len(margins) + 2)

    def loss(temperature: float) -> float:
        x = margins / temperature
        return float((target * np.logaddexp(0, -x) + (1 - target) * np.logaddexp(0, x)).mean())

    unit = math.sqrt(float(np.square(margins).mean())) or 1.0
    best = min(loss(unit * t) for t in np.geomspace(1e-3, 1e3, 400))
    assert loss(fit_temperature(margins)) <= best + 1e-9


@given(MARGINS, st.floats(0.01, 100))
def test_a_temperature_has_the_unit_of_the_margins_and_knows_no_order(margins: np.ndarray, unit: float) -> None:
    fitted = fit_temperature(margins)
    assert fitted > 0
    if fitted < 100 * np.sqrt(np.square(margins).mean()):  # beyond it the likelihood is flat
        assert fit_temperature(margins * unit) == pytest.approx(fitted * unit, rel=1e-3)
        assert fit_temperature(margins[::-1]) == pytest.approx(fitted, rel=1e-3)


def test_an_expert_that_is_always_right_is_not_infinitely_sure_and_one_at_chance_says_half() -> None:
    always = np.full(50, 2.0)
    assert sigmoid(always / fit_temperature(always))[0] == pytest.approx(51 / 52, abs=1e-3)
    wrong = -always
    assert sigmoid(wrong / fit_temperature(wrong))[0] == pytest.approx(0.5, abs=1e-3)
    assert fit_temperature(np.zeros(5)) == fit_temperature(np.zeros(0)) == 1.0


@given(MARGINS)
def test_calibration_error_and_brier_score_are_what_counting_says(margins: np.ndarray) -> None:
    bins: dict[int, list[tuple[float, float]]] = {}
    squares = []
    for margin in margins.tolist():
        sure = 1 / (1 + math.exp(-abs(margin)))
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        bins.setdefault(min(int((sure - 0.5) * 20), 9), []).append((sure, right))
        squares.append((1 - 1 / (1 + math.exp(-margin))) ** 2)
    gaps = [abs(sum(s for s, _ in b) - sum(r for _, r in b)) for b in bins.values()]
    assert calibration_error(margins) == pytest.approx(sum(gaps) / len(margins), abs=1e-9)
    assert brier_score(margins) == pytest.approx(sum(squares) / len(margins), abs=1e-9)


@given(MARGINS, st.floats(0.01, 100))
def test_tempering_never_changes_an_order_nor_who_is_preferred(margins: np.ndarray, temperature: float) -> None:
    probabilities = sigmoid(tempered(margins, ["a"] * len(margins), {EVERYONE: temperature}))
    assert np.array_equal(probabilities > 0.5, sigmoid(margins / temperature) > 0.5)
    assert np.all(np.diff(probabilities[np.argsort(margins)]) >= 0)


def test_an_expert_with_few_pairs_has_the_temperature_of_all() -> None:
    many, few = drawn(400, 5.0), drawn(MIN_PAIRS - 1, 1.0)
    found = fit_temperatures(np.concatenate([many, few]), ["many"] * len(many) + ["few"] * len(few))
    assert found.keys() == {EVERYONE, "many"}
    assert found["many"] == fit_temperature(many)


def test_overconfidence_is_repaired_and_measured_on_pairs_that_had_no_part_in_it() -> None:
    margins = 6.0 * drawn(2000, 1.0)
    experts, groups = ["a"] * 2000, [f"g{i // 2}" for i in range(2000)]
    after = out_of_fold(margins, experts, groups)
    assert calibration_error(after) < 0.03 < 0.1 < calibration_error(margins)
    assert brier_score(after) < brier_score(margins)
    changed = margins.copy()
    changed[:2] = -1000.0  # a group's own margins do not decide its own temperature
    assert (out_of_fold(changed, experts, groups)[0] / changed[0]) == pytest.approx(after[0] / margins[0])
    assert np.all(np.isfinite(out_of_fold(margins[:2], experts[:2], groups[:2])))


# ---- where prompts lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "size"), [(5, 12), (40, 6), (500, 30)])
def test_the_covariance_is_that_of_scikit_learn(num: int, size: int) -> None:
    rng = np.random.default_rng(num)
    x = rng.normal(size=(num, size)) @ rng.normal(size=(size, size))
    x -= x.mean(0)
    assert np.allclose(shrunk_covariance(x), ledoit_wolf(x, assume_centered=True)[0], rtol=1e-10)


def clouds(num: int, seed: int, middles: Sequence[float] = (0.0, 4.0)) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2.0, 8)
    rows = [torch.randn(num, 8, generator=generator) * scale + middle for middle in middles]
    return torch.cat(rows), [name for name in "ab"[: len(middles)] for _ in range(num)]


def test_a_distance_is_mahalanobis_and_its_share_that_of_nearer_held_out_prompts() -> None:
    (known, domains), (usual, _), (new, truth) = clouds(200, 0), clouds(50, 1), clouds(30, 2)
    space = fit_space(known, domains, usual)
    x = known.double().numpy()
    means = np.stack([x[:200].mean(0), x[200:].mean(0)])
    inverse = np.linalg.inv(shrunk_covariance(x - np.repeat(means, 200, 0)))
    apart = new.double().numpy()[:, None] - means
    slow = np.sqrt(np.einsum("ped,df,pef->pe", apart, inverse, apart) / 8)
    assert np.allclose(space.distances(new).numpy(), slow, rtol=1e-4)
    nearest = [space.domains[i] for i in space.distances(new).argmin(1).tolist()]
    assert nearest == truth
    held_out = space.distances(usual).amin(1).tolist()
    for distance in space.distances(new).amin(1).tolist():
        assert space.share_nearer(distance) == sum(h < distance for h in held_out) / 100
    assert (space.share_nearer(0.0), space.share_nearer(1e9)) == (0.0, 1.0)
    far, _ = clouds(30, 3, middles=(12.0,))
    assert {space.share_nearer(d) for d in space.distances(far).amin(1).tolist()} == {1.0}


def test_prompts_that_do_not_vary_and_a_domain_of_one_still_have_distances() -> None:
    space = fit_space(torch.zeros(3, 4), ["a", "a", "b"], torch.ones(1, 4))
    assert space.held_out_V.tolist() == [1.0]
    assert bool(torch.isfinite(space.distances(torch.randn(2, 4))).all())


# ---- what is kept ----------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> Calibration:
    known, domains = clouds(20, 0)
    return Calibration(
        temperatures={EVERYONE: 2.0, "a": 3.0}, space=fit_space(known, domains, known), report={"pairs": 3}
    )


def test_a_calibration_is_read_back_exactly_and_replaced_whole(tmp_path: Path, made: Calibration) -> None:
    assert read_calibration(tmp_path, model="m") is None
    for _ in range(2):
        write_calibration(tmp_path, made, model="m")
        found = read_calibration(tmp_path, model="m")
        assert found is not None
        assert (found.temperatures, found.report, found.space.domains) == (made.temperatures, made.report, ("a", "b"))
        for name in ("means_ED", "whiten_DD", "held_out_V"):
            assert torch.equal(getattr(found.space, name), getattr(made.space, name))
        assert [p.name for p in tmp_path.iterdir()] == ["calibration"]
    assert (made.temperature("a"), made.temperature("never seen")) == (3.0, 2.0)


def test_a_calibration_of_another_model_or_a_changed_one_is_refused(tmp_path: Path, made: Calibration) -> None:
    write_calibration(tmp_path, made, model="m")
    with pytest.raises(RunError, match=r"model is 'm', expected 'n'.*moreward calibrate RUN --data PAIRS"):
        read_calibration(tmp_path, model="n")
    file = tmp_path / "calibration" / "calibration.json"
    file.write_text(file.read_text().replace("2.0", "2.5"))
    with pytest.raises(RunError, match=r"calibration\.json: content changed"):
        read_calibration(tmp_path, model="m")
