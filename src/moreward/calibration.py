"""What is fitted once a run is trained: a temperature per expert, and where the prompts of each domain lie.

Kept beside a model in `model/calibration/`, sealed like it and naming the model that it was fitted for, so that it can
be fitted again without touching the model.
B pairs, P prompts, V held-out prompts, D hidden, E domains.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moreward.checkpoint import verify_folder, write_json, write_manifest
from moreward.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "calibration"
SCHEMA = 1
MIN_PAIRS = 30
"""An expert that spoke in fewer pairs gets the temperature of all pairs."""
NUM_FOLDS = 5
EVERYONE = ""
"""Where the temperature of all pairs stands among those of the experts."""

Floats = NDArray[np.float64]


# ---- probabilities ---------------------------------------------------------------------------------------------


def sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def brier_score(margin_B: Floats) -> float:
    """Mean squared error of σ(margin) as the probability that the chosen response is the better one."""
    return float((sigmoid(-margin_B) ** 2).mean())


def calibration_error(margin_B: Floats, *, num_bins: int = 10) -> float:
    """Expected calibration error of sigmoid(|margin|), the confidence in the response with the higher reward.

    Which response is called chosen is known to the data, not to the model; so each pair is judged from the side
    the model prefers, where confidence lies in [.5, 1], cut into `num_bins` equal bins. A tie is right half the time.
    """
    confidence_B = sigmoid(np.abs(margin_B))
    is_right_B = (np.sign(margin_B) + 1) / 2
    bin_B = np.minimum((confidence_B - 0.5) * 2 * num_bins, num_bins - 1).astype(np.int64)
    gap = np.abs(np.bincount(bin_B, weights=confidence_B - is_right_B))
    return float(gap.sum() / len(margin_B))


def fit_temperature(margin_B: Floats) -> float:
    """The T > 0 under which σ(margin / T) is likeliest (Guo et al., arXiv 1706.04599, section 4.2).

    Targets are Platt's (1999), (B + 1) / (B + 2) rather than 1: otherwise an expert that is right in every pair would
    be infinitely sure. T has the unit of the margins and cannot exceed 1,000 times their root mean square, which is
    where it goes for an expert that is not better than chance. Without any margin it is 1.
    """
    from scipy.optimize import minimize_scalar

    unit = float(np.sqrt(np.square(margin_B).mean())) if len(margin_B) else 0.0
    if unit == 0:
        return 1.0
    scaled_B = margin_B / unit
    target = (len(margin_B) + 1) / (len(margin_B) + 2)

    def loss(log_temperature: float) -> float:
        x_B = scaled_B / np.exp(log_temperature)
        return float((target * np.logaddexp(0, -x_B) + (1 - target) * np.logaddexp(0, x_B)).mean())

    found = minimize_scalar(loss, bounds=(-np.log(1e3), np.log(1e3)), method="bounded", options={"xatol": 1e-9})
    return unit * float(np.exp(found.x))


def fit_temperatures(margin_B: Floats, expert_B: Sequence[str]) -> dict[str, float]:
    """A temperature for all pairs, and one for each expert that spoke in at least MIN_PAIRS of them."""
    found = {EVERYONE: fit_temperature(margin_B)}
    for expert in sorted(set(expert_B) - {EVERYONE}):
        mine_B = np.array([e == expert for e in expert_B])
        if mine_B.sum() >= MIN_PAIRS:
            found[expert] = fit_temperature(margin_B[mine_B])
    return found


def tempered(margin_B: Floats, expert_B: Sequence[str], temperatures: Mapping[str, float]) -> Floats:
    """Margins over the temperature of the expert that gave them: their sigmoid is the calibrated probability."""
    temperature_B: Floats = np.array([temperatures.get(e, temperatures[EVERYONE]) for e in expert_B])
    return margin_B / temperature_B


def out_of_fold(margin_B: Floats, expert_B: Sequence[str], group_B: Sequence[str]) -> Floats:
    """Tempered margins where no pair had a part in its own temperature: groups in folds, each judged by the others.

    All groups in one fold each where there are fewer than NUM_FOLDS; with a single group, as fitted on it."""
    groups = sorted(set(group_B))
    num_folds = min(NUM_FOLDS, len(groups))
    place = {group: i % num_folds for i, group in enumerate(groups)}
    fold_B = [place[group] for group in group_B]
    result_B = np.empty_like(margin_B)
    for fold in range(num_folds):
        mine = [i for i, f in enumerate(fold_B) if f == fold]
        others = [i for i, f in enumerate(fold_B) if f != fold] or mine
        fitted = fit_temperatures(margin_B[others], [expert_B[i] for i in others])
        result_B[mine] = tempered(margin_B[mine], [expert_B[i] for i in mine], fitted)
    return result_B


def quality(margin_B: Floats) -> dict[str, float | int]:
    return {"pairs": len(margin_B), "ece": calibration_error(margin_B), "brier": brier_score(margin_B)}


def before_and_after(margin_B: Floats, tempered_B: Floats, expert_B: Sequence[str]) -> dict[str, Any]:
    """Calibration error and Brier score without and with temperatures: of all pairs and of each expert's."""
    names = sorted(set(expert_B) - {EVERYONE})
    rows = {"all": np.ones(len(margin_B), dtype=bool)}
    rows |= {name: np.array([e == name for e in expert_B]) for name in names}
    return {
        name: {"before": quality(margin_B[mine_B]), "after": quality(tempered_B[mine_B])}
        for name, mine_B in rows.items()
    }


# ---- where prompts lie -----------------------------------------------------------------------------------------


