"""The model card, README.md, of exported directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moreward.errors import ConfigError
from moreward.scoring import Scorer

LIBRARIES = {"moreward-peft": "peft", "moreward-onnx": "onnx"}


LOADED = {
    "moreward-merged": (
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()",
    ),
    "moreward-peft": (
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)",
        "model.config.pad_token_id = tokenizer.pad_token_id",
        "model = PeftModel.from_pretrained(model, folder).eval()",
    ),
    "moreward-hf": (
        "import moreward  # or trust_remote_code=True below, where modeling_moreward.py lies beside this file",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()",
    ),
    "moreward-onnx": (
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")',
        'session = onnxruntime.InferenceSession(folder + "/model.onnx")',
    ),
}
"""How a directory of a kind is loaded; `folder` is its path, `base` that of the pretrained model."""


def read_evaluation(file: Path, model: str) -> dict[str, Any]:
    """The evaluation in what `moreward eval --json` printed of the run whose model has the hash `model`. ConfigError
    where the file holds none, or that of another model."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        told = whole["evaluation"]
        for measures in (*told["domains"].values(), told["macro"]):
            float(measures["accuracy"]), int(measures["num_pairs"]), float(measures["interval"]["low"])
        run, found = str(whole["run"]["folder"]), str(whole["run"]["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--evaluation: {file} is not what `moreward eval RUN --data FILE --json` prints ({type(error).__name__}: "
            f"{error}). Write its output into a file and give that."
        ) from error
    if found != model:
        raise ConfigError(
            f"--evaluation: {file} is of another model ({run}, {found[:12]}…) than the one exported ({model[:12]}…). "
            "Evaluate this run with `moreward eval RUN --data FILE --json`."
        )
    return dict(told)


def write_card(
    folder: Path, scorer: Scorer, kind: str, expert: str, evaluation: dict[str, Any] | None, offset: float = 0.0
) -> None:
    """README.md: what the directory is, how it is loaded, what number the reward is, and how good the run was, with
    intervals, where that was measured. `offset` is what must be added to the logit."""
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
        f"({', '.join(scorer.card['domains'])}). {_reward_words(offset)}",
        *(["The router is not in this directory: whatever the prompt, this expert judges."] if expert else []),
        f"Texts have at most {scorer.encoder.max_length} tokens. `moreward.json` holds golden rewards.",
        "",
        "## Loading",
        "",
        "```python",
        *LOADED[kind],
        "```",
        "",
        _text_words(scorer, kind),
        "",
        "## Evaluation",
        "",
        *_evaluation_lines(evaluation, expert),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _reward_words(offset: float) -> str:
    if not offset:
        return "The one logit is the reward, higher is better; never squash it."
    return (
        f"The reward is the one logit plus {offset:.9g} (`offset` in `moreward.json`; a decoder's head has no bias to "
        "hold it), higher is better; never squash it. Without the offset the order of responses is the same."
    )


def _text_words(scorer: Scorer, kind: str) -> str:
    """How a text is given."""
    if scorer.encoder.joins_pairs:
        prompt = ", and the prompt alone beside it where the graph asks for it" if kind == "moreward-onnx" else ""
        return f"Give prompt and response as a pair of texts{prompt}."
    if kind == "moreward-hf":
        return "Write the token `<|moreward_prompt_end|>` between prompt and response; it is taken out again."
    return "Give prompt and response as one text that ends with the end token."


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
