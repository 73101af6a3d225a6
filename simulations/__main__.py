"""Run a study, or list them: ``python -m simulations [NAME] [--quick] [--tables] [options]``, from the root."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from fedsplit.common.errors import FedsplitError
from simulations.shared import results
from simulations.shared.options import Asked, parse
from simulations.shared.study import Study, listing, load, names


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; return its exit code.

    Parameters
    ----------
    arguments : sequence of str
        The study's name and its options. Without any, the studies are listed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    try:
        if name not in names():
            raise FedsplitError(f"there is no study {name!r}: choose from {', '.join(names())}")
        study = load(name)
        asked = parse(name, study.__doc__, study.Options, rest)
        found = results.read(name, asked.quick) if asked.tables else _run(name, study, asked)
        print(study.tables(found))
    except FedsplitError as error:
        print(f"simulations: {error}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, study: Study, asked: Asked) -> results.Results:
    """Measure, write and draw; return what was written."""
    began = time.monotonic()
    found = study.study(asked.options)
    seconds = round(time.monotonic() - began, 1)
    results.write(name, asked.quick, {"options": asdict(asked.options), "seconds": seconds, **found})
    written = results.read(name, asked.quick)
    print(f"written to {results.path(name, asked.quick)} after {seconds} s", file=sys.stderr)
    if hasattr(study, "draw"):
        study.draw(written, results.path(name, asked.quick, ".png"))
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
