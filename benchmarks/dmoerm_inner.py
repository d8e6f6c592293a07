"""DMoERM's inner experts: five adapters judge every text. Peer: PEFT, one adapter after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Aim, Case, Contestant, run

PEFT, OURS = "PEFT, one after another", "ours, one call"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", 2, 16)]
    return [_case("minilm", 1, 128), _case("minilm", 8, 128), _case("deberta-xsmall", 8, 128)]


def _case(shape: str, rows: int, tokens: int) -> Case:
    told: dict[str, Any] = {"shape": shape, "num_experts": 5, "num_rows": rows, "tokens": tokens}
    return Case(
        name=f"{shape}, 5 experts, batch {rows}, {tokens} tokens",
        peer=PEFT,
        contestants=[
            Contestant(name=PEFT, make="benchmarks.peers:peft_dmoerm", arguments=told, needs=("peft",)),
            Contestant(name=OURS, make="benchmarks.ours:dmoerm", arguments=told),
        ],
        aims=[Aim(who=OURS, share=1e-5, of="error"), Aim(who=OURS, peer=PEFT, share=0.38)],
    )


if __name__ == "__main__":
    run("dmoerm_inner", cases)
