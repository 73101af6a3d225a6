"""Runs side by side in processes of their own, without their logs."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Job = TypeVar("Job", bound=tuple[Any, ...])
Found = TypeVar("Found")
Each = TypeVar("Each")


def quiet() -> None:
    """Have Flower and fedsplit log errors only."""
    import flwr.supercore  # noqa: F401  sets its own log level when first imported

    for name in ("flwr", "fedsplit"):
        logging.getLogger(name).setLevel(logging.ERROR)


def progress(each: Iterable[Each], title: str, total: int | None = None) -> Iterator[Each]:
    """Yield each while a bar on stderr moves on."""
    yield from track(each, title, total, console=Console(stderr=True))


def side_by_side(
    work: Callable[..., Found], jobs: Sequence[Job], title: str, processes: int | None = None
) -> Iterator[Found]:
    """Yield what ``work`` makes of each job's arguments, in the order of jobs.

    Parameters
    ----------
    work : callable
        A function of a module, which processes import.
    jobs : sequence of tuples
        Its arguments.
    title : str
        Of the bar.
    processes : int, optional
        As many as there are cores if not given. Each trains in one thread.
    """
    # fresh processes, since a fork of one that has used torch's threads can hang
    context = get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context, initializer=_start) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        yield from progress((future.result() for future in futures), title, len(jobs))


def _start() -> None:
    import torch

    quiet()
    torch.set_num_threads(1)
