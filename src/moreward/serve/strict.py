"""JSON to the letter, from strangers: what the standard decoder lets pass, or dies of, is a Fault 400."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic_core import from_json

from moreward.serve.faults import Fault

MOST_DEPTH = 64
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)


def parsed(body: bytes) -> Any:
    """The value of a request's body. Refused: what is no UTF-8 or no JSON, NaN and infinities, halves of surrogate
    pairs, more than 64 levels, integers beyond 64 bits, a key that is there twice."""
    if not body.strip():
        raise Fault(400, "empty_body", "the body is empty; send a JSON object")
    if depth(body) > MOST_DEPTH:
        raise Fault(400, "too_deep", f"more than {MOST_DEPTH} levels of brackets")
    try:
        from_json(body, allow_inf_nan=False)
        return json.loads(body, object_pairs_hook=_object, parse_int=_integer, parse_float=_number)
    except RecursionError:
        raise Fault(400, "too_deep", f"more than {MOST_DEPTH} levels of brackets") from None
    except UnicodeDecodeError as error:
        raise Fault(400, "bad_encoding", f"byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise Fault(400, "bad_json", f"not JSON: {str(error).splitlines()[0]}") from None


def depth(body: bytes) -> int:
    """Of brackets, strings left out."""
    level = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", STRING.sub(b"", body)):
        level += 1 if bracket in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Fault(400, "duplicate_key", f"key {twice[:40]!r} is there twice", param=twice)
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise Fault(400, "bad_number", f"an integer of {len(digits)} digits; use 64 bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise Fault(400, "bad_number", "a number beyond what 64 bits hold")
    return value
