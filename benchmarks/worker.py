"""A process that holds one contestant and does as it is told, one JSON line at a time on stdin and stdout.

{"do": "make", "make": "module:function", "arguments": {...}, "threads": 1, "seconds": 0.2}
    builds the contestant, warms it up, and answers with its outputs and the seconds that a round takes
{"do": "round"}
    answers with CPU and wall seconds of one run, the mean of the round's repeats
{"do": "count"}
    answers with the floating-point operations of the matrix products of one run; none where torch does not see them
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TextIO

MAX_REPEATS = 50
MAX_OUTPUTS = 4096
LONG = 3.0
"""Seconds; a run that takes longer has warmed itself up."""


class Worker:
    def __init__(self) -> None:
        self.run: Callable[[], Any] = list
        self.repeats = 1

    def make(self, told: dict[str, Any]) -> dict[str, Any]:
        name, _, function = told["make"].partition(":")
        module = import_module(name)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(told["threads"])
        base_mb = peak_mb()
        self.run = list  # the contestant made before goes before the next one comes
        self.run = getattr(module, function)(**told["arguments"])
        first, outputs = self._timed()
        once = self._timed()[0] if first < LONG else first
        self.repeats = min(max(math.ceil(told["seconds"] / max(once, 1e-6)), 1), MAX_REPEATS)
        return {"outputs": _numbers(outputs), "seconds": once * self.repeats, "base_mb": base_mb}

    def _timed(self) -> tuple[float, Any]:
        started = time.perf_counter()
        outputs = self.run()
        return time.perf_counter() - started, outputs

    def round(self, _told: dict[str, Any]) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.repeats):
            self.run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu / self.repeats, "wall": wall / self.repeats, "peak_mb": peak_mb()}

    def count(self, _told: dict[str, Any]) -> dict[str, Any]:
        """Counted by torch's own counter, to which CPU attention and oneDNN's linear layer are made known."""
        if "torch" not in sys.modules:
            return {"flops": 0}
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        known = {
            torch.ops.mkldnn._linear_pointwise: _linear_flops,
            attention: _attention_flops,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        }
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            self.run()
        return {"flops": counter.get_total_flops()}


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Both products of attention, as if nothing were masked."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward_flops(_grad: Any, query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Five products, the first of which is the forward's again."""
    return 10 * math.prod(query) * key[-2]


def peak_mb() -> float:
    """The largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _numbers(output: Any) -> list[float]:
    """A tensor or a sequence of numbers as plain floats, at most so many as are worth comparing."""
    flat = output.detach().flatten() if hasattr(output, "detach") else output
    return [float(value) for value in flat[:MAX_OUTPUTS]]


def serve(answers: TextIO) -> None:
    worker = Worker()
    for line in sys.stdin:
        told = json.loads(line)
        try:
            answer = getattr(worker, told["do"])(told)
        except Exception as error:  # noqa: BLE001  a peer that fails is a result like any other
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    # Libraries print; the answers keep the old stdout to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    serve(answers)


if __name__ == "__main__":
    main()
