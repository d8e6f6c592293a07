"""Write pairs and ratings with a known answer, for trying ArmoRM: `python examples/ratings.py FOLDER`.

The built-in generator knows the level, 0 to 3, of six capabilities of every response: they are the ratings. A tenth of
them is left out, as nobody rates everything.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from moreward.data.synthetic import generate_splits
from moreward.types import Preference


def rated_rows(pairs: list[Preference]) -> list[dict[str, object]]:
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    for pair in pairs:
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            levels = pair.meta[f"capabilities_{side}"]
            ratings = {name: None if rng.random() < 0.1 else level for name, level in levels.items()}
            rows.append({"prompt": pair.prompt, "response": response, "ratings": ratings, "scale": [0, 3]})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=120, help="training pairs of each domain")
    told = parser.parse_args()
    sides = generate_splits(told.pairs, 0, told.pairs // 2)
    for name, pairs in (("pairs", sides["train"]), ("test", sides["test"])):
        rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "domain": p.domain} for p in pairs]
        write(told.folder / f"{name}.jsonl", rows)
    write(told.folder / "ratings.jsonl", rated_rows(sides["train"]))


if __name__ == "__main__":
    main()
