"""What the figures were measured on: processor, versions, commit, load, and how fast the machine multiplies matrices.

python -m benchmarks.machine [--threads N]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "onnxruntime", "openvino")
ROWS, NUM_IN, NUM_OUT = 1024, 384, 1536


def describe() -> dict[str, Any]:
    """Everything about machine and code that a figure depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "load_average": os.getloadavg(),
        "gemm_gflops": _measured_peaks(),
    }


def commit() -> dict[str, Any]:
    """The commit, and whether the tree differs from it; results of earlier runs are not a difference."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs/benchmarks.md")
    return {"commit": _git("rev-parse", "--short", "HEAD"), "dirty": bool(status)}


def peaks(threads: int) -> dict[str, float]:
    """GFLOP/s of one fp32 product with MKL and with oneDNN: by CPU time for one thread, by wall time for more."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    x, weight, bias = torch.randn(ROWS, NUM_IN), torch.randn(NUM_OUT, NUM_IN), torch.randn(NUM_OUT)
    products = {"mkl": lambda: F.linear(x, weight, bias)}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    clock = time.process_time if threads == 1 else time.perf_counter
    found = {}
    for name, product in products.items():
        best = float("inf")
        for _ in range(20):
            started = clock()
            product()
            best = min(best, clock() - started)
        found[name] = round(2 * ROWS * NUM_IN * NUM_OUT / best / 1e9, 1)
    return found


def _measured_peaks() -> dict[str, dict[str, float]]:
    """In a process of its own, as the contestants have."""
    command = [sys.executable, "-m", "benchmarks.machine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    """The model's name, and its family and number where the name alone says little."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in told.get("flags", "").split()]
    return f"{told.get('model name')}, family {told.get('cpu family')} model {told.get('model')}, {' '.join(flags)}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    print(json.dumps({str(threads): peaks(threads) for threads in (1, 2)}))


if __name__ == "__main__":
    main()
