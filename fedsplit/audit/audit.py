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

from fedsplit.audit.attacks import decoder, lmmse, map_qp, wiener
from fedsplit.audit.evidence import Evidence, GradientGroup, equations, released
from fedsplit.audit.gradient_attacks import gradient_conv, gradient_dense, negative_control
from fedsplit.audit.prior import Labels, Prior
from fedsplit.audit.scores import summarise
from fedsplit.common.arrays import IntArray
from fedsplit.data import Records
from fedsplit.guard.criterion import coordinates
from fedsplit.model.kinds.base import double
from fedsplit.model.layer import FirstLayer

Array = NDArray[np.float64]
CONTROL = 60.0  # dB that the negative control must reach
_LARGEST_GRADIENT = 4e8  # elements of the equations that the gradient attack may hold


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


def audit(evidence: Evidence, *, seed: int, quick: bool = False) -> Audit:
    """Attack what was released of the targets, with all standard attacks.

    Parameters
    ----------
    evidence : Evidence
    seed : int
        Equal seeds, equal figures.
    quick : bool
        Fewer targets and no constrained search: for tuning.
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
    found, skipped = reconstructions(evidence, prior, targets, labels, seed=seed, quick=quick)
    guesses = {**baselines, **found}
    score = _scorer(evidence, public, count)
    scores = {name: score(x, guess) for name, guess in guesses.items()}
    attacks = {name: s for name, s in scores.items() if name not in baselines}
    strongest = max(attacks or scores, key=lambda name: scores[name]["psnr"])
    report = {
        "targets": count,
        "candidates": len(subjects.candidates),
        "public": {"records": len(public), "stand_in": subjects.stand_in},
        "peak": peak_of(subjects.public),
        "criterion": _criterion(evidence, targets),
        "baselines": {name: scores[name] for name in baselines},
        "attacks": attacks,
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


def reconstructions(
    evidence: Evidence, prior: Prior, targets: IntArray, labels: Labels, *, seed: int, quick: bool
) -> tuple[dict[str, Array], dict[str, str]]:
    """Run every attack on the targets.

    Parameters
    ----------
    evidence : Evidence
        Everything that left.
    prior : Prior
        What is known before any release.
    targets : int array (targets,)
        Which of the evidence's subjects are attacked.
    labels : int array (targets,), optional
    seed : int
        Equal seeds, equal guesses.
    quick : bool
        Without the constrained search.

    Returns
    -------
    dict of str to float64 array (targets, n)
        What each attack makes of the targets.
    dict of str to str
        Why the other attacks had nothing to go by.
    """
    guesses: dict[str, Array] = {}
    skipped: dict[str, str] = {}
    for name, attack in _attacks(quick).items():
        found = attack(evidence, prior, targets, labels, seed)
        if isinstance(found, str):
            skipped[name] = found
        else:
            guesses[name] = prior.clip(found)
    return guesses, skipped


def peak_of(public: Records) -> float:
    """Return the range of records' numbers, against which a PSNR is told."""
    return 1.0 if _box(public.x) else float(public.x.max() - public.x.min())


def _attacks(quick: bool) -> dict[str, Callable[..., Array | str]]:
    slow = {} if quick else {"constrained": _constrained}
    return {
        "Wiener": _wiener,
        **slow,
        "linear, with label": _lmmse,
        "decoder, with label": _decoder,
        "gradient": _gradient,
    }


def _wiener(evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int) -> Array | str:
    known = equations(evidence, targets)
    if not any(len(r) for r in known.rhs):
        return "no equations were released"
    return wiener(prior, labels, known.rows, known.rhs, known.noise)


def _constrained(evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int) -> Array | str:
    known = equations(evidence, targets)
    if not known.any:
        return "neither equations nor inequalities were released"
    return map_qp(prior, labels, known.rows, known.rhs, known.noise, known.inequalities)


def _features(evidence: Evidence, targets: IntArray, seed: int) -> tuple[Array, Array] | None:
    """Return (public, targets') releases under the weights of the targets' last release."""
    last = [seen for seen in evidence.seen if len(np.unique(seen.targets))]
    if not last:
        return None
    width = evidence.layer.width
    own, theirs = np.zeros((len(targets), width)), {}
    for seen in last:
        mine = seen.targets < len(targets)
        own[seen.targets[mine]] = seen.values[mine]
        theirs[seen.weights.tobytes()] = seen.weights
    weights = last[-1].weights
    x = evidence.subjects.public.x
    _, values = released(evidence.layer, evidence.dropping, evidence.dtype, weights, x, seed)
    return values.astype(np.float64), own


def _lmmse(evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int) -> Array | str:
    return _learned(evidence, prior, targets, labels, seed, lmmse)


def _decoder(evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int) -> Array | str:
    def attack(*args: Any) -> Array:
        return decoder(*args, seed=seed)

    return _learned(evidence, prior, targets, labels, seed, attack)


def _learned(
    evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int, attack: Callable[..., Array]
) -> Array | str:
    features = _features(evidence, targets, seed)
    if features is None:
        return "nothing was released"
    public = evidence.subjects.public
    known = public.y if labels is not None else None
    return attack(prior, (features[0], public.x.reshape(len(public.x), -1), known), features[1], labels)


def _gradient(evidence: Evidence, prior: Prior, targets: IntArray, labels: Any, seed: int) -> Array | str:
    if not evidence.groups:
        return "no first-layer gradients were released"
    n = int(np.prod(evidence.layer.input_shape))
    guess = np.broadcast_to(prior.mean, (len(targets), n)).copy()
    reached = 0
    for group in evidence.groups:
        places = np.flatnonzero((group.places >= 0) & (group.places < len(targets)))
        found = _group(evidence, prior, group, None if labels is None else group.labels)
        if found is not None and len(places):
            guess[group.places[places]] = found[places]
            reached += len(places)
    if not reached:
        return "the sums are over more records than this attack can hold"
    return guess


def _group(evidence: Evidence, prior: Prior, group: GradientGroup, labels: Any) -> Array | None:
    """Solve one group's sums for all its records; None if they are too many."""
    kind, shape, records = evidence.layer.kind, evidence.layer.cut_shape, len(group.places)
    deltas = [double(d).reshape(records, *shape) for d in group.deltas]
    pairs = zip(group.sums, deltas, strict=True)
    sums = [kind.of_records(double(total), delta).numpy() for total, delta in pairs]
    if kind.dense and len(shape) == 1:
        return gradient_dense(prior, labels, group.deltas, [total.reshape(shape[0], -1) for total in sums])
    n = int(np.prod(evidence.layer.input_shape))
    if records * n * sum(map(len, sums)) > _LARGEST_GRADIENT:
        return None

    def operator(i: int) -> Array:
        return np.concatenate([kind.operator(d[i]).numpy() for d in deltas], axis=1)

    return gradient_conv(prior, labels, operator, np.concatenate(sums), records)


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
