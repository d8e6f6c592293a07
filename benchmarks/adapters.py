"""Many adapters on one model: 5, 20 and 100 of them, batches of 1, 8 and 64 rows, 32 and 128 tokens, rank 12.

Every run draws other adapters for its rows. Peers: PEFT's `set_adapter` before every row or every group of rows of
one adapter, and its `adapter_names`; our own engine without adapters is the floor. Then how the time grows with the
number of adapters, with rows of all of them and with rows of the same five, and with the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

SAMPLE, GROUP, MIXED = "PEFT set_adapter per sample", "PEFT set_adapter per group", "PEFT adapter_names"
OURS, FLOOR, HF = "ours", "ours, no adapters", "HF, no adapters"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", 5, 4, 16), _growth("deberta-tiny", 4, 16, numbers=(2, 5))]
    grid = [_case("minilm", n, b, t) for n in (5, 20, 100) for t in (32, 128) for b in (1, 8, 64)]
    deberta = [_case("deberta-xsmall", 5, 8, t) for t in (32, 128)]
    growth = [_growth("minilm", 8, 32), _growth("minilm", 64, 32), _growth("minilm", 64, 128)]
    return [*grid, *deberta, *growth, _ranks("minilm", 8, 128)]


def _case(shape: str, num: int, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_adapters": num, "num_rows": rows, "tokens": tokens}
    return Case(
        name=f"{shape}, {num} adapters, batch {rows}, {tokens} tokens",
        peer=HF,
        reference=SAMPLE,
        contestants=[
            Contestant(
                name=HF,
                make="benchmarks.peers:peft",
                arguments={**told, "how": "none", "num_adapters": 1},
                compared=False,
            ),
            _peft(SAMPLE, "sample", told),
            _peft(GROUP, "group", told),
            _peft(MIXED, "mixed", told),
            Contestant(name=OURS, make="benchmarks.ours:adapters", arguments=told),
            Contestant(
                name=FLOOR, make="benchmarks.ours:adapters", arguments={**told, "num_adapters": 0}, compared=False
            ),
        ],
        aims=_aims(shape, num, rows, tokens),
    )


def _peft(name: str, how: str, told: dict[str, Any]) -> Contestant:
    return Contestant(name=name, make="benchmarks.peers:peft", arguments={**told, "how": how}, needs=("peft",))


def _aims(shape: str, num: int, rows: int, tokens: int) -> list[Aim]:
    """Unmerged is the laxer of the two aims against our own engine; which of them applies is the engine's choice."""
    aims = [Aim(who=OURS, share=1e-5, of="error"), Aim(who=OURS, peer=FLOOR, share=1.12)]
    if (shape, num, rows, tokens) == ("minilm", 5, 64, 128):
        aims += [Aim(who=OURS, peer=MIXED, share=0.33), Aim(who=OURS, peer=SAMPLE, share=0.17)]
        aims.append(Aim(who=OURS, peer=FLOOR, share=1.05))
    if shape == "minilm" and num == 100 and tokens == 32:
        aims += [Aim(who=OURS, peer=SAMPLE, share=0.10)]
    return aims


def _growth(shape: str, rows: int, tokens: int, numbers: Sequence[int] = (5, 20, 100)) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_rows": rows, "tokens": tokens}
    first, *more = numbers
    contestants = [_ours(f"ours, {first} adapters", {**told, "num_adapters": first})]
    for num in more:
        contestants.append(_ours(f"ours, {num} adapters", {**told, "num_adapters": num}))
        contestants.append(_ours(f"ours, {num} adapters, {first} used", {**told, "num_adapters": num, "used": first}))
    last = numbers[-1]
    return Case(
        name=f"growth with the adapters: {shape}, batch {rows}, {tokens} tokens",
        peer=f"ours, {first} adapters",
        contestants=contestants,
        aims=[
            Aim(who=f"ours, {last} adapters", peer=f"ours, {first} adapters", share=1.05),
            Aim(who=f"ours, {last} adapters, {first} used", peer=f"ours, {first} adapters", share=1.05),
        ],
    )


def _ranks(shape: str, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_rows": rows, "tokens": tokens, "num_adapters": 5}
    return Case(
        name=f"growth with the rank: {shape}, 5 adapters, batch {rows}, {tokens} tokens",
        peer="ours, rank 4",
        contestants=[_ours(f"ours, rank {rank}", {**told, "rank": rank}) for rank in (4, 12, 32, 64)],
    )


def _ours(name: str, told: dict[str, Any]) -> Contestant:
    return Contestant(name=name, make="benchmarks.ours:adapters", arguments=told, compared=False)


if __name__ == "__main__":
    run("adapters", cases)
