"""The audit: what real attacks make of what left the devices, next to what anyone could guess.

Every figure is a lower bound on what leaks. Before anything is believed, the attacks must bring back records from a
raw gradient (the negative control).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.audit.attack import Attack, Problem, guesses_of
from fedsplit.audit.evidence import Evidence
from fedsplit.audit.gradient_attacks import negative_control
from fedsplit.audit.prior import Labels, Prior
from fedsplit.audit.scores import summarise
from fedsplit.audit.standard import STANDARD
from fedsplit.common.arrays import IntArray
from fedsplit.data import Records
from fedsplit.guard.criterion import coordinates
from fedsplit.model.layer import FirstLayer

Array = NDArray[np.float64]
CONTROL = 60.0  # dB that the negative control must reach


@dataclass(frozen=True)
class Audit:
    """An audit's figures, and the reconstructions behind them.

    Attributes
    ----------
    report : dict
        Plain numbers and strings, as written to ``audit.json``.
    guesses : dict of float64 arrays (targets, n)
        By attack; the baselines too.
    """

    report: dict[str, Any]
    guesses: dict[str, Array]


def audit(evidence: Evidence, *, seed: int, quick: bool = False, more: Sequence[Attack] = ()) -> Audit:
    """Attack what was released of the targets, with all standard attacks and others.

    Parameters
    ----------
    evidence : Evidence
    seed : int
        Equal seeds, equal figures.
    quick : bool
        Fewer targets, and no attack that is slow, as the constrained search: for tuning.
    more : sequence of Attack
        Somebody's own attacks.
    """
    began = time.process_time()
    subjects = evidence.subjects
    count = min(len(subjects.x), 48) if quick else len(subjects.x)
    targets = np.arange(count)
    labels = subjects.y[:count] if subjects.y.ndim == 1 and subjects.y.dtype.kind == "i" else None
    x = subjects.x[:count].reshape(count, -1).astype(np.float64)
    public = subjects.public.x.reshape(len(subjects.public.x), -1)
    prior = known_before(subjects.public, 0 if labels is None else int(max(labels.max(), subjects.public.y.max())) + 1)
    baselines = without_releases(prior, labels, count)
    attacks = [attack for attack in (*STANDARD, *more) if not (quick and attack.slow)]
    found, skipped = reconstructions(Problem.of(evidence, prior, targets, labels, seed), attacks)
    guesses = {**baselines, **found}
    score = _scorer(evidence, public, count)
    scores = {name: score(x, guess) for name, guess in guesses.items()}
    scored = {name: s for name, s in scores.items() if name not in baselines}
    strongest = max(scored or scores, key=lambda name: scores[name]["psnr"])
    report = {
        "targets": count,
        "candidates": len(subjects.candidates),
        "public": {"records": len(public), "stand_in": subjects.stand_in},
        "peak": peak_of(subjects.public),
        "criterion": _criterion(evidence, targets),
        "baselines": {name: scores[name] for name in baselines},
        "attacks": scored,
        "skipped": skipped,
        "strongest": {"attack": strongest, **scores[strongest]},
        "control": _control(evidence, seed),
        "seed": seed,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return Audit(report, guesses)


def known_before(public: Records, classes: int) -> Prior:
    """Return what public records tell before any release; with ``classes`` 0 their labels are not looked at."""
    x = public.x.reshape(len(public.x), -1)
    return Prior.of(x, public.y if classes else None, _box(x), classes)


def without_releases(prior: Prior, labels: Labels, count: int) -> dict[str, Array]:
    """Return the best guesses without any release, by name.

    Parameters
    ----------
    prior : Prior
    labels : int array (count,), optional
        The targets' labels. Without them there is no mean of a class.
    count : int
        The number of targets.

    Returns
    -------
    dict of str to float64 array (count, n)
    """
    guesses = {"mean": np.broadcast_to(prior.mean, (count, len(prior.mean)))}
    return guesses if labels is None else {**guesses, "class mean": prior.means[labels]}


def reconstructions(problem: Problem, attacks: Sequence[Attack]) -> tuple[dict[str, Array], dict[str, str]]:
    """Run attacks.

    Returns
    -------
    dict of str to float64 array (targets, n)
        What each attack makes of the targets.
    dict of str to str
        Why the other attacks had nothing to go by.

    Raises
    ------
    ConfigError
        If an attack of somebody's own fails.
    """
    guesses: dict[str, Array] = {}
    skipped: dict[str, str] = {}
    for attack in attacks:
        found = guesses_of(attack, problem)
        if isinstance(found, str):
            skipped[attack.name] = found
        else:
            guesses[attack.name] = found
    return guesses, skipped


def peak_of(public: Records) -> float:
    """Return the range of records' numbers, against which a PSNR is told."""
    return 1.0 if _box(public.x) else float(public.x.max() - public.x.min())


