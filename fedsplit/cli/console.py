"""What the commands show while they work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsplit.common.figures import figure

stderr = Console(stderr=True)


@contextmanager
def show_progress(rounds: int) -> Iterator[Any]:
    """Show a bar over rounds on stderr."""
    columns = (
        TextColumn("round"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[says]}"),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("", total=rounds, says="starting")

        def report(metrics: dict[str, Any]) -> None:
            told = {name: value for name, value in metrics.items() if figure(name).score and value}
            says = " ".join(f"{name} {value:.3f}" for name, value in told.items())
            bar.update(task, completed=metrics["round"], says=says)

        yield report
