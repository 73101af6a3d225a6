"""Slow, obvious versions of what fedsplit computes, in plain torch autograd, to compare with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsplit.common.seeds import seed_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.release.streams import record_order, simulation_secret
from fedsplit.server.batches import minibatches

Chunk = tuple[Tensor, Tensor]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def chunks(settings: Settings) -> list[Chunk]:
    """The records of every round in canonical order (device, record)."""
    source, seed, size = Experiment(settings).source, settings.run.seed, settings.protocol.chunk
    rounds = []
    for number in range(settings.run.rounds):
        xs, ys = [], []
        for device in range(source.count):
            records = source.device(device).train
            n = len(records)
            index = np.arange(n)
            if size == "spread":
                start, stop = n * number // settings.run.rounds, n * (number + 1) // settings.run.rounds
                index = np.sort(record_order(simulation_secret(seed, device), 0, n)[start:stop])
            elif size != "epoch":
                pieces = -(-n // size)
                order = record_order(simulation_secret(seed, device), number // pieces, n)
                index = np.sort(order[number % pieces * size :][:size])
            xs.append(records.x[index])
            ys.append(records.y[index])
        rounds.append((torch.from_numpy(np.concatenate(xs)), torch.from_numpy(np.concatenate(ys))))
    return rounds


def batch_order(settings: Settings, number: int, count: int) -> list[np.ndarray]:
    """The mini-batches that the trunk sees in the only pass of a round."""
    rng = np.random.default_rng(seed_of(settings.run.seed, "order", number, 0))
    return list(minibatches(rng.permutation(count), settings.protocol.batch_size))


def centralised(settings: Settings) -> dict[str, Tensor]:
    """Plain SGD of the whole network: one step per round on the round's records."""
    model = Experiment(settings).model
    net = nn.ModuleDict({"first": model.first_layer.layer, "trunk": model.trunk})
    optimizer = torch.optim.SGD(
        [
            {"params": net["first"].parameters(), "lr": settings.first_layer.lr},
            {"params": net["trunk"].parameters(), "lr": settings.trunk.lr},
        ]
    )
    for x, y in chunks(settings):
        optimizer.zero_grad()
        (loss_of(model.forward(x), y) / len(x)).backward()
        optimizer.step()
    return dict(net.state_dict())


def delayed(settings: Settings, *, replay: bool = False) -> dict[str, Tensor]:
    """Pipelined training: gradients of the first layer are applied one round late; with replay, single-pass.

    The trunk takes several mini-batch steps in a round, all on activations of the round's first layer.
    """
    model = Experiment(settings).model
    first, trunk = model.first_layer, model.trunk
    weights = [p.detach().clone() for p in first.layer.parameters()]
    optimizer = torch.optim.SGD(trunk.parameters(), lr=settings.trunk.lr)
    late: list[Tensor] | None = None
    stored: list[Chunk] = []
    names = [n for n, _ in first.layer.named_parameters()]
    for number, (x, y) in enumerate(chunks(settings), start=1):
        used = dict(zip(names, [w.clone().requires_grad_() for w in weights], strict=True))
        targets = torch.cat([*[t for _, t in stored], y])
        sums = [torch.zeros_like(w) for w in weights]
        for rows in batch_order(settings, number, len(targets)):
            cut = first.activation(torch.func.functional_call(first.layer, used, (x,)))
            features = torch.cat([*[a for a, _ in stored], cut])[rows]
            loss = loss_of(trunk(features), targets[rows])
            optimizer.zero_grad()
            for w in used.values():
                w.grad = None
            (loss / len(rows)).backward()
            optimizer.step()
            for total, w in zip(sums, used.values(), strict=True):
                total += w.grad * len(rows)
        if replay:
            stored.append((cut.detach(), y))
        if late is not None:
            weights = [w - settings.first_layer.lr * g for w, g in zip(weights, late, strict=True)]
        late = [total / len(x) for total in sums]
    weights = [w - settings.first_layer.lr * g for w, g in zip(weights, late or [], strict=True)]
    result = {f"first.{n}": w for n, w in zip(names, weights, strict=True)}
    return result | {f"trunk.{k}": v for k, v in trunk.state_dict().items()}


def trained(folder: Path) -> dict[str, Tensor]:
    """All parameters that a run ended with."""
    first = load_file(folder / "checkpoint" / "first_layer.safetensors")
    trunk = load_file(folder / "checkpoint" / "trunk.safetensors")
    return {f"first.{k}": v for k, v in first.items()} | {f"trunk.{k}": v for k, v in trunk.items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def moved(settings: Settings, parameters: dict[str, Tensor], prefixes: Sequence[str] = ("first.", "trunk.")) -> float:
    """How far each half moved from its initial weights, the lesser of both: a test of equality must not be empty."""
    model = Experiment(settings).model
    start = {f"first.{k}": v for k, v in model.first_layer.layer.state_dict().items()}
    start |= {f"trunk.{k}": v for k, v in model.trunk.state_dict().items()}
    return min(
        max(float((parameters[k] - v).abs().max()) for k, v in start.items() if k.startswith(p)) for p in prefixes
    )
