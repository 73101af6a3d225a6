"""From recordings to a folder with an .npz file for each device, which ``[data] folder`` reads, and their recipe."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.data.formats import Layout
from fedsplit.data.recipe import RECIPE, Recipe
from fedsplit.data.recordings import READERS, Recording
from fedsplit.data.windows import Windows


@dataclass(frozen=True)
class Owner:
    """A future device: its name, which orders devices, and the files of its recordings."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class HeldOut:
    """What is kept to test with: the last ``share`` of every recording, or those ``files`` whose names match."""

    share: float = 0.0
    files: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ConfigError(f"--test-share must be at least 0 and below 1, got {self.share:g}")
        if self.share and self.files is not None:
            raise ConfigError("give either --test-share or --test-files")

    def border(self, recording: Recording) -> int:
        """Return the first sample that is not for training."""
        if self.files is not None:
            return 0 if fnmatch(recording.path.name, self.files) else recording.samples
        return recording.samples - round(recording.samples * self.share)


@dataclass(frozen=True)
class Prepared:
    """How many windows a device's recordings gave, and how many were left out, by reason."""

    name: str
    recordings: int
    seconds: float
    train: Counter[int]
    test: Counter[int]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def windows(self) -> Counter[int]:
        """The numbers of windows by label, of train and test together."""
        return self.train + self.test


def find_owners(paths: Sequence[Path]) -> list[Owner]:
    """Return the devices of some recordings, in the order of their names: each path is one, a file or a folder of them.

    Raises
    ------
    DataError
        If there is no such file, a folder has none, or two devices would have one name.
    """
    owners = sorted((_owner(path) for path in paths), key=lambda owner: f"{owner.name}.npz")
    for one, other in pairwise(owners):
        if one.name == other.name:
            raise DataError(f"{one.files[0]} and {other.files[0]} would both be device {one.name!r}: rename one")
    return owners


def _owner(path: Path) -> Owner:
    if not path.is_dir():
        return Owner(path.stem, (path,))
    files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in READERS))
    if not files:
        raise DataError(f"{path}: holds no recordings ({', '.join(READERS)})")
    return Owner(path.resolve().name, files)


def measure(recipe: Recipe, donors: Sequence[Owner], layout: Layout, test: HeldOut) -> Recipe:
    """Measure the constants of a recipe on what donors train with. Everybody will know these constants.

    Parameters
    ----------
    recipe : Recipe
        Without constants.
    donors : sequence of Owner
    layout : Layout
        Of all files.
    test : HeldOut
        What it holds out is not measured.

    Returns
    -------
    Recipe
        With constants.

    Raises
    ------
    DataError
        If a recording cannot be used, or a channel is constant.
    """
    recordings = (recipe.read(file, layout) for donor in donors for file in donor.files)
    return recipe.measured([recording.values[:, : test.border(recording)] for recording in recordings])


