"""The benchmark harness on contestants that take no time, and the page that its results are written into."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path

import pytest
from benchmarks import gpu, report
from benchmarks.harness import Aim, Case, Contestant, exactness, run, spread

ROOT = Path(__file__).resolve().parent.parent


def rewards(numbers: list[float], work: int = 1):  # type: ignore[no-untyped-def]
    """A contestant: its outputs are the numbers; its time grows with `work`."""
    return lambda: numbers if sum(range(work)) >= 0 else []


def breaks():  # type: ignore[no-untyped-def]
    raise ValueError("no such luck in /srv/somewhere/file.py")


def contestant(name: str, **more: object) -> Contestant:
    made = {"make": "tests.test_benchmarks:rewards", "arguments": {"numbers": [1.0, 2.0, 3.0]}, **more}
    return Contestant(name=name, **made)  # type: ignore[arg-type]


def cases(quick: bool) -> list[Case]:
    assert quick
    return [
        Case(
            name="nothing much",
            peer="peer",
            contestants=[
                contestant("peer", arguments={"numbers": [1.0, 2.0, 3.0], "work": 200_000}),
                contestant("ours"),
                contestant("wrong", arguments={"numbers": [1.0, 3.0, 2.0]}),
                contestant("absent", needs=("no_such_package",)),
                contestant("broken", make="tests.test_benchmarks:breaks", arguments={}),
            ],
            aims=[
                Aim(who="ours", peer="peer", share=0.5),
                Aim(who="peer", peer="ours", share=0.5),
                Aim(who="ours", share=1e-6, of="error"),
                Aim(who="wrong", share=1e-6, of="error"),
                Aim(who="absent", peer="peer", share=0.5),
            ],
        )
    ]


@pytest.mark.slow
def test_a_run_leaves_one_line_with_times_exactness_and_the_verdict_on_every_aim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("trivial", cases, ["--quick", "--results", str(tmp_path)])
    (line,) = (tmp_path / "trivial.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record["quick"]
    assert set(record["machine"]["gemm_gflops"]) == {"1", "2"}
    (case,) = record["cases"]
    found = {c["name"]: c for c in case["contestants"]}
    assert found["peer"]["cpu_1"]["share"]["median"] == 1.0
    assert found["ours"]["cpu_1"]["share"]["median"] < 0.5
    assert found["ours"]["peak_mb"] > 0
    assert found["wrong"]["exactness"]["flipped_pairs"] == pytest.approx(1 / 3)
    assert found["absent"]["status"] == "not installed: no_such_package"
    assert found["broken"]["status"] == "failed: ValueError: no such luck in file.py"
    assert [aim["met"] for aim in case["aims"]] == [True, False, True, False, None]
    shown = capsys.readouterr().out
    assert "MISSED: peer at most 0.5 of ours" in shown
    assert "not measured: absent at most 0.5 of peer" in shown


def test_exactness_counts_error_order_and_flips() -> None:
    same = exactness([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    assert same == {"max_relative_error": 0.0, "kendall_tau": pytest.approx(1.0), "flipped_pairs": 0.0}
    assert exactness([1.0, 2.0, 4.4], [1.0, 2.0, 4.0])["max_relative_error"] == pytest.approx(0.1)
    assert exactness([3.0, 2.0, 1.0], [1.0, 2.0, 3.0])["kendall_tau"] == pytest.approx(-1.0)
    assert exactness([1.0], [1.0, 2.0])["max_relative_error"] == float("inf")
    assert exactness([1.0], [1.0])["kendall_tau"] is None


def test_a_spread_of_one_round_is_that_round() -> None:
    assert set(spread([2.0]).values()) == {2.0}


@pytest.mark.slow
def test_every_contestant_of_every_benchmark_names_a_function_that_takes_its_arguments() -> None:
    import inspect

    for name in report.ORDER:
        module = import_module(f"benchmarks.{name}")
        for case in [*module.cases(True), *module.cases(False)]:
            names = [c.name for c in case.contestants]
            assert {case.peer, case.reference or case.peer} <= set(names), case.name
            assert {who for aim in case.aims for who in (aim.who, aim.peer) if who} <= set(names), case.name
            assert len(set(names)) == len(names), case.name
            for one in case.contestants:
                where, _, function = one.make.partition(":")
                inspect.signature(getattr(import_module(where), function)).bind(**one.arguments)


def test_make_bench_and_the_page_know_every_benchmark() -> None:
    with_aims = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "def cases(" in p.read_text(encoding="utf-8")}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = (row for row in makefile.splitlines() if row.startswith("BENCHMARKS ?="))
    assert set(line.partition("=")[2].split()) == with_aims == set(report.ORDER)


def test_the_page_is_what_the_recorded_results_say() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.fill(page, report.render(report.RESULTS)), "run: python -m benchmarks.report"


def test_the_page_shows_the_newest_full_run_only(tmp_path: Path) -> None:
    record = {
        "benchmark": "arliss",
        "started": "2026-01-02T00:00:00+00:00",
        "quick": False,
        "rounds": 5,
        "commit": "abc",
        "dirty": False,
        "machine": {
            "cpu": "a cpu",
            "gemm_gflops": {"1": {"mkl": 1.0}},
            "load_average": [0.1],
            "versions": {"torch": "2"},
        },
        "cases": [
            {
                "case": "a case",
                "peer": "p",
                "reference": "p",
                "contestants": [{"name": "p", "status": "not installed: p"}],
                "aims": [{"who": "o", "peer": "p", "share": 0.4, "of": "cpu", "reached": 0.3, "met": True}],
            }
        ],
    }
    rows = [{**record, "commit": "old"}, record, {**record, "quick": True, "commit": "quick"}]
    (tmp_path / "arliss.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    text = report.render(tmp_path)
    assert "- arliss, a case: met: o at most 0.4 of p; reached 0.300" in text
    assert "commit abc" in text
    assert "old" not in text
    assert "| p | not installed: p |" in text


def test_benchmarks_say_what_they_are() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name


@pytest.mark.slow
def test_the_benchmark_for_gpus_can_be_tried_out_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--quick", "--rounds", "1", "--seconds", "60", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["case"].split()[0].strip(",") for r in records] == ["ARLISS", "deberta-tiny", "qwen2-tiny"]
    assert all(r["machine"]["device"] == "cpu" and r["machine"]["versions"]["torch"] and r["quick"] for r in records)
    found = {(r["case"], c["name"]): c for r in records for c in r["contestants"]}
    assert found["deberta-tiny, 2 adapters", gpu.MIXED].pop("status") == gpu.REFUSED
    assert {c["status"] for c in found.values() if "status" in c} == {"ok"}
    assert all(c["per_second"]["median"] > 0 for c in found.values() if "status" in c)
    exact = [found[r["case"], name] for r in records[1:] for name in (gpu.ONE, gpu.HF, gpu.GROUP)]
    assert all(c["exactness"]["max_relative_error"] < 1e-5 for c in exact)
    assert "conversations/s" in capsys.readouterr().out


def test_the_benchmark_for_gpus_refuses_what_it_cannot_measure(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert gpu.main(["--device", "cpu"]) == 2
    assert "only with --quick" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "'cuda' is not there" in capsys.readouterr().err


def test_a_benchmark_out_of_time_says_so() -> None:
    import torch

    case = gpu.all_cases(quick=True, device=torch.device("cpu"))[0][2](4)
    results = gpu.run_case(case, gpu.Clock(torch.device("cpu"), 0), num_rows=4, rounds=1, seconds=0)
    assert {one["status"] for one in results} == {"not measured: out of time"}
