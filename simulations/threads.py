"""Why training stays in the main thread: the same steps in the main thread and in a second one beside it.

    python simulations/threads.py --repeats 5

OpenMP keeps helpers for every thread that has computed. As soon as there are more of them than cores, all of them sleep
between any two operations instead of spinning, and small operations wait for them to wake up. Each repetition is a new
process: the main thread trains, then a thread beside it does. Writes `threads.json` to `simulations/results/threads`.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from fedsplit.model.zoo import build_model

RESULTS = Path(__file__).parent / "results" / "threads"


def train(steps: int) -> float:
    """Train the sensor network on random windows in mini-batches of 64; return seconds."""
    model = build_model("sensor-cnn", (6, 100), 7, 16, "relu")
    x, y = torch.randn(64, *model.first_layer.input_shape), torch.randint(0, 7, (64,))
    optimizer = torch.optim.Adam([*model.first_layer.layer.parameters(), *model.trunk.parameters()])
    began = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.forward(x), y).backward()
        optimizer.step()
    return time.perf_counter() - began


def both(steps: int) -> tuple[float, float]:
    """Train in the main thread, then in another one; return the seconds of each."""
    train(20)
    first = train(steps)
    with ThreadPoolExecutor(1) as beside:
        return first, beside.submit(train, steps).result()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        pairs = [processes.submit(both, arguments.steps).result() for _ in range(arguments.repeats)]
    ratio = median(second / first for first, second in pairs)
    found = {"threads": torch.get_num_threads(), "ratio": ratio, "pairs": pairs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "threads.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(
        f"{torch.get_num_threads()} threads of torch: a second thread takes {ratio:.2f} times as long as the main one"
    )


if __name__ == "__main__":
    main()
