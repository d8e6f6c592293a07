"""The list of reason codes is whole: the code raises no other, and the documentation explains each."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import moreward.data
from moreward.data.reasons import CAPABILITY, CODES, FAULTS, MESSAGE_FATES, NOT_BAD

PACKAGE = Path(moreward.data.__file__).parent
PAGE = PACKAGE.parents[2] / "docs" / "data.md"
REASON_AT = {"RowError": 0, "_Fault": 0, "Finding": 0, "BadRow": 2, "_refuse": 2, "_refused": 1, "Quarantined": 3}
"""Which argument of these calls is the reason."""


def texts(node: ast.AST) -> Iterator[str]:
    """The strings that an expression may be; `empty_{name}` is that of both responses."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            assert ast.unparse(part) == "f'empty_{name}'"
            yield from ("empty_chosen", "empty_rejected")
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value not in ("", "empty_"):
            yield part.value


def reasons_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in REASON_AT and len(node.args) > REASON_AT[name]:
                yield from texts(node.args[REASON_AT[name]])
            if name == "append" and ast.unparse(node.func) == "self._noted.append":
                yield from texts(node.args[0].elts[0])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("code", "reason", "(reason, detail)"):
            value = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
            choices = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            yield from (text for choice in choices for text in texts(choice))
        elif isinstance(node, ast.FunctionDef) and node.name == "_fate":
            yield from (t for r in ast.walk(node) if isinstance(r, ast.Return) for t in texts(r.value))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_code_is_used_that_the_list_lacks(path: Path) -> None:
    assert set(reasons_in(ast.parse(path.read_text(encoding="utf-8")))) - CODES == set()


def test_the_search_finds_the_codes_it_should() -> None:
    found = {code for path in PACKAGE.glob("*.py") for code in reasons_in(ast.parse(path.read_text(encoding="utf-8")))}
    assert {"bad_json", "duplicate_key", "bad_csv", "empty_chosen", "too_long", "duplicate", "broken_context"} <= found
    assert set(FAULTS) - found == set(), "a code that nothing raises"
    assert {"duplicate", "identical", "tie", CAPABILITY} == NOT_BAD - set(MESSAGE_FATES)


def test_the_documentation_names_every_code() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Rows that cannot be used")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", section))
    assert CODES - named == set()
