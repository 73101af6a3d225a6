"""The measures of forecasts, over seeds and pigs, and their table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.shared.results import Results
from simulations.shared.statistics import between, by
from simulations.shared.tables import markdown, page

PRIVATE, LINEAR = "private: 8 units", "ridge"
REDRAWN = 5000  # times that pigs are drawn with replacement
COLUMNS = ("", "RMSE", "R²", "pigs", "below ridge", "better on", "PSNR", "identified", "error")
Float = NDArray[np.float64]
Row = dict[str, Any]


class Pigs:
    """Squared errors of all ways to forecast, by window and by pig.

    Attributes
    ----------
    squares : dict of arrays (seeds, windows)
    each : dict of arrays (seeds, pigs)
        Means over a pig's windows.
    variance : float
        Of what was to be forecast.
    """

    def __init__(self, rows: Sequence[Row], truth: Sequence[float], whose: Sequence[int]) -> None:
        target, owners = np.array(truth), np.array(whose)
        self.squares: dict[str, Float] = {
            name: np.square(np.array([row["forecast"] for row in mine]) - target)
            for (name,), mine in by(rows, "name").items()
        }
        pigs, self._counts = np.unique(owners, return_counts=True)
        self.each: dict[str, Float] = {
            name: np.stack([found[:, owners == pig].mean(axis=1) for pig in pigs], axis=1)
            for name, found in self.squares.items()
        }
        self.variance = float(target.var())
        self._drawn = np.random.default_rng(0).integers(len(pigs), size=(REDRAWN, len(pigs)))

    def gain(self, name: str) -> tuple[float, float, float]:
        """Return by how much the RMSE is below the linear model's, and its interval over pigs drawn again."""
        gains = self._redrawn(LINEAR) - self._redrawn(name)
        low, high = np.percentile(gains, [2.5, 97.5])
        gain = np.sqrt(self.squares[LINEAR].mean()) - np.sqrt(self.squares[name].mean())
        return float(gain), float(low), float(high)

    def better(self, name: str) -> int:
        """Return on how many pigs the error is less than the linear model's."""
        return int((self.each[name].mean(axis=0) < self.each[LINEAR].mean(axis=0)).sum())

    def _redrawn(self, name: str) -> Float:
        """Return the RMSE of all windows of the pigs drawn, for each time that they are."""
        each, drawn = self.each[name].mean(axis=0), self._drawn
        return np.asarray(np.sqrt((each * self._counts)[drawn].sum(axis=1) / self._counts[drawn].sum(axis=1)))


def summary(rows: Sequence[Row], truth: Sequence[float], whose: Sequence[int]) -> list[Row]:
    """Return the measures of each way to forecast: lists are over seeds."""
    pigs = Pigs(rows, truth, whose)
    found = []
    for name, squares in pigs.squares.items():
        leaks = [row["leak"] for row in rows if row["name"] == name and row["leak"]]
        gain, *interval = pigs.gain(name)
        found.append(
            {
                "name": name,
                "rmse": np.sqrt(squares.mean(axis=1)).tolist(),
                "r2": (1 - squares.mean(axis=1) / pigs.variance).tolist(),
                "pigs": np.percentile(np.sqrt(pigs.each[name].mean(axis=0)), [10, 90]).tolist(),
                "gain": gain,
                "gain_interval": tuple(interval),
                "better": pigs.better(name),
                **{key: float(np.mean([leak[key] for leak in leaks])) for key in (leaks[0] if leaks else ())},
            }
        )
    return found


def tables(results: Results) -> str:
    """Return the measures of each way to forecast, and what is known without any release."""
    truth, whose = results["truth"], results["whose"]
    rows = summary(results["rows"], truth, whose)
    title = f"{len(truth)} windows of {len(set(whose))} pigs"
    return page(markdown(COLUMNS, map(_cells, rows), title), _said(rows, float(np.std(truth))))


def _cells(row: Row) -> list[str]:
    low, high = row["gain_interval"]
    cells = [
        row["name"],
        between(row["rmse"]),
        between(row["r2"]),
        "{:.2f}–{:.2f}".format(*row["pigs"]),  # noqa: RUF001
        *([f"{row['gain']:+.2f} ({low:+.2f}..{high:+.2f})", str(row["better"])] if row["name"] != LINEAR else ["", ""]),
    ]
    if "psnr" in row:
        cells += [f"{row['psnr']:.1f}", f"{row['identified']:.2f}", f"{row['error']:.2f}"]
    return cells


def _said(rows: Sequence[Row], deviation: float) -> str:
    private = next(row for row in rows if row["name"] == PRIVATE)
    alone = np.sqrt(1 - private["donors_alone_r2"]) * deviation
    return (
        f"Without any release: PSNR {private['psnr_mean']:.1f}, error {private['error_mean']:.2f}; "
        f"donors alone: RMSE {alone:.3f}, R² {private['donors_alone_r2']:.3f}."
    )