def _criterion(evidence: Evidence, targets: IntArray) -> dict[str, Any]:
    """Return the exact criterion over all releases of the targets together."""
    layer, n = evidence.layer, int(np.prod(evidence.layer.input_shape))
    stacked = []
    for seen in evidence.seen if evidence.dropping.code.exact else ():
        pattern = np.zeros((len(targets), layer.width), dtype=bool)
        mine = seen.targets < len(targets)
        pattern[seen.targets[mine]] = seen.pattern[mine]
        stacked.append((evidence.map(seen.weights), pattern))
    releases = np.bincount(np.concatenate([s.targets for s in evidence.seen] or [targets[:0]]), minlength=len(targets))
    figures: dict[str, Any] = {"numbers": n, "releases_max": int(releases.max(initial=0))}
    if not stacked:
        none = dict.fromkeys(("equations_max", "rank_max", "leverage_max", "leverage_mean", "determined"), 0)
        return figures | none
    found = coordinates(stacked)
    return figures | {
        "equations_max": int(found.equations.max()),
        "rank_max": int(found.rank.max()),
        "leverage_max": float(found.largest.max()),
        "leverage_mean": float(found.mean.mean()),
        "determined": float(found.determined.mean()),
    }


def _control(evidence: Evidence, seed: int) -> dict[str, Any]:
    """Attack a raw gradient that decides its records: over 16 of them, or 2 for a convolution.

    A narrow layer's gradient does not, nor that of a convolution whose strides skip numbers: a wide layer of the same
    kind stands in for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, count = evidence.layer.kind.control(len(evidence.subjects.x))
        control = FirstLayer(module, nn.ReLU(), evidence.layer.input_shape)
    records = evidence.subjects.x[:count]
    found = negative_control(control, control.initial_weights(), records, seed)
    return {"records": len(records), "psnr": float(found), "holds": bool(found > CONTROL)}


def _is_image(evidence: Evidence) -> bool:
    return len(evidence.layer.input_shape) == 3


def _box(public: NDArray[np.floating[Any]]) -> tuple[float, float] | None:
    """Return 0..1 for what looks like images; None leaves the public records' own range, number by number."""
    return (0.0, 1.0) if public.min() >= 0 and public.max() <= 1 else None


def _scorer(
    evidence: Evidence, public: NDArray[np.floating[Any]], count: int
) -> Callable[[Array, Array], dict[str, Any]]:
    subjects = evidence.subjects
    candidates = subjects.candidates.reshape(len(subjects.candidates), -1)
    shape = evidence.layer.input_shape
    image: Sequence[int] | None = shape if _is_image(evidence) else None

    def score(x: Array, guess: Array) -> dict[str, Any]:
        return summarise(
            x,
            guess,
            peak=peak_of(subjects.public),
            variance=public.var(axis=0),
            truth_index=subjects.place[:count],
            candidates=candidates,
            image_shape=image,  # type: ignore[arg-type]
        )

    return score
