"""The model card, README.md, of exported directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moreward.errors import ConfigError
from moreward.scoring import Scorer

LIBRARIES = {"moreward-peft": "peft", "moreward-onnx": "onnx"}


def read_evaluation(file: Path) -> dict[str, Any]:
    """The evaluation in what `moreward eval --json` printed. ConfigError where the file holds none."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["evaluation"]
        for measures in (*told["domains"].values(), told["macro"]):
            float(measures["accuracy"]), int(measures["num_pairs"]), float(measures["interval"]["low"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--evaluation: {file} is not what `moreward eval RUN --data FILE --json` prints ({type(error).__name__}: "
            f"{error}). Write its output into a file and give that."
        ) from error
    return dict(told)


def write_card(folder: Path, scorer: Scorer, kind: str, expert: str, evaluation: dict[str, Any] | None) -> None:
    """README.md: what the directory is, and how good the run was, with intervals, where that was measured."""
    what = f"the expert `{expert}` of" if expert else "all of"
    lines = [
        "---",
        f"library_name: {LIBRARIES.get(kind, 'transformers')}",
        "pipeline_tag: text-classification",
        "tags:",
        "- reward-model",
        "- moreward",
        f"- {kind}",
        "---",
        "",
        f"# {expert or scorer.card['recipe']}: a reward model",
        "",
        f"Written by moreward: {what} a run of the recipe `{scorer.card['recipe']}` "
        f"({', '.join(scorer.card['domains'])}). The one logit is the reward, higher is better; never squash it.",
        f"Texts have at most {scorer.encoder.max_length} tokens. `moreward.json` holds golden rewards.",
        "",
        "## Evaluation",
        "",
        *_evaluation_lines(evaluation, expert),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _evaluation_lines(evaluation: dict[str, Any] | None, expert: str) -> list[str]:
    if evaluation is None:
        return ["None was given when this directory was written: how good it is, is not known here."]
    rows = [*evaluation["domains"].items(), ("mean of domains", evaluation["macro"])]
    whose = "of the whole run, not of this expert alone" if expert else "of this model"
    return [
        f"Held-out pairs, accuracy {whose}:",
        "",
        "| domain | pairs | accuracy | 95 % interval |",
        "|---|---|---|---|",
        *(
            f"| {name.replace('|', '/')} | {m['num_pairs']} | {100 * m['accuracy']:.1f} | "
            f"{100 * m['interval']['low']:.1f} to {100 * m['interval']['high']:.1f} |"
            for name, m in rows
        ),
    ]