def shrunk_covariance(centred_ND: Floats) -> Floats:
    """Covariance of centred rows, drawn towards a multiple of the identity by the share that minimises its expected
    error (Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices, lemma 3.3).
    The identity where the rows do not vary at all."""
    num, size = centred_ND.shape
    sample_DD = centred_ND.T @ centred_ND / num
    unit = float(np.trace(sample_DD)) / size
    if unit == 0:
        return np.eye(size)
    away = float(np.square(sample_DD).sum()) / size - unit**2
    noise = (float(np.square(np.square(centred_ND).sum(1)).mean()) - float(np.square(sample_DD).sum())) / (size * num)
    share = min(1.0, noise / away) if away > 0 else 1.0
    shrunk_DD: Floats = (1 - share) * sample_DD
    shrunk_DD[np.diag_indices(size)] += share * unit
    return shrunk_DD


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where the prompts of each training domain lie, and how far the held-out prompts were from them.

    `whiten_DD` turns a difference of vectors into one whose length is the Mahalanobis distance; `held_out_V` rises."""

    domains: tuple[str, ...]
    means_ED: Tensor
    whiten_DD: Tensor
    held_out_V: Tensor

    def distances(self, hidden_PD: Tensor) -> Tensor:
        """`distance_PE` to the mean of every domain, over √D."""
        import torch

        whiten_DD, means_ED = (t.to(hidden_PD.device) for t in (self.whiten_DD, self.means_ED))
        # Not by products, which lose the digits of small distances.
        exact = "donot_use_mm_for_euclid_dist"
        apart_PE = torch.cdist(hidden_PD.float() @ whiten_DD, means_ED @ whiten_DD, compute_mode=exact)
        distance_PE: Tensor = apart_PE / hidden_PD.shape[-1] ** 0.5
        return distance_PE

    def share_nearer(self, distance: float) -> float:
        """The share of held-out prompts that lie strictly nearer to their nearest domain than `distance`."""
        return float(np.searchsorted(self.held_out_V.numpy(), np.float32(distance), side="left")) / len(self.held_out_V)


def fit_space(hidden_PD: Tensor, domain_P: Sequence[str], held_out_VD: Tensor) -> Space:
    """One mean per domain and one covariance shared by all, shrunk (Lee et al., arXiv 1807.03888, section 2.1, where
    it is not shrunk); the distances of held-out prompts make the scale."""
    import torch

    domains = tuple(sorted(set(domain_P)))
    place_P = np.array([domains.index(d) for d in domain_P])
    x_PD = hidden_PD.double().cpu().numpy()
    means_ED = np.stack([x_PD[place_P == e].mean(0) for e in range(len(domains))])
    cholesky_DD = np.linalg.cholesky(shrunk_covariance(x_PD - means_ED[place_P]))
    whiten_DD = np.linalg.inv(cholesky_DD).T
    means, whiten = (torch.from_numpy(np.ascontiguousarray(a)).float() for a in (means_ED, whiten_DD))
    space = Space(domains=domains, means_ED=means, whiten_DD=whiten, held_out_V=torch.zeros(0))
    held_out_V = space.distances(held_out_VD.cpu()).amin(1).sort().values
    return Space(domains=domains, means_ED=means, whiten_DD=whiten, held_out_V=held_out_V)


# ---- what is kept ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperatures by expert, the space of prompts, and a report for people."""

    temperatures: Mapping[str, float]
    space: Space
    report: Mapping[str, Any] = field(default_factory=dict)

    def temperature(self, expert: str) -> float:
        return self.temperatures.get(expert, self.temperatures[EVERYONE])


def write_calibration(model_folder: Path, calibration: Calibration, *, model: str) -> None:
    """Put it beside the model of that identity, whole or not at all; an earlier one is replaced."""
    from safetensors.torch import save_file

    temporary, target = model_folder / f".{FOLDER}-{os.getpid()}", model_folder / FOLDER
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        space = calibration.space
        tensors = {name: getattr(space, name).contiguous() for name in ("means_ED", "whiten_DD", "held_out_V")}
        save_file(tensors, temporary / "calibration.safetensors", metadata={"format": "pt"})
        told = {"temperatures": dict(calibration.temperatures), "domains": space.domains}
        write_json(temporary / "calibration.json", {"schema": SCHEMA, **told, "report": dict(calibration.report)})
        write_manifest(temporary, kind="moreward-calibration", model=model)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def calibration_faults(model_folder: Path) -> list[str]:
    """What of it is not as it was written; whether it was fitted for this model is seen when it is read."""
    folder = model_folder / FOLDER
    faults = verify_folder(folder) if folder.is_dir() else []
    return [f"{FOLDER}/{fault} (without that folder the model loads, uncalibrated)" for fault in faults]


def read_calibration(model_folder: Path, *, model: str) -> Calibration | None:
    """None where there is none. RunError where it is not as it was written or was fitted for another model."""
    from safetensors.torch import load_file

    folder = model_folder / FOLDER
    if not folder.is_dir():
        return None
    if faults := verify_folder(folder, expected={"model": model}):
        raise RunError(f"{folder}: not as it was written for this model: {'; '.join(faults)}. {how_to_get_it()}")
    told = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    if told.get("schema") != SCHEMA:
        raise RunError(f"{folder}: schema {told.get('schema')!r} is not {SCHEMA}. {how_to_get_it()}")
    space = Space(domains=tuple(told["domains"]), **load_file(folder / "calibration.safetensors"))
    return Calibration(temperatures=told["temperatures"], space=space, report=told["report"])


def how_to_get_it() -> str:
    return "Fit it on held-out pairs: moreward calibrate RUN --data PAIRS"
