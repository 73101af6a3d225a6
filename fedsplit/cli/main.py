"""The command line: ``fedsplit simulate``."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from fedsplit.cli.console import show_progress, stderr
from fedsplit.cli.extras import need
from fedsplit.cli.monitor import monitor
from fedsplit.cli.node import find_functions, node
from fedsplit.cli.predict import export, predict, serve, token
from fedsplit.cli.server import certs, run, server, status
from fedsplit.cli.tune import tune
from fedsplit.cli.windows import windows
from fedsplit.common.errors import ConfigError, FedsplitError

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


cli.add_typer(node, name="node")
cli.add_typer(server, name="server")
for command in (windows, tune, certs, run, status, export, token, serve, predict, monitor):
    cli.command()(command)


@cli.callback()
def _program() -> None:
    """Split training across devices that keep their records."""
    _quiet(False)


@cli.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="Settings file (TOML).")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-TIMESTAMP.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    engine: Annotated[str | None, typer.Option(help="ray or inline; the same as --set run.engine=...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result on stdout as JSON, logs on stderr.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's and fedsplit's logs.")] = False,
) -> None:
    """Train over simulated devices with the settings of CONFIG."""
    _quiet(verbose)
    from fedsplit.cli.report import result_table
    from fedsplit.plan import settings as configuration

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    find_functions(config)
    if engine is not None:
        overrides = [*(overrides or []), f"run.engine={json.dumps(engine)}"]
    settings = configuration.load_settings(config, overrides or [])
    need("simulation" if settings.run.engine == "ray" else "server")
    from fedsplit.runs.simulation import simulate as run

    folder = out or configuration.default_folder(settings)
    try:
        with show_progress(settings.run.rounds) as report:
            result = run(settings, out=folder, resume=resume, report=report)
    except KeyboardInterrupt:
        stderr.print(f"fedsplit: stopped; go on with --out {folder} --resume", markup=False, highlight=False)
        raise
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(result_table(result, folder))


@cli.command()
def audit(
    target: Annotated[Path, typer.Argument(help="Run folder; with --policy a settings file.")],
    policy: Annotated[bool, typer.Option("--policy", help="Audit one release, before any training.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where --policy writes; default runs/NAME-TIMESTAMP.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, with --policy.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer targets, without the constrained search.")] = False,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal figures.")] = 0,
    attack: Annotated[list[str] | None, typer.Option(help="An attack of your own, module:Class; repeatable.")] = None,
    fail_above: Annotated[float | None, typer.Option(help="Exit with 1 if the strongest PSNR is above (dB).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report on stdout as JSON, logs on stderr.")] = False,
) -> None:
    """Attack what left the devices in a run, and say what came back."""
    need("pictures")
    from fedsplit.cli.report import audit_table
    from fedsplit.plan import settings as configuration
    from fedsplit.runs import auditing

    find_functions(target)
    if policy:
        settings = configuration.load_settings(target, overrides or [])
        folder = out or configuration.default_folder(settings)
        report = auditing.audit_policy(settings, folder, seed=seed, quick=quick, attacks=attack or [])
    elif overrides or out:
        raise ConfigError("--set and --out are for --policy: a run is audited as it was, in its folder")
    else:
        folder = target
        report = auditing.audit_run(folder, seed=seed, quick=quick, attacks=attack or [])
    if as_json:
        print(json.dumps(report))
    else:
        Console().print(audit_table(report, folder))
    if not report["control"]["holds"]:
        stderr.print("fedsplit: the negative control does not hold: the audit has failed", style="red")
        sys.exit(1)
    if fail_above is not None and report["strongest"]["psnr"] > fail_above:
        said = f"fedsplit: strongest attack {report['strongest']['psnr']:.1f} dB is above {fail_above:g} dB"
        stderr.print(said, style="red", markup=False, highlight=False)
        sys.exit(1)


@cli.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, two or more.")] = None,
    out: Annotated[Path, typer.Option(help="Where the plot goes (.png).")] = Path("compare.png"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show runs side by side, finished or not: figures, settings that differ, accuracy over what it cost."""
    need("pictures")
    from fedsplit.cli.report import comparison_tables
    from fedsplit.runs import comparing
    from fedsplit.runs.pictures import draw_comparison

    found = comparing.read_runs(runs or [])
    drawn = draw_comparison(found, out)
    if as_json:
        print(comparing.as_json(found, out if drawn else None))
        return
    console = Console()
    for table in comparison_tables(found):
        console.print(table, "")
    for note in [*comparing.notes(found), f"plot written to {out}" if drawn else "there is nothing to plot"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


@cli.command()
def forget(
    device: Annotated[int, typer.Argument(help="Whose releases to remove.")],
    folder: Annotated[Path, typer.Argument(help="The server's run folder.")],
) -> None:
    """Remove all that a run holds of a device's records; what was learned from them stays."""
    from fedsplit.runs.folder import RunFolder
    from fedsplit.runs.forgetting import forget_device

    gone = forget_device(folder, device)
    stays = "what the weights have learned from them stays"
    print(f"removed {gone.records} records of device {device} from {folder}; {stays}")
    if gone.others:
        print(f"removed, too: {', '.join(gone.others)}")
    if gone.unknown:
        print(f"left alone, since no run writes it: {', '.join(gone.unknown)}")
    if (fleet := RunFolder(folder).fleet).exists():
        print(f"what is normal for watched devices is in {fleet}, by their names: remove a device's file there")


def _quiet(verbose: bool) -> None:
    """Send fedsplit's warnings to stderr; Flower's own logs only if asked for."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    handler = RichHandler(console=stderr, show_path=False, show_time=False)
    logging.getLogger("fedsplit").handlers = [handler]
    logging.getLogger("fedsplit").setLevel(logging.INFO if verbose else logging.WARNING)
    worth = logging.INFO if verbose else logging.CRITICAL
    # a filter, since Flower sets its level when it is imported, which most commands never do
    logging.getLogger("flwr").filters = [lambda record: record.levelno >= worth]


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    try:
        cli(standalone_mode=True)
    except FedsplitError as error:
        stderr.print(f"fedsplit: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
