"""The command line: ``fedsplit simulate``."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsplit.errors import ConfigError, FedsplitError

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_stderr = Console(stderr=True)


@cli.callback()
def _program() -> None:
    """Split training across devices that keep their records."""


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
    from fedsplit import config as configuration
    from fedsplit.report import result_table
    from fedsplit.simulation import simulate as run
    from fedsplit.training import default_folder

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    # a user's own "module:function" lives beside the settings file or in the current folder
    sys.path[:0] = [str(Path.cwd()), str(config.resolve().parent)]
    if engine is not None:
        overrides = [*(overrides or []), f"run.engine={json.dumps(engine)}"]
    settings = configuration.load_settings(config, overrides or [])
    folder = out or default_folder(settings)
    with _progress(settings.run.rounds) as report:
        result = run(settings, out=folder, resume=resume, report=report)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(result_table(result, folder))


@contextmanager
def _progress(rounds: int) -> Iterator[Any]:
    """Show a bar over rounds on stderr."""
    columns = (
        TextColumn("round"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[says]}"),
    )
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
        task = bar.add_task("", total=rounds, says="starting")

        def report(metrics: dict[str, Any]) -> None:
            says = " ".join(f"{k} {v:.3f}" for k, v in metrics.items() if k.endswith(("loss", "accuracy")) and v)
            bar.update(task, completed=metrics["round"], says=says)

        yield report


def _quiet(verbose: bool) -> None:
    """Send fedsplit's warnings to stderr; Flower's own logs only if asked for."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    handler = RichHandler(console=_stderr, show_path=False, show_time=False)
    logging.getLogger("fedsplit").handlers = [handler]
    logging.getLogger("fedsplit").setLevel(logging.INFO if verbose else logging.WARNING)
    import flwr.supercore  # noqa: F401  sets its own log level when first imported

    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.CRITICAL)


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    try:
        cli(standalone_mode=True)
    except FedsplitError as error:
        _stderr.print(f"fedsplit: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
