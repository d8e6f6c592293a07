"""Experiment files: every fault at once, nothing compared with nothing, the shipped one complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moreward.errors import ConfigError
from moreward.proof.experiment import KINDS, Experiment, domain_map, is_experiment, read_experiment

GOOD: dict[str, Any] = {
    "name": "t",
    "seeds": 2,
    "data": {"synthetic": {"train": 8, "val": 2, "test": 4}},
    "systems": {"one": {"recipe": "baseline"}, "mix": {"recipe": "rodos"}},
}


def faults(tmp_path: Path, given: dict[str, Any], *words: str) -> list[str]:
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    with pytest.raises(ConfigError) as told:
        read_experiment(str(file), words)
    return told.value.faults


def read(tmp_path: Path, given: dict[str, Any], *words: str) -> Experiment:
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    return read_experiment(str(file), words)


def test_a_good_one_knows_its_mixtures_seeds_and_folder(tmp_path: Path) -> None:
    experiment = read(tmp_path, GOOD, "systems.mix.tune=frozen")
    assert experiment.mixtures == ("mix",)
    assert experiment.seeds == (0, 1)
    assert experiment.folder == Path("runs/t")
    assert experiment.given("mix") == {"recipe": "rodos", "tune": "frozen"}


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    told = faults(
        tmp_path,
        {
            **GOOD,
            "settings": {"seed": 3, "data": {"train": "x"}},
            "baseline": "on",
            "systems": {**GOOD["systems"], "bad": {"recipe": "rodoss"}, "Mix": {"recipe": "rodos"}},
        },
    )
    words = "\n".join(told)
    assert "settings.seed: set by the experiment" in words
    assert "settings.data.train: all systems see the same pairs" in words
    assert "rodoss" in words
    assert "did you mean 'one'" in words.lower()
    assert "must differ" in words
    assert len(told) >= 5


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sedes": 2}, "sedes: unknown key. Did you mean 'seeds'?"),
        ({"seeds": 0}, "seeds: must be a number of seeds"),
        ({"systems": {"one": {"recipe": "baseline"}}}, "only single models"),
        ({"data": {"train": "nowhere.jsonl"}}, "data.test: is required"),
        ({"data": {"train": "nowhere.jsonl", "test": "x.jsonl"}}, "data.train: there is no nowhere.jsonl"),
        ({"data": {"synthetic": {"train": 8, "noize": 1}}}, "data.synthetic.noize: unknown key. Did you mean 'noise'?"),
        ({"only": ["ome"]}, "only: 'ome' is no system. Did you mean 'one'?"),
    ],
)
def test_a_fault_says_what_to_do(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert any(said in fault for fault in faults(tmp_path, {**GOOD, **changed})), faults(tmp_path, {**GOOD, **changed})


def test_a_mixture_must_have_single_models_of_its_budget_beside_it(tmp_path: Path) -> None:
    assert "controls.mix: no single model of equal budget" in faults(tmp_path, {**GOOD, "controls": {}})[0]
    told = faults(tmp_path, {**GOOD, "controls": {"mix": {"total": "one", "active": "mix"}}})
    assert "controls.mix.active: 'mix' is itself a mixture; name a single model" in told
    assert any(fault.startswith("controls.mix.training: is required") for fault in told)


def test_files_given_by_domain_say_the_domain_of_their_rows(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    assert domain_map({"a": "x.jsonl", "b": ("y.jsonl", "z.jsonl")}, "w.jsonl", {"c": str(folder)}) == {
        "x.jsonl": "a",
        "y.jsonl": "b",
        "z.jsonl": "b",
        f"{folder}/*": "c",
    }


def test_the_papers_experiment_asks_for_its_data_and_prints_its_numbers(tmp_path: Path) -> None:
    assert is_experiment("paper")
    assert is_experiment("a.yaml")
    assert not is_experiment("runs/a")
    with pytest.raises(ConfigError) as told:
        read_experiment("paper")
    assert sum("is required: the file, folder" in fault for fault in told.value.faults) == 10
    data = tmp_path / "x.jsonl"
    data.write_text("{}\n", encoding="utf-8")
    names = ("Anthropic", "SHP", "HellaSwag", "Dahoas", "Oasst")
    paper = read_experiment("paper", [f"data.{side}.{n}={data}" for side in ("train", "test") for n in names])
    assert [one.title.split(":")[0] for one in paper.printed] == ["Table 2", "Table 3", "Table 6", "Table 7"]
    for one in paper.printed:
        assert set(one.rows) <= set(paper.systems)
        assert all(set(row) <= set(one.columns) for row in one.rows.values())
    # arXiv 2407.17546, table 2: each average is that of its five columns, to the rounding of the print.
    for row in paper.printed[0].rows.values():
        means = [row[n][0] if isinstance(row[n], tuple) else row[n] for n in names]  # type: ignore[index]
        average = row["Average"]
        assert abs(sum(means) / 5 - (average[0] if isinstance(average, tuple) else average)) < 3e-3
    assert set(KINDS) == {"total", "active", "training"}
