"""The command ``fedsplit windows``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsplit.common.errors import ConfigError

if TYPE_CHECKING:
    from fedsplit.data.formats import Layout
    from fedsplit.data.preparing import Prepared
    from fedsplit.data.recipe import Recipe

Texts = list[str] | None


def windows(
    recordings: Annotated[
        list[Path], typer.Argument(help="A device each: a .csv, .parquet or .edf file, or a folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the records: an .npz file for each device, and the recipe.")],
    like: Annotated[
        Path | None, typer.Option(help="The recipe (windows.toml) of the run, in place of those below.")
    ] = None,
    channel: Annotated[Texts, typer.Option(help="NAME or NAME=UNIT wanted; repeatable, in their order.")] = None,
    rate: Annotated[float | None, typer.Option(help="Samples a second that all channels are brought to.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of a window.")] = None,
    stride: Annotated[float | None, typer.Option(help="Seconds between windows; default: they do not overlap.")] = None,
    fill: Annotated[float | None, typer.Option(help="Seconds between samples that are bridged by a line.")] = None,
    class_: Annotated[Texts, typer.Option("--class", help="A label; repeatable, numbered from 0.")] = None,
    normal: Annotated[Texts, typer.Option(help="A label that is normal (0), instead of classes; repeatable.")] = None,
    anomalous: Annotated[Texts, typer.Option(help="A label that is not (1); repeatable.")] = None,
    otherwise: Annotated[str | None, typer.Option(help="The label where there is none of these.")] = None,
    recordings_: Annotated[
        int | None, typer.Option("--recordings", help="Novelty: a device's normal windows are so many recordings.")
    ] = None,
    donor: Annotated[Texts, typer.Option(help="A device whose values everybody may know: it is measured.")] = None,
    column: Annotated[Texts, typer.Option(help="CHANNEL=NAME of it in these files; repeatable.")] = None,
    unit: Annotated[Texts, typer.Option(help="CHANNEL=UNIT of it in these files, if not as wanted.")] = None,
    time: Annotated[str, typer.Option(help="CSV, Parquet: column of seconds or of ISO 8601 timestamps.")] = "time",
    file_rate: Annotated[float | None, typer.Option(help="CSV, Parquet: rows a second, without such a column.")] = None,
    label: Annotated[str, typer.Option(help="CSV, Parquet: column of labels. EDF has annotations.")] = "label",
    upsample: Annotated[bool, typer.Option(help="Interpolate channels that are slower than --rate.")] = False,
    test_share: Annotated[float, typer.Option(help="Last part of every recording, to test with.")] = 0.0,
    test_files: Annotated[
        str | None, typer.Option(help="Recordings to test with: a pattern like '*-day2.csv'.")
    ] = None,
) -> None:
    """Make records of your own recordings: windows at one rate, in one unit, scaled by constants."""
    from fedsplit.data.preparing import HeldOut, find_owners, measure, prepare
    from fedsplit.data.recipe import RECIPE, read_recipe

    shared = {
        "channel": channel,
        "rate": rate,
        "seconds": seconds,
        "stride": stride,
        "fill": fill,
        "class": class_,
        "normal": normal,
        "anomalous": anomalous,
        "otherwise": otherwise,
        "recordings": recordings_,
    }
    given = {name: value for name, value in shared.items() if value is not None}
    if like is not None and given:
        raise ConfigError(f"--{next(iter(given))}: is in the recipe {like} already")
    recipe = read_recipe(like) if like else _recipe(given)
    layout = replace(layout_of(recipe, column, unit, time, file_rate), label=label, upsample=upsample)
    owners, test = find_owners(recordings), HeldOut(test_share, test_files)
    if recipe.divide is None:
        known = {owner.name: owner for owner in owners}
        if not donor or not set(donor) <= set(known):
            said = f"--donor must name one or more of {', '.join(known)}, got {', '.join(donor or []) or 'none'}"
            raise ConfigError(f"{said}: the constants that scale all devices' records are theirs")
        recipe = measure(recipe, [known[name] for name in dict.fromkeys(donor)], layout, test)
    elif donor:
        raise ConfigError(f"--donor: the recipe {like} has constants already (subtract, divide)")
    done = prepare(recipe, owners, out, layout, test, all_labels=like is None)
    console = Console()
    console.print(_table(recipe, done))
    number = len(recipe.classes) if recipe.classes else recipe.recordings
    outputs = f", outputs = {number}" if number else ""
    said = f'records of shape {recipe.shape}: [data] folder = "{out}", task = "{recipe.task}"{outputs}'
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    said = f"other devices of a run make theirs with --like {out / RECIPE}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def _recipe(given: dict[str, Any]) -> "Recipe":
    from fedsplit.data.recipe import check_recipe

    needed = [name for name in ("channel", "rate", "seconds") if name not in given]
    if needed:
        raise ConfigError(f"--{needed[0]} is needed, or the recipe of a run with --like")
    names, units = zip(*(_pair(text) for text in given.pop("channel")), strict=True)
    renamed = {"classes" if name == "class" else name: value for name, value in given.items()}
    return check_recipe({"channels": list(names), "units": list(units), "stride": given["seconds"]} | renamed)


def layout_of(recipe: "Recipe", column: Texts, unit: Texts, time: str, file_rate: float | None) -> "Layout":
    """Return where files hold a recipe's channels, from the command-line options of the same names.

    Parameters
    ----------
    recipe : Recipe
    column, unit : list of str or None
        Entries CHANNEL=NAME and CHANNEL=UNIT.
    time : str
        A table's column of times.
    file_rate : float or None
        Rows per second (Hz) of a table without times.

    Raises
    ------
    ConfigError
        If the rate is not positive and finite, or an entry names no channel of the recipe.
    """
    from fedsplit.data.formats import Layout

    if file_rate is not None and not 0 < file_rate < float("inf"):
        raise ConfigError(f"--file-rate must be above 0, got {file_rate:g}")
    return Layout(_pairs(recipe, "column", column), _pairs(recipe, "unit", unit), time=time, rate=file_rate)


def _pair(text: str) -> tuple[str, str]:
    """Take NAME=VALUE apart, at the last sign: names of channels may have others."""
    name, equals, value = text.rpartition("=")
    return (name.strip(), value.strip()) if equals else (value.strip(), "")


def _pairs(recipe: "Recipe", option: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs = dict(_pair(text) for text in given or ())
    for name, value in pairs.items():
        if name not in recipe.channels or not value:
            raise ConfigError(
                f"--{option} must be CHANNEL=..., a channel of {', '.join(recipe.channels)}, got {name!r}"
            )
    return pairs


def _table(recipe: "Recipe", done: Sequence["Prepared"]) -> Table:
    """Show windows by device; those of each label are of train and test together."""
    table = Table(title="windows by device", title_justify="left")
    names = recipe.classes or ["normal", "anomalous"][: len(set(recipe.numbers.values())) or 1]
    reasons = {"gaps": "gaps", "border": "border"} | ({"labels": "no label"} if recipe.numbers else {})
    if recipe.numbers and recipe.recordings is not None:
        reasons["anomalous"] = "not to train"
    for column in ("device", "files", "min", "train", "test", *names, *reasons.values()):
        table.add_column(escape(column), justify="left" if column == "device" else "right")
    for number, device in enumerate(done):
        counts = [device.train.total(), device.test.total(), *(device.windows[n] for n in range(len(names)))]
        left = [Counter(device.left_out)[why] for why in reasons]
        length = f"{device.seconds / 60:.1f}"
        table.add_row(escape(f"{number} {device.name}"), str(device.recordings), length, *map(str, counts + left))
    return table
