"""The owner's commands: ``fedsplit node init | preview | ledger``."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

node = typer.Typer(no_args_is_help=True, help="A device owner's tools: make a node, see what would and what did leave.")


def find_functions(settings: Path) -> None:
    """Let a user's own ``module:function`` be found beside the settings file and in the current folder."""
    sys.path[:0] = [str(Path.cwd()), str(settings.resolve().parent)]


@node.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the secret, the limits and the ledgers go.")],
    devices: Annotated[list[int], typer.Option("--device", help="Id of a device on this node; repeatable.")],
) -> None:
    """Make a node's folder: a secret, the commented limits file, and ledgers of what has left (nothing yet)."""
    from fedsplit.home import Home

    home = Home.create(folder, devices)
    print(f"made {folder} for devices {home.devices}; read and change {folder / 'limits.toml'} before it takes part")


@node.command()
def preview(
    config: Annotated[Path, typer.Argument(help="Settings of the run that the node would take part in.")],
    device: Annotated[int, typer.Option(help="Whose record.")] = 0,
    record: Annotated[int, typer.Option(help="Which of its training records.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="first_layer.safetensors; default: before training.")] = None,
    home: Annotated[Path | None, typer.Option(help="The node's folder, whose secret draws masks.")] = None,
    out: Annotated[Path, typer.Option(help="Page with what the attacks make of it.")] = Path("preview.html"),
) -> None:
    """Show the bytes that one record would release, and what the standard attacks make of such a release.

    They are exact but for what is drawn anew in a run: noise, and masks unless dropping.mask is "keyed".
    """
    from fedsplit.auditing import preview_record
    from fedsplit.config import load_settings

    find_functions(config)
    shown = preview_record(load_settings(config), device, record, weights, home, out)
    console = Console()
    console.print(
        f"device {device}, record {record}: {shown.sent} of {shown.width} outputs {shown.how}, in {len(shown.payload)} "
        "bytes (its label among them)"
    )
    console.print(shown.payload.hex(" ", 2), style="dim")
    report = shown.report
    best, guess = report["strongest"], max(scores["psnr"] for scores in report["baselines"].values())
    console.print(f"strongest attack: {best['attack']}, {best['psnr']:.1f} dB (peak {report['peak']:.3g})")
    console.print(f"without the release: {guess:.1f} dB")
    console.print(f"largest leverage of a number: {report['criterion']['leverage_max']:.3f}")
    console.print(f"written to {out}")


@node.command()
def ledger(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    most: Annotated[int, typer.Option(help="How many records to show, those that told most first.")] = 10,
) -> None:
    """Show what has left of this node's records, against its limits."""
    from fedsplit.home import LEDGERS, Home
    from fedsplit.privacy.accountant import epsilon

    home = Home(folder)
    for name in LEDGERS:
        accountant = home.accountant(name)
        rows = sorted(accountant.rows(), key=lambda row: (-row[1].releases, -row[1].equations))
        table = Table(title=f"{name} records: {len(rows)} have left", title_justify="left")
        for column in ("device", "record", "releases", "equations", "bits", "leverage", "gradient", "epsilon"):
            table.add_column(column, justify="right")
        for number, spent in rows[:most]:
            told = epsilon(spent.precision, home.limits.delta)
            table.add_row(
                str(number >> 32),
                str(number & 0xFFFFFFFF),
                str(spent.releases),
                str(spent.equations),
                str(spent.bits),
                "-" if spent.leverage != spent.leverage else f"{spent.leverage:.3f}",
                f"{spent.gradient:.3f}",
                "unbounded" if told == float("inf") else f"{told:.2f}",
            )
        Console().print(table)
    kept = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in home.limits.model_dump().items())
    print(f"limits: {kept}")
