"""The command ``fedsplit tune``."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsplit.cli.console import stderr
from fedsplit.cli.extras import need
from fedsplit.cli.node import find_functions
from fedsplit.common.errors import ConfigError

if TYPE_CHECKING:
    from fedsplit.tuning.study import Study


def tune(
    config: Annotated[Path, typer.Argument(help="Settings file (TOML) with a section [tune].")],
    out: Annotated[Path | None, typer.Option(help="Study folder; default runs/NAME-TIMESTAMP.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the study in --out.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at a time, one core each.")] = os.cpu_count() or 1,
    dashboard: Annotated[bool, typer.Option(help="Show the study in optuna-dashboard meanwhile.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Front on stdout as JSON, progress on stderr.")] = False,
) -> None:
    """Search the settings of CONFIG for what no other trial beats in all objectives."""
    need("tune")
    from fedsplit.plan.settings import default_folder, load_settings

    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the study to go on with")
    viewer = shutil.which(
        "optuna-dashboard", path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    )
    if dashboard and viewer is None:
        raise ConfigError("--dashboard needs optuna-dashboard: pip install optuna-dashboard")
    find_functions(config)
    settings = load_settings(config, overrides or [])
    from fedsplit.tuning.results import export_front, front_table, write_results
    from fedsplit.tuning.study import Study

    study = Study(settings, out or default_folder(settings), resume=resume)
    try:
        with _dashboard(viewer if dashboard else None, study.address), _progress(study) as report:
            study.run(parallel, report)
    except KeyboardInterrupt:
        stderr.print(f"fedsplit: stopped; go on with --out {study.folder} --resume", markup=False, highlight=False)
        raise
    points = export_front(study)
    write_results(study, points)
    if as_json:
        print((study.folder / "tune.json").read_text(encoding="utf-8"), end="")
        return
    console = Console()
    console.print(front_table(study, points), highlight=False)
    console.print(f"settings in {study.folder / 'front'}, pictures and all trials in {study.folder}", highlight=False)


@contextmanager
def _progress(study: "Study") -> Iterator[Callable[["Study"], None]]:
    """Show how many trials are through and the front so far; without a terminal a line for every trial."""
    from fedsplit.tuning.results import front_table

    columns = (TextColumn("trial"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=stderr)
    task = bar.add_task("", total=study.tune.trials, completed=len(study.trials))

    def line(study: "Study") -> None:
        last = study.trials[-1]
        outcome = last.user_attrs["outcome"]
        values = ", ".join(f"{k} {v:.4g}" for k, v in (outcome["values"] or {}).items())
        said = "; ".join(filter(None, [values, outcome["stopped"]]))
        stderr.print(
            f"trial {last.number} ({len(study.trials)} of {study.tune.trials}): {said}", markup=False, highlight=False
        )

    if not stderr.is_terminal:
        yield line
        return
    with Live(bar, console=stderr, transient=True) as live:

        def show(study: "Study") -> None:
            bar.update(task, completed=len(study.trials))
            live.update(Group(bar, front_table(study, study.front())))

        yield show


@contextmanager
def _dashboard(viewer: str | None, address: str) -> Iterator[None]:
    """Run optuna-dashboard beside the search, for this machine alone."""
    if viewer is None:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [viewer, address, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stderr.print(f"dashboard: http://127.0.0.1:{port}", highlight=False)
    try:
        yield
    finally:
        process.terminate()
        process.wait()
