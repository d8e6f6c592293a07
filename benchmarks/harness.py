"""The harness: contestants in processes of their own, timed in turns, compared with each other and with the aims.

A *contestant* is a function that builds something and returns what one run of it is; a *case* is a few of them on
the same work, one being the *peer* that counts as 1.00; an *aim* is a share of a peer's time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from rich.console import Console

from benchmarks.machine import ROOT, commit, describe
from benchmarks.tables import aim_line, case_table
from benchmarks.worker import LONG

RESULTS = Path(__file__).parent / "results"
ROUNDS, QUICK_ROUNDS = 5, 2
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SECONDS = 0.3
"""A round repeats a run until it takes about so long, so that the clock's grain does not matter."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """`make` is `module:function`; called with `arguments` it returns a function: one run, giving its outputs.

    `needs` are packages that may be missing. `compared` False: its work is another, so its outputs are not compared.
    """

    name: str
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    compared: bool = True


@dataclass(frozen=True, kw_only=True)
class Aim:
    """`who` takes at most `share` of the time of `peer` (one thread, CPU time). `of` is the figure that is meant:
    `cpu`, or `error`, the largest relative error against the case's reference."""

    who: str
    peer: str = ""
    share: float
    of: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contestants on the same work. Times are shares of `peer`; outputs are compared with those of `reference`."""

    name: str
    contestants: Sequence[Contestant]
    peer: str
    reference: str = ""
    aims: Sequence[Aim] = ()


class Process:
    """A contestant's process, started at once and waited for when it is first spoken to."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.error = _missing(contestant)
        self.outputs: list[float] = []
        self.base_mb = 0.0
        self.peak_mb = 0.0
        self.flops = 0
        self.rounds: dict[int, list[dict[str, float]]] = {}
        if not self.error:
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, **QUIET, **contestant.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if "MOREWARD_BENCH_DEBUG" in os.environ else subprocess.DEVNULL,
                text=True,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "process"):
            _pipe(self.process.stdin).close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            _pipe(self.process.stdout).close()

    def make(self, threads: int, seconds: float) -> None:
        """Build and warm up for so many threads."""
        if self.error:
            return
        told = {"make": self.contestant.make, "arguments": dict(self.contestant.arguments)}
        answer = self._tell(do="make", threads=threads, seconds=seconds, **told)
        self.outputs = self.outputs or answer.get("outputs", [])
        self.base_mb = self.base_mb or answer.get("base_mb", 0.0)
        if answer.get("seconds", 0.0) < LONG:
            self._tell(do="round")

    def round(self, threads: int) -> None:
        answer = self._tell(do="round")
        if not self.error:
            self.rounds.setdefault(threads, []).append(answer)
            if len(self.rounds) == 1:  # memory is that of the first number of threads
                self.peak_mb = answer["peak_mb"]

    def count(self) -> None:
        """The operations of one run; what cannot count them has none."""
        failed = self.error
        self.flops = self._tell(do="count").get("flops", 0)
        self.error = failed

    def _tell(self, **told: Any) -> dict[str, Any]:
        if self.error:
            return {}
        with suppress(BrokenPipeError):  # the answer says why
            print(json.dumps(told), file=_pipe(self.process.stdin), flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = _pipe(self.process.stdout).readline()
        answer = json.loads(line) if line else {"error": f"ended with exit status {self.process.wait()}"}
        if "error" in answer:
            self.error = "failed: " + re.sub(r"/\S*/", "", answer["error"])[:300]
        return answer  # type: ignore[no-any-return]


def run_case(case: Case, *, rounds: int, threads: Sequence[int], seconds: float) -> dict[str, Any]:
    """All contestants of a case, taking turns in every round."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(c)) for c in case.contestants]
        for num_threads in threads:
            for process in processes:
                process.make(num_threads, seconds)
            for _ in range(rounds):
                for process in processes:
                    if not process.error:
                        process.round(num_threads)
        for process in processes:
            process.count()
    by_name = {p.contestant.name: p for p in processes}
    results = [_result(p, by_name[case.peer], by_name.get(case.reference or case.peer)) for p in processes]
    return {
        "case": case.name,
        "peer": case.peer,
        "reference": case.reference or case.peer,
        "contestants": results,
        "aims": [_judge(aim, by_name, results) for aim in case.aims],
    }


def _result(process: Process, peer: Process, reference: Process | None) -> dict[str, Any]:
    contestant = process.contestant
    if process.error:
        return {"name": contestant.name, "status": process.error}
    result: dict[str, Any] = {"name": contestant.name, "status": "ok"}
    for threads in process.rounds:
        clock = "cpu" if threads == 1 else "wall"
        seconds = [r[clock] for r in process.rounds[threads]]
        result[f"{clock}_{threads}"] = {**spread(seconds), "share": shares(process, peer, threads)}
    result["gflop"] = process.flops / 1e9
    result["peak_mb"] = round(process.peak_mb)
    result["own_mb"] = round(process.peak_mb - process.base_mb)
    if contestant.environment:
        result["environment"] = dict(contestant.environment)
    if contestant.compared and reference is not None and reference.outputs and reference is not process:
        result["exactness"] = exactness(process.outputs, reference.outputs)
    return result


def shares(process: Process, peer: Process, threads: int) -> dict[str, float] | None:
    """Time as a share of the peer's in the same round, over the rounds. None where the peer has no time."""
    clock = "cpu" if threads == 1 else "wall"
    theirs = peer.rounds.get(threads, [])
    if peer.error or not theirs:
        return None
    return spread([a[clock] / b[clock] for a, b in zip(process.rounds[threads], theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def exactness(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float | None]:
    """How far outputs are from those of a reference: the largest error as a share of the largest value, Kendall's
    tau, and the share of pairs that stand in another order. The last two are None below two outputs."""
    from scipy.stats import kendalltau

    if len(found) != len(wanted):
        return {"max_relative_error": math.inf, "kendall_tau": None, "flipped_pairs": None}
    largest = max(max(map(abs, wanted)), 1e-30)
    error = max(abs(a - b) for a, b in zip(found, wanted, strict=True)) / largest
    if len(found) < 2:
        return {"max_relative_error": error, "kendall_tau": None, "flipped_pairs": None}
    found, wanted = found[:512], wanted[:512]
    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    flipped = sum((found[i] - found[j]) * (wanted[i] - wanted[j]) < 0 for i, j in pairs) / len(pairs)
    tau = float(kendalltau(found, wanted).statistic)
    return {"max_relative_error": error, "kendall_tau": None if math.isnan(tau) else tau, "flipped_pairs": flipped}


def _judge(aim: Aim, processes: Mapping[str, Process], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged = {**asdict(aim), "reached": None, "met": None}
    who = processes[aim.who]
    if aim.of == "error":
        result = next(r for r in results if r["name"] == aim.who)
        reached = result.get("exactness", {}).get("max_relative_error")
    else:
        reached_spread = shares(who, processes[aim.peer], 1) if who.rounds.get(1) else None
        judged["spread"] = reached_spread
        reached = None if reached_spread is None else reached_spread["median"]
    if reached is not None:
        judged |= {"reached": reached, "met": reached <= aim.share}
    return judged


def _missing(contestant: Contestant) -> str:
    absent = [package for package in contestant.needs if find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def run(name: str, cases: Callable[[bool], Sequence[Case]], words: Sequence[str] | None = None) -> dict[str, Any]:
    """What `python -m benchmarks.NAME` does. Returns the record that it wrote."""
    options = _options(name, words)
    chosen = [case for case in cases(options.quick) if options.case in case.name]
    console = Console(width=None if sys.stdout.isatty() else 160)
    record: dict[str, Any] = {
        "benchmark": name,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "rounds": options.rounds,
        **commit(),
        "machine": describe(),
        "cases": [],
    }
    console.print(f"[bold]{name}[/bold]: {len(chosen)} cases, {options.rounds} rounds; {told(record)}", highlight=False)
    for case in chosen:
        seconds = 0.0 if options.quick else SECONDS
        result = run_case(case, rounds=options.rounds, threads=options.threads, seconds=seconds)
        record["cases"].append(result)
        console.print(case_table(result))
        for aim in result["aims"]:
            console.print("  " + aim_line(aim), highlight=False)
    record["load_average_after"] = os.getloadavg()
    if options.results is not None:
        append(record, options.results)
    return record


def told(record: Mapping[str, Any]) -> str:
    """The machine in a line."""
    machine = record["machine"]
    gemm = ", ".join(
        f"{threads} thread{'s' * (threads != '1')} " + " / ".join(f"{k} {v:.0f}" for k, v in found.items())
        for threads, found in machine["gemm_gflops"].items()
    )
    dirty = " with changes" if record["dirty"] else ""
    load = machine["load_average"][0]
    return f"{machine['cpu']}; fp32 products in GFLOP/s: {gemm}; load {load:.1f}; commit {record['commit']}{dirty}"


def append(record: Mapping[str, Any], folder: Path) -> None:
    """One JSON line to `folder`/NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record['benchmark']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _options(name: str, words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="two rounds of small shapes; nothing is written")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--threads", help="numbers of threads, default 1,2 (quick: 1)")
    parser.add_argument("--results", type=Path, help="folder of the JSON lines; 'none' writes nothing")
    options = parser.parse_args(words)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.threads = [int(n) for n in (options.threads or ("1" if options.quick else "1,2")).split(",")]
    if options.results is None and not options.quick:
        options.results = RESULTS
    if str(options.results) == "none":
        options.results = None
    return options
