"""A configuration: every fault at once with what to do, files and words merged, presets that say what they change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moreward.config import (
    LEARNING_RATES,
    RunConfig,
    deviations,
    merge,
    parse_assignments,
    read_config,
    resolve,
)
from moreward.errors import ConfigError
from moreward.registry import find_recipe, recipe_names


def faults(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(given)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


# ---------------------------------------------------------------- faults


def test_unknown_keys_in_several_places_are_told_at_once_with_the_nearest_name() -> None:
    told = faults(
        {
            "recipe": "arliss",
            "bakbone": "x",
            "data": {"trian": "a"},
            "train": {"learning_rat": 1, "zzz": 1},
            "system": {"rnak": 3},
        }
    )
    by_key = {fault.split(":")[0]: fault for fault in told}
    assert set(by_key) == {"bakbone", "data.trian", "train.learning_rat", "train.zzz", "system.rnak"}
    for key, near in [
        ("bakbone", "backbone"),
        ("data.trian", "train"),
        ("train.learning_rat", "learning_rate"),
        ("system.rnak", "rank"),
    ]:
        assert f"unknown key. Did you mean {near!r}? Known: " in by_key[key]
    assert "Did you mean" not in by_key["train.zzz"]
    assert "epochs" in by_key["train.zzz"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": "many"}, "seed: input should be a valid integer, unable to parse string as an integer (got 'many')"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate: input should be greater than 0 (got -1)"),
        ({"train": {"schedule": "a"}}, "train.schedule: input should be 'linear', 'cosine' or 'constant' (got 'a')"),
        ({"train": {"device": "gpu"}}, "train.device: must be auto, cpu, cuda or cuda:N with N from 0 (got 'gpu')"),
        ({"train": {"device": "cuda:-1"}}, "train.device: must be auto, cpu, cuda or cuda:N with N from 0"),
        ({"train": {"batch_size": 0}}, "train.batch_size: input should be greater than or equal to 1 (got 0)"),
        ({"train": {"epochs": 1.5}}, "train.epochs: input should be a valid integer"),
        ({"data": {"val_fraction": 1}}, "data.val_fraction: input should be less than 1 (got 1)"),
        ({"data": {"on_long": "cut"}}, "data.on_long: input should be 'drop' or 'truncate' (got 'cut')"),
        (
            {"data": {"input_template": "User: "}},
            "data.input_template: must hold {} exactly once, where the prompt goes (got 'User: ')",
        ),
        (
            {"data": {"tags": {"user": "me"}}},
            "data.tags: may have the keys role_tag, content_tag, user_tag, assistant_tag, observation_tag, "
            "function_tag, system_tag (got {'user': 'me'})",
        ),
        ({"data": {"train": 3}}, "data.train: input should be a valid tuple (got 3)"),
        ({"data": None}, "data: input should be a valid dictionary"),
        ({"tune": "some"}, "tune: input should be 'full', 'lora' or 'frozen' (got 'some')"),
        ({"system": {"rank": 0}}, "system.rank: input should be greater than or equal to 1 (got 0)"),
        ({"system": []}, "system: input should be a valid dictionary"),
        ({"preset": "best"}, "preset: input should be 'practical' or 'paper' (got 'best')"),
        ({"train": {"label_smoothing": 0.5}}, "train.label_smoothing: input should be less than 0.5 (got 0.5)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_what_is_allowed(given: dict[str, Any], said: str) -> None:
    [fault] = faults({"recipe": "arliss", **given})
    assert fault.startswith(said)


def test_wrong_values_of_every_section_are_told_at_once() -> None:
    told = faults({"recipe": "arliss", "seed": "x", "data": {"max_length": 1}, "system": {"rank": 0, "dropout": 2}})
    assert [fault.split(":")[0] for fault in told] == ["seed", "data.max_length", "system.rank", "system.dropout"]


def test_a_recipe_is_required_and_known() -> None:
    assert faults({}) == ["recipe: is required"]
    [fault] = faults({"recipe": "arlis"})
    assert fault.startswith("recipe: unknown recipe 'arlis'. Did you mean 'arliss'? Known: arliss, ")


@pytest.mark.parametrize(("recipe", "tune"), [("arliss", "full"), ("rodos", "lora")])
def test_a_way_of_tuning_that_a_recipe_lacks_is_refused(recipe: str, tune: str) -> None:
    [fault] = faults({"recipe": recipe, "tune": tune})
    assert "tune" in fault
    for known in find_recipe(recipe).tunes:
        assert known in fault


# ---------------------------------------------------------------- words and files


def test_words_become_a_tree_of_yaml_values() -> None:
    words = [
        "recipe=arliss", "seed=3", "train.learning_rate=5e-4", "data.train=[a.jsonl, b.jsonl]", "train.use_margin=no",
        "data.domain_map={a: b}", "system.rank=4", "backbone=./a=b", "train.max_steps=null", "data.domain='1e5x'",
    ]  # fmt: skip
    assert parse_assignments(words) == {
        "recipe": "arliss",
        "seed": 3,
        "train": {"learning_rate": 5e-4, "use_margin": False, "max_steps": None},
        "data": {"train": ["a.jsonl", "b.jsonl"], "domain_map": {"a": "b"}, "domain": "1e5x"},
        "system": {"rank": 4},
        "backbone": "./a=b",
    }


@pytest.mark.parametrize("word", ["seed", "=3", "run.yml", ""])
def test_a_word_without_key_or_value_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is neither a CONFIG\.yaml nor key=value"):
        parse_assignments(["recipe=arliss", word])


def test_a_key_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: train has a value already"):
        parse_assignments(["train=3", "train.epochs=1"])


def test_words_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: arliss\npreset: paper\nseed: 1\ntrain:\n  epochs: 7\n  batch_size: 4\nsystem: {rank: 6}\n")
    config = resolve(merge(read_config(file), parse_assignments(["train.epochs=9", "system.dropout=0"])))
    assert (config.seed, config.train.epochs, config.train.batch_size) == (1, 9, 4)
    assert (config.system["rank"], config.system["dropout"], config.system["alpha"]) == (6, 0.0, 768.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- a", "expected keys and values at the top, got list"),
        ("", "got NoneType"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*{said}"):
        read_config(file)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_config(tmp_path / "none.yaml")


trees = st.recursive(
    st.integers(0, 9), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1), max_leaves=8
)


@given(st.dictionaries(st.sampled_from("abc"), trees), st.dictionaries(st.sampled_from("abc"), trees))
def test_merging_keeps_everything_that_is_not_overruled(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = merge(base, over)
    assert leaves(merged) | leaves(over) == leaves(merged)
    for path, value in leaves(base).items():
        overruled = any(path[: len(p)] == p or p[: len(path)] == path for p in leaves(over))
        assert overruled or leaves(merged)[path] == value


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value by its path; an empty section counts as none."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("preset", ["practical", "paper"])
def test_every_recipe_resolves_and_resolving_again_changes_nothing(name: str, preset: str) -> None:
    config = resolve({"recipe": name, "preset": preset})
    assert config.preset == preset
    again = resolve(config.model_dump(mode="json"))
    assert again == config
    stored = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert resolve(stored) == config
    assert config.tune in find_recipe(name).tunes
    assert config.train.learning_rate is not None


@pytest.mark.parametrize("name", recipe_names())
def test_the_paper_preset_deviates_in_nothing(name: str) -> None:
    assert deviations(resolve({"recipe": name, "preset": "paper"})) == []


def test_the_papers_settings_are_those_of_its_appendix() -> None:
    config = resolve({"recipe": "arliss", "preset": "paper"})
    assert (config.train.learning_rate, config.train.batch_size, config.train.epochs) == (5e-6, 32, 3)
    assert (config.system["rank"], config.system["alpha"], config.system["dropout"]) == (12, 768.0, 0.1)
    assert (config.data.max_length, config.pooling, config.tune) == (512, "own", "lora")


def test_each_deviation_is_named_with_both_values() -> None:
    config = resolve({"recipe": "arliss", "preset": "paper", "train": {"epochs": 1}, "system": {"rank": 4}})
    assert deviations(config) == [
        {"key": "system.rank", "paper": 12, "used": 4},
        {"key": "train.epochs", "paper": 3, "used": 1},
    ]


@pytest.mark.parametrize("tune", ["full", "lora", "frozen"])
def test_the_learning_rate_follows_what_learns(tune: str) -> None:
    recipe = next(name for name in recipe_names() if tune in find_recipe(name).tunes)
    assert resolve({"recipe": recipe, "tune": tune}).train.learning_rate == LEARNING_RATES[tune]
    assert resolve({"recipe": recipe, "tune": tune, "train": {"learning_rate": 1}}).train.learning_rate == 1


def test_one_path_may_stand_without_a_list() -> None:
    assert RunConfig.model_validate({"recipe": "a", "data": {"train": "x"}}).data.train == ("x",)
    assert RunConfig.model_validate({"recipe": "a", "data": {"train": ["x", "y"]}}).data.train == ("x", "y")


def test_flat_names_every_setting_by_its_dotted_key() -> None:
    flat = resolve({"recipe": "arliss", "data": {"domain_map": {"a.b": "c"}}}).flat()
    assert flat["data.domain_map"] == {"a.b": "c"}
    assert flat["train.epochs"] == 2
    assert flat["system.rank"] == 12
    assert not any(isinstance(v, dict) for k, v in flat.items() if k != "data.domain_map")
