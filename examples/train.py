"""Train a mixture and a single model of its budget, and test one against the other.

    python examples/train.py 'prefs/*.jsonl' --test 'test/*.jsonl' --out runs/example

Every domain in the data gets an expert; a file's name is its domain unless its rows say otherwise.
"""

import argparse
from pathlib import Path

import moreward
from moreward.data.load import load_preferences
from moreward.data.split import linked_groups
from moreward.evals.compare import compare
from moreward.evals.run import evaluate_run
from moreward.report import render_evaluation
from moreward.train.runner import train

RANK = 12


def train_both(data: list[str], backbone: str, out: Path) -> tuple[Path, Path]:
    """A mixture of adapters, and one adapter with as many parameters at the same scale alpha / rank."""
    shared = {"backbone": backbone, "seed": 0, "data": {"train": data}}
    mixture = train(
        {**shared, "recipe": "arliss", "out": str(out / "mixture"), "system": {"rank": RANK, "alpha": 2.0 * RANK}}
    )
    num_adapters = len(moreward.load(mixture).domains) + 1  # one per domain and the router's
    rank = RANK * num_adapters
    single = train(
        {**shared, "recipe": "base_lora", "out": str(out / "single"), "system": {"rank": rank, "alpha": 2.0 * rank}}
    )
    return mixture, single


def test_against(mixture: Path, single: Path, data: list[str]) -> str:
    """The report that `moreward eval MIXTURE --baseline SINGLE` prints."""
    preferences = load_preferences(data).preferences
    results = {
        name: evaluate_run(moreward.load(run), preferences) for name, run in [("mixture", mixture), ("single", single)]
    }
    kept = results["mixture"].preferences
    comparison = compare(
        {name: result.correct for name, result in results.items()},
        linked_groups(kept),
        [p.domain for p in kept],
        baseline="single",
    )
    return render_evaluation(results["mixture"].evaluation, results["mixture"].routing, comparison)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="training pairs: files, folders or globs")
    parser.add_argument("--test", nargs="+", required=True, help="pairs that training does not see")
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    asked = parser.parse_args()
    mixture, single = train_both(asked.data, asked.backbone, asked.out)
    print(test_against(mixture, single, asked.test))


if __name__ == "__main__":
    main()
