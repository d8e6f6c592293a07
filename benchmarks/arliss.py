"""The paper's step: five conversations of five domains, a router that reads 64 tokens, a reward over 128.

Peers: one plain model, ARLISS in PEFT (adapters switched, one by one as in the paper, and by group), RODOS.
The outputs of ours are compared with ARLISS in PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Aim, Case, Contestant, run

OURS, OURS_ONE, FLOOR, BF16 = "ours", "ours, one by one", "ours, one model", "ours, bf16"
HF, HF_ONE = "one HF model", "one HF model, one by one"
PEFT, PEFT_GROUPS, RODOS = "ARLISS in PEFT", "ARLISS in PEFT, by group", "RODOS in HF"


def cases(quick: bool) -> Sequence[Case]:
    if quick:
        return [_case("deberta-tiny", prompt=16, tokens=32)]
    return [
        _case(
            "deberta-xsmall",
            Aim(who=OURS, peer=HF, share=0.40),
            Aim(who=OURS, peer=PEFT, share=0.20),
            Aim(who=BF16, peer=HF, share=0.25),
            Aim(who=BF16, peer=PEFT, share=0.12),
        ),
        _case("minilm"),
    ]


def _case(shape: str, *aims: Aim, prompt: int = 64, tokens: int = 128) -> Case:
    told = {"shape": shape, "num": 5, "prompt": prompt, "tokens": tokens}
    one_model = {"shape": shape, "lengths": [tokens] * 5}
    return Case(
        name=f"{shape}, router {prompt} tokens, reward {tokens}",
        peer=HF,
        reference=PEFT,
        contestants=[
            Contestant(name=HF, make="benchmarks.peers:hf_step", arguments=told, compared=False),
            Contestant(
                name=HF_ONE, make="benchmarks.peers:hf_step", arguments={**told, "one_by_one": True}, compared=False
            ),
            Contestant(name=RODOS, make="benchmarks.peers:hf_rodos", arguments=told, compared=False),
            Contestant(name=PEFT, make="benchmarks.peers:peft_arliss", arguments=told, needs=("peft",)),
            Contestant(
                name=PEFT_GROUPS,
                make="benchmarks.peers:peft_arliss",
                arguments={**told, "one_by_one": False},
                needs=("peft",),
            ),
            Contestant(name=OURS, make="benchmarks.ours:arliss", arguments=told),
            Contestant(name=OURS_ONE, make="benchmarks.ours:arliss", arguments={**told, "one_by_one": True}),
            Contestant(name=BF16, make="benchmarks.ours:arliss", arguments={**told, "bf16": True}),
            Contestant(name=FLOOR, make="benchmarks.ours:texts", arguments=one_model, compared=False),
        ],
        aims=[*aims, Aim(who=OURS, share=1e-5, of="error")],
    )


if __name__ == "__main__":
    run("arliss", cases)
