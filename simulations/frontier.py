"""Accuracy against the strongest attack, for every policy family and two published defences.

    python simulations/frontier.py configs/mnist-private.toml --seeds 3

The network learns from public and private records together, dropping as the policy does, and every private record is
released once under the final weights: what one release gives away. The attacker knows the public records. One half of
the targets chooses the recommended policy, the other half is reported. Writes a table, `frontier.json` and
`frontier.png` to `simulations/results/frontier`.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from fedsplit.audit.attacks import decoder, lmmse, map_qp
from fedsplit.audit.audit import audit
from fedsplit.audit.evidence import rehearsed, released
from fedsplit.audit.prior import Prior
from fedsplit.audit.scores import summarise
from fedsplit.audit.transcript import Subjects
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records, Source
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks.base import Task
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, load_settings
from fedsplit.server.trunk import Trunk, TrunkOptions
from fedsplit.server.warmup import WarmUp, public_release, warm_up

RESULTS = Path(__file__).parent / "results" / "frontier"
EPOCHS = 30
PAPER = "random"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a policy's settings, or a published defence."""

    family: str
    name: str
    settings: tuple[str, ...]
    penalty: float = 0.0
    projection: int = 0
    binarised: bool = False


def _entries() -> list[Entry]:
    def entry(family: str, name: str, policy: str, budget: str, width: int, penalty: float = 0.0) -> Entry:
        return Entry(family, name, (f"dropping.policy={policy}", budget, f"model.width={width}"), penalty)

    rows = [
        entry(PAPER, f"random {keep} of 256", "random", f"dropping.keep={keep}", 256)
        for keep in (0.5, 0.35, 0.25, 0.15)
    ]
    for penalty in (0.0, 0.3):
        more = f" + penalty {penalty}" if penalty else ""
        rows += [entry("top-k", f"top-{k} of 256{more}", "top-k", f"dropping.k={k}", 256, penalty) for k in (12, 6, 4)]
        rows += [entry("units", f"{m} units{more}", "units", f"dropping.k={m}", m, penalty) for m in (32, 16, 8)]
        rows += [entry("bits", f"1 bit of {m}{more}", "bits", "dropping.bits=1", m, penalty) for m in (128, 64, 32)]
    rows.append(entry("bits", "2 bits of 32", "bits", "dropping.bits=2", 32))
    noisy = ("dropping.policy=units", "dropping.k=32", "model.width=32", "dropping.clip=4.0", "dropping.noise=0.1")
    rows.append(Entry("noise", "32 units + noise 0.1", noisy))
    everything = ("dropping.policy=none", "model.width=256")
    rows += [Entry("LightSplit", f"projection to {k} of 256", everything, projection=k) for k in (32, 16, 8)]
    bits = ("dropping.policy=bits", "dropping.bits=1", "model.width=64")
    rows.append(Entry("B-SL", "binarised layer of 64", bits, binarised=True))
    return rows


