"""Why training stays in the main thread: the same steps in the main thread and in a second one beside it.

    python -m simulations threads --repeats 5

OpenMP keeps helpers for every thread that has computed. As soon as there are more of them than cores, all of them sleep
between any two operations instead of spinning, and small operations wait for them to wake up. Each repetition is a new
process: the main thread trains, then a thread beside it does.
"""

import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import torch

from fedsplit.model.zoo import build_model
from simulations.shared.options import option
from simulations.shared.results import Results
from simulations.shared.tables import markdown


@dataclass(frozen=True)
class Options:
    """How often, and how much."""

    repeats: int = option(5, quick=1)
    steps: int = option(500, quick=20)


def train(steps: int) -> float:
    """Train the sensor network on random windows in mini-batches of 64; return seconds."""
    model = build_model("sensor-cnn", (6, 100), 7, 16, "relu")
    x, y = torch.randn(64, *model.first_layer.input_shape), torch.randint(0, 7, (64,))
    optimizer = torch.optim.Adam([*model.first_layer.layer.parameters(), *model.trunk.parameters()])
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model.forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - began


def both(steps: int) -> tuple[float, float]:
    """Train in the main thread, then in another one; return the seconds of each."""
    train(20)
    first = train(steps)
    with ThreadPoolExecutor(1) as beside:
        return first, beside.submit(train, steps).result()


def study(options: Options) -> Results:
    """Return the seconds of both threads in each process."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        pairs = [processes.submit(both, options.steps).result() for _ in range(options.repeats)]
    return {"threads": torch.get_num_threads(), "pairs": pairs}


def tables(results: Results) -> str:
    """Return how many times as long the second thread takes."""
    ratios = [second / first for first, second in results["pairs"]]
    cells = (f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios)))
    columns = ("threads of torch", "second thread to the main one", "lowest", "highest")
    return markdown(columns, [(str(results["threads"]), *cells)])
