"""What holds of the repository as a whole: what is tracked, what imports what, what the package may not do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "moreward"
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "tokenizers", "accelerate", "scipy", "pyarrow", "datasets", "peft")
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Spelt in two parts, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:" + "|".join(("work", "tmp", "root", "home", "Users")) + r")/\w")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def run_python(code: str, *, cwd: Path = ROOT, source: Path = ROOT / "src") -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds moreward in `source`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def heavy_after(code: str) -> list[str]:
    """The heavy packages that are loaded once `code` has run."""
    listing = run_python(f"{code}\nimport sys\nprint('\\n', *(set({HEAVY!r}) & set(sys.modules)))")
    assert listing.returncode == 0, listing.stderr
    return sorted(listing.stdout.splitlines()[-1].split())


def test_no_tracked_file_is_over_a_megabyte(tracked: list[Path]) -> None:
    assert [str(path.relative_to(ROOT)) for path in tracked if path.stat().st_size > 1_000_000] == []


def test_no_tracked_file_names_a_path_of_one_machine(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("name", ["work", "tmp", "root", "home", "Users"])
def test_machine_paths_are_told_from_addresses(name: str) -> None:
    assert MACHINE_PATH.search(f"see '/{name}/someone'")
    assert not MACHINE_PATH.search(f"see https://example.org/{name}/page")
    assert not MACHINE_PATH.search(f"see docs/{name}/page")


def unsafe_uses(tree: ast.Module) -> Iterator[str]:
    """Whatever unpickles: the modules that do, `torch.load`, and `allow_pickle=True`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (f"import {a.name}" for a in names if a.name.split(".")[0] in UNSAFE_IMPORTS)
            case ast.ImportFrom(module="torch", names=names):
                yield from (f"from torch import {a.name}" for a in names if a.name == "load")
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE_IMPORTS:
                yield f"from {module} import ..."
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                yield "allow_pickle=True"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_says_what_it_is_and_never_unpickles(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    assert list(unsafe_uses(tree)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, dill",
        "from joblib import load",
        "from torch import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unpickling_would_be_seen(code: str) -> None:
    assert list(unsafe_uses(ast.parse(code)))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_after("import moreward, moreward.types, moreward.errors") == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from moreward.cli import main\n"
        "sys.argv = ['moreward', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert heavy_after(code) == []


def test_heavy_packages_would_be_seen() -> None:
    assert heavy_after("import scipy") == ["scipy"]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys\nfrom importlinter.cli import lint_imports\nsys.exit(lint_imports(no_cache=True, no_logo=True))"
    return run_python(code, cwd=root, source=root / "src")


def test_imports_point_one_way_without_cycles() -> None:
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("contract", "file", "line"),
    [
        ("Imports point one way", "errors.py", "import moreward.systems"),
        ("No import cycles", "planted_a.py", "import moreward.planted_b"),
        ("Recipes do not import each other", "systems/planted_a.py", "import moreward.systems.planted_b"),
    ],
)
def test_a_planted_import_breaks_its_contract(contract: str, file: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src" / "moreward"
    (package / "planted_b.py").write_text("import moreward.planted_a\n")
    (package / "planted_a.py").write_text("")
    (package / "systems" / "planted_b.py").write_text("")
    with (package / file).open("a") as target:
        target.write(f"\n{line}\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1
    assert f"{contract} BROKEN" in checked.stdout


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def package_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_dependency_has_a_floor_and_an_exact_version_to_test_with() -> None:
    settings = project()
    wanted = [*settings["dependencies"], *chain(*settings["optional-dependencies"].values())]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))
    names = {package_name(requirement) for requirement in wanted} - {"moreward"}
    assert names - pinned.keys() == set()
    for requirement in settings["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[\d.]+", requirement), f"{requirement}: a floor and nothing else"


def test_the_console_script_leads_to_the_command_line() -> None:
    module, function = project()["scripts"]["moreward"].split(":")
    assert find_spec(module), f"{module} does not exist"
    assert run_python(f"from {module} import {function}; assert callable({function})").returncode == 0


def test_the_changelog_starts_with_what_is_not_yet_released() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


def test_every_make_target_says_what_it_does() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split()
    assert sorted(re.findall(r"^([a-z]+):.*## .+$", makefile, re.MULTILINE)) == sorted(phony)


def test_continuous_integration_runs_only_what_the_readme_tells() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert commands
    assert [command for command in commands if command not in readme] == []


def test_the_site_lists_the_pages_that_exist() -> None:
    pages = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert "start.md" in pages
    assert [page for page in pages if not (ROOT / "docs" / page).is_file()] == []
