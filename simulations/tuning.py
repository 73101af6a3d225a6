"""How many trials a search gets through with two at a time, beside one at a time; one core for a trial in both.

    python simulations/tuning.py configs/tune/wearables.toml --trials 6 --repeats 3

Searches of the trunk's learning rate alone, so that all trials are the same work, with one seed; in turns. A search's
time is that from its first trial's beginning to its last one's end: Ray's start is left out, the import of torch in its
processes is not. Writes `tuning.json` to `simulations/results/tuning`.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from fedsplit.plan.settings import Settings, load_settings
from fedsplit.tuning.study import Study

RESULTS = Path(__file__).parent / "results" / "tuning"


def trials_a_minute(settings: Settings, parallel: int) -> float:
    """Run a search and return its throughput."""
    with TemporaryDirectory() as folder:
        study = Study(settings, Path(folder) / "study", resume=False)
        study.run(parallel)
        begun = [trial.datetime_start for trial in study.trials if trial.datetime_start]
        ended = [trial.datetime_complete for trial in study.trials if trial.datetime_complete]
    return 60 * len(ended) / (max(ended) - min(begun)).total_seconds()


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    settings = load_settings(options.config)
    assert settings.tune is not None
    changes = {"trials": options.trials, "seeds": 1, "objectives": ["test_accuracy"], "constraints": {}}
    lr = settings.trunk.lr
    tune = settings.tune.model_copy(update={**changes, "space": {"trunk": {"lr": {"low": lr / 2, "high": lr}}}})
    settings = settings.model_copy(update={"tune": tune})
    pairs = []
    for _ in range(options.repeats):
        serial, parallel = (trials_a_minute(settings, n) for n in (1, options.parallel))
        pairs.append({"serial": serial, "parallel": parallel, "ratio": parallel / serial})
        print(f"trials a minute: {serial:.2f} one at a time, {parallel:.2f} with {options.parallel}")
    ratio = median(pair["ratio"] for pair in pairs)
    print(f"{options.parallel} at a time: {ratio:.2f} times the throughput (median of {len(pairs)})")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "tuning.json").write_text(json.dumps({"ratio": ratio, "pairs": pairs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
