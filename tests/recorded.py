"""What several tests of data build."""

from pathlib import Path
from typing import Any

import edfio
import numpy as np

from fedsplit.data.recordings import Channel, Recording

RATE = 100.0
XY = [Channel("ax", "g"), Channel("ay", "g")]
NUMBERS = {"rest": 0, "walk": 1}


def waves(seconds: float = 10.0, rate: float = RATE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return times and two channels of slow waves and noise."""
    times = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    phases = 2 * np.pi * np.outer([1.5, 0.7], times) + rng.uniform(0, 6, (2, 1))
    return times, np.sin(phases) + 0.1 * rng.normal(size=(2, len(times)))


def write_csv(path: Path, columns: dict[str, Any], separator: str = ",") -> Path:
    rows = [separator.join(columns), *(separator.join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def table(seconds: float = 10.0, rate: float = RATE, seed: int = 0) -> dict[str, Any]:
    times, (ax, ay) = waves(seconds, rate, seed)
    return {"time": times, "ax": ax, "ay": ay, "label": np.where(times % 4 < 2, "rest", "walk")}


def write_edf(path: Path, signals: list[tuple[str, str, float, np.ndarray]], **settings: Any) -> Path:
    """Write signals (label, unit, rate, values)."""
    kind, file = (edfio.BdfSignal, edfio.Bdf) if path.suffix == ".bdf" else (edfio.EdfSignal, edfio.Edf)
    made = [kind(v, sampling_frequency=r, label=n, physical_dimension=u) for n, u, r, v in signals]
    file(made, **settings).write(path)
    return path


def made(samples: int, labels: list[int] | None = None, rate: float = 1.0) -> Recording:
    values = np.arange(2.0 * samples, dtype=np.float32).reshape(2, samples)
    return Recording(Path("a.csv"), values, rate, None if labels is None else np.array(labels, np.int16))


RECIPE_TABLE = {
    "channels": ["ax", "ay"],
    "units": ["g", "g"],
    "rate": 100.0,
    "seconds": 1.0,
    "stride": 0.5,
    "classes": ["rest", "walk"],
}


def windows_command(folder: Path, out: str = "out", *recordings: str) -> list[Any]:
    paths = [folder / name for name in recordings] or sorted(p for p in folder.iterdir() if p.suffix == ".csv")
    what = ["--channel", "ax=g", "--channel", "ay=g", "--class", "rest", "--class", "walk"]
    return ["windows", *paths, "--out", folder / out, *what, "--rate", 100, "--seconds", 1, "--stride", 0.5]