class Projection(nn.Module):
    """LightSplit (Cihangiroglu et al. 2026, arXiv 2605.13265): outputs pass through a fixed orthonormal projection.

    What is sent are ``components`` numbers; the server lifts them back to the width of the layer.
    """

    def __init__(self, width: int, components: int, seed: int) -> None:
        super().__init__()
        random = torch.randn(width, components, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("basis", torch.linalg.qr(random)[0])

    def forward(self, outputs: Tensor) -> Tensor:
        """Return what the trunk sees of ``outputs`` ``(batch, width)``."""
        return outputs @ self.basis @ self.basis.T


def _measure(path: str, entry: Entry, seed: int, targets: int) -> dict[str, Any]:
    """Train and attack one entry; return accuracy and scores on both halves of the targets."""
    torch.set_num_threads(1)
    base = load_settings(path)
    raw = [f"run.seed={seed}", *entry.settings]
    settings = _with_policy(path, base, raw)
    experiment = Experiment(settings)
    source, model = experiment.source, experiment.model
    public = experiment.public
    assert public is not None and settings.public is not None
    subjects = Subjects.choose(source, public, settings.donors, 2 * targets, seed)
    everything, test = _pooled(source, public, settings.donors)
    policy = experiment.policy
    if entry.projection:
        projected = Projection(model.first_layer.width, entry.projection, seed)
        model = replace(model, trunk=nn.Sequential(projected, model.trunk))
    options = WarmUp(EPOCHS, settings.public.lr, settings.protocol.batch_size, entry.penalty)
    if entry.binarised:
        _train_binarised(model, everything, source.task, options, seed)
    else:
        warm_up(model, everything, source.task, policy, options, seed)
    dtype = settings.protocol.dtype
    tested = _trunk(model, source, seed).evaluate(public_release(model, test, policy, dtype, seed))
    halves = [_part(subjects, slice(0, targets)), _part(subjects, slice(targets, None))]
    if entry.projection:
        basis = model.trunk[0].basis.numpy()  # type: ignore[index]
        found = [_attack_projection(model, settings, half, basis, seed) for half in halves]
    else:
        seen = [rehearsed(model.first_layer, policy, dtype, half, seed) for half in halves]
        found = [audit(evidence, seed=seed).report["strongest"] for evidence in seen]
    return {"accuracy": tested["test_accuracy"], "chosen_on": found[0], "reported": found[1]}


def _with_policy(path: str, base: Settings, overrides: Sequence[str]) -> Settings:
    """Return the settings with another policy in place of theirs."""
    from fedsplit.plan.settings import check_settings

    raw = base.model_dump(by_alias=True, exclude_none=True)
    raw["dropping"] = {}
    for override in overrides:
        key, value = override.split("=")
        section, name = key.split(".")
        raw[section][name] = value if name == "policy" else json.loads(value)
    return check_settings(raw)


def _pooled(source: Source, public: Records, donors: tuple[int, ...]) -> tuple[Records, Records]:
    train = [source.device(d).train for d in range(source.count) if d not in donors]
    parts = [public, *(r for r in train if len(r))]
    tests = [source.device(d).test for d in source.test_devices]
    pooled = [Records(np.concatenate([r.x for r in p]), np.concatenate([r.y for r in p])) for p in (parts, tests)]
    return pooled[0], pooled[1]


def _trunk(model: SplitModel, source: Source, seed: int) -> Trunk:
    options = TrunkOptions("adam", 1e-3, 0.0, 0.0, "constant", 64, 1)
    return Trunk(model.trunk, model.first_layer.cut_shape, source.task, source.outputs, options, 1, seed)


def _part(subjects: Subjects, rows: slice) -> Subjects:
    chosen = {name: getattr(subjects, name)[rows] for name in ("x", "y", "device", "index", "place")}
    return replace(subjects, **chosen)


def _attack_projection(
    model: SplitModel, settings: Settings, subjects: Subjects, basis: Any, seed: int
) -> dict[str, float | None]:
    """Attack projected outputs, which are no equations in the record: with what learns from public records."""
    layer = model.first_layer
    weights = layer.flatten(layer.initial_weights())
    policy, dtype, public = Experiment(settings).policy, settings.protocol.dtype, subjects.public
    known, own = (released(layer, policy, dtype, weights, x, seed)[1] @ basis for x in (public.x, subjects.x))
    flat = public.x.reshape(len(public.x), -1)
    prior = Prior.of(flat, public.y, (0.0, 1.0))
    features = (known, flat, public.y)
    guesses = [lmmse(prior, features, own, subjects.y), decoder(prior, features, own, subjects.y, seed=seed)]
    matrix, bias = layer.unrolled().detach().numpy(), layer.outputs(torch.zeros(1, *layer.input_shape)).detach().numpy()
    guesses.append(_linearised(prior, subjects.y, matrix, bias[0], basis, own, prior.clip(guesses[0])))
    scores = [
        summarise(
            subjects.x.reshape(len(subjects.x), -1),
            prior.clip(guess),
            peak=1.0,
            variance=flat.var(axis=0),
            truth_index=subjects.place,
            candidates=subjects.candidates.reshape(len(subjects.candidates), -1),
            image_shape=subjects.x.shape[1:],
        )
        for guess in guesses
    ]
    return max(scores, key=lambda s: s["psnr"] or 0.0)


def _linearised(prior: Prior, labels: Any, matrix: Any, bias: Any, basis: Any, sent: Any, guess: Any) -> Any:
    """Search for records that give what was sent: constrained least squares on the layer made linear at each guess."""
    for _ in range(10):
        pre = guess @ matrix.T + bias  # (targets, width)
        rows = [(basis.T * (z > 0)) @ matrix for z in pre]
        rhs = [s - basis.T @ np.maximum(z, 0) + r @ x for s, z, r, x in zip(sent, pre, rows, guess, strict=True)]
        noise = [np.full(len(r), 0.02 * float(np.std(sent))) for r in rhs]
        guess = (guess + map_qp(prior, labels, rows, rhs, noise)) / 2  # half steps: the active units change on the way
    return guess


def _train_binarised(model: SplitModel, records: Records, task: Task, options: WarmUp, seed: int) -> None:
    """Train with weights of one sign each and one-bit outputs (B-SL, Pham et al. 2022, arXiv 2206.04864)."""
    layer = model.first_layer.layer
    assert isinstance(layer, nn.Linear)
    optimizer = torch.optim.Adam([*layer.parameters(), *model.trunk.parameters()], options.lr)
    x, y = torch.from_numpy(records.x).flatten(1), torch.from_numpy(records.y)

    def binary() -> Tensor:
        scale = layer.weight.abs().mean(dim=1, keepdim=True)
        return layer.weight + (layer.weight.sign() * scale - layer.weight).detach()

    for epoch in range(options.epochs):
        order = np.random.default_rng(seed_of(seed, "binarised", epoch)).permutation(len(x))
        for rows in np.array_split(order, max(1, len(x) // options.batch_size)):
            outputs = torch.relu(nn.functional.linear(x[rows], binary(), layer.bias))
            sent = outputs + ((outputs > 0).float() - outputs).detach()
            loss = task.loss(model.trunk(sent), y[rows]) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * layer.weight.abs().mean(dim=1, keepdim=True))


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = []
    for name in names:
        mine = [row for row in rows if row["name"] == name]

        def mean(half: str, key: str, mine: list[dict[str, Any]] = mine) -> float:
            return float(np.mean([row[half][key] for row in mine]))

        found.append(
            {
                "name": name,
                "family": mine[0]["family"],
                "accuracy": float(np.mean([row["accuracy"] for row in mine])),
                "accuracy_std": float(np.std([row["accuracy"] for row in mine])),
                "chosen_on_psnr": mean("chosen_on", "psnr"),
                **{key: mean("reported", key) for key in ("psnr", "psnr_p95", "ssim", "identification")},
            }
        )
    return found


def _recommended(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose, on the first half of the targets, what is furthest below random dropping at its accuracy."""
    paper = sorted((r["accuracy"], r["chosen_on_psnr"], r["psnr"]) for r in rows if r["family"] == PAPER)
    accuracies, chosen_on, reported = (np.array(column) for column in zip(*paper, strict=True))
    inside = [r for r in rows if r["family"] not in (PAPER, "LightSplit", "B-SL") and r["accuracy"] >= accuracies[0]]
    best = max(inside, key=lambda r: np.interp(r["accuracy"], accuracies, chosen_on) - r["chosen_on_psnr"])
    gap = float(np.interp(best["accuracy"], accuracies, reported)) - best["psnr"]
    return {"name": best["name"], "accuracy": best["accuracy"], "psnr": best["psnr"], "below_random": gap}


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("policy", "accuracy", "strongest PSNR", "95th percentile", "SSIM", "identified"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for r in rows:
        figures = (r["psnr"], r["psnr_p95"], r["ssim"], r["identification"])
        table.add_row(r["name"], f"{r['accuracy']:.3f} ± {r['accuracy_std']:.3f}", *(f"{f:.3f}" for f in figures))
    return table


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for family in dict.fromkeys(r["family"] for r in rows):
        mine = [r for r in rows if r["family"] == family]
        axis.plot([r["psnr"] for r in mine], [r["accuracy"] for r in mine], "o", label=family)
    for r in rows:
        axis.annotate(r["name"], (r["psnr"], r["accuracy"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="strongest attack, PSNR (dB): less is better", ylabel="test accuracy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure all entries, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="settings with [public] and an mlp model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=int, default=100, help="in each half")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(entry, seed) for seed in range(arguments.seeds) for entry in _entries()]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_measure, arguments.config, entry, seed, arguments.targets) for entry, seed in jobs]
        found = [f.result() for f in track(futures, "training and attacking", console=Console(stderr=True))]
    raw = [{"name": e.name, "family": e.family, "seed": s, **r} for (e, s), r in zip(jobs, found, strict=True)]
    rows = _summary(raw)
    best = _recommended(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows, "recommended": best, "raw": raw}, indent=2)
    (RESULTS / "frontier.json").write_text(text + "\n", encoding="utf-8")
    _plot(rows, RESULTS / "frontier.png")
    console = Console(width=120)
    console.print(_table(rows, f"one release, {arguments.seeds} seeds, {arguments.targets} targets"))
    console.print(
        f"recommended (chosen on the other targets): {best['name']}, accuracy {best['accuracy']:.3f}, "
        f"{best['psnr']:.2f} dB, {best['below_random']:.2f} dB below random dropping at equal accuracy"
    )


if __name__ == "__main__":
    main()