def prepare(
    recipe: Recipe, owners: Sequence[Owner], out: Path, layout: Layout, test: HeldOut, *, all_labels: bool
) -> list[Prepared]:
    """Write a folder of records, whole or not at all.

    Parameters
    ----------
    recipe : Recipe
        With constants.
    owners : sequence of Owner
    out : Path
        A folder that is not there, or empty.
    layout : Layout
        Of all files.
    test : HeldOut
        No window is on both sides of its border.
    all_labels : bool
        Whether every class must occur, on some device. Without, a device of its own may lack some: but where labels
        are normal and anomalous, each needs something normal.

    Raises
    ------
    ConfigError
        If the folder holds something, or cannot be written.
    DataError
        If a recording cannot be used, or no window of it is left.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: must be a new or an empty folder")
    if test.files and not any(fnmatch(file.name, test.files) for owner in owners for file in owner.files):
        raise ConfigError(f"--test-files {test.files}: no recording has such a name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            (unfinished / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
            done = [_prepare(recipe, owner, unfinished, layout, test) for owner in owners]
            _check_labels(recipe, done, layout, all_labels)
            unfinished.replace(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
    return done


def _prepare(recipe: Recipe, owner: Owner, out: Path, layout: Layout, test: HeldOut) -> Prepared:
    train, tested, seconds, left = [], [], 0.0, Counter[str]()
    for recording, windows in _numbered(recipe, owner, layout):
        parts = windows.split(test.border(recording))
        train.append(parts[0])
        tested.append(parts[1])
        seconds += recording.samples / recording.rate
        left += Counter({**windows.left_out, "border": len(windows) - len(parts[0]) - len(parts[1])})
    if recipe.recordings is not None:
        left["anomalous"] = sum(int((part.y > 0).sum()) for part in train if part.y is not None)
        train = [part.take(part.y == 0) if part.y is not None else part for part in train]
    arrays = _arrays(train, "") | _arrays(tested, "_test")
    if not arrays:
        raise DataError(f"{owner.files[0]}: no window is left, to train or to test with ({_said(left)})")
    labels = {y: arrays.get(y, np.zeros(len(arrays.get(x, [])), int)) for x, y in (("x", "y"), ("x_test", "y_test"))}
    counts = [Counter(each.tolist()) for each in labels.values()]
    if recipe.recordings is not None:
        arrays |= {name: _in_recordings(y, recipe.recordings) for name, y in labels.items() if len(y)}
    np.savez(out / f"{owner.name}.npz", **arrays)  # type: ignore[arg-type]
    return Prepared(owner.name, len(owner.files), seconds, train=counts[0], test=counts[1], left_out=left)


def _numbered(recipe: Recipe, owner: Owner, layout: Layout) -> Iterator[tuple[Recording, Windows]]:
    """Cut an owner's recordings into windows, none of which shares segments with another recording's."""
    used = 0
    for file in owner.files:
        recording = recipe.read(file, layout)
        windows = recipe.cut(recording)
        if not len(windows):
            raise DataError(f"{file}: no window is left ({_said(Counter(windows.left_out))})")
        if windows.segments is not None:
            windows = replace(windows, segments=windows.segments + used)
            used = int(windows.segments.max()) + 1  # type: ignore[union-attr]
        yield recording, windows


def _arrays(parts: Sequence[Windows], suffix: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file, as :func:`fedsplit.data.devices.open_folder` has them."""
    found: dict[str, list[NDArray[Any]]] = {}
    for part in filter(len, parts):
        for name in ("x", "y", "segments"):
            if (array := getattr(part, name)) is not None:
                found.setdefault(name + suffix, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _in_recordings(anomalous: NDArray[Any], recordings: int) -> NDArray[np.int64]:
    """Return which recording each window is of: normal ones in equal parts by their order, all others the next."""
    normal = np.flatnonzero(anomalous == 0)
    found = np.full(len(anomalous), recordings)
    found[normal] = np.arange(len(normal)) * recordings // max(1, len(normal))
    return found


def _check_labels(recipe: Recipe, done: Sequence[Prepared], layout: Layout, all_labels: bool) -> None:
    labels = f"label column {layout.label!r} (or the annotations of EDF)"
    names = {n: ", ".join(name for name, m in recipe.numbers.items() if m == n) for n in recipe.numbers.values()}
    if recipe.classes is None and names:
        for device in done:
            if not device.windows[0]:
                raise DataError(f"device {device.name!r} has no normal data: {labels} makes no window {names[0]}")
    total = sum((device.windows for device in done), Counter[int]())
    for number, name in names.items():
        if all_labels and not total[number]:
            raise DataError(f"{labels}: none of all {total.total()} windows is {name}, so nothing can tell it apart")


def _said(left: Counter[str]) -> str:
    reasons = {"gaps": "with gaps", "labels": "without one label", "border": "across the border of the test part"}
    reasons["anomalous"] = "anomalous, which nobody trains with"
    return ", ".join(f"{count} {reasons[why]}" for why, count in left.items() if count)
