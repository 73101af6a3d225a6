"""The tables of the study of encryption."""

from collections.abc import Iterator
from typing import Any

from simulations.shared.results import Results
from simulations.shared.tables import markdown, page

RATES = (0.1, 1.0, 10.0, 100.0)  # Mbit/s
COLUMNS = ("", "device", "server", "bytes up", "down", *(f"all, at {rate:g} Mbit/s" for rate in RATES))


def tables(results: Results) -> str:
    """Return a table for single records and one for many, and what the attack makes of a release."""
    attack = results["attack"]
    said = f"Strongest attack on a release {attack['strongest']:.1f} dB, without any {attack['without']:.1f} dB."
    found = [
        markdown((*COLUMNS, "the server has"), _rows(rows), f"{batch} record(s) a request, per record")
        for batch, rows in results["batches"].items()
    ]
    return page(*found, said, "\n".join(f"- {line}" for line in results["said"]))


def _rows(rows: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    for name, row in rows.items():
        took, travels = row["device_us"] + row["server_us"], row["bytes_up"] + row["bytes_down"]
        ends = [microseconds(took + 8 * travels / rate) for rate in RATES]
        sizes = [f"{row[way]:,.0f}" for way in ("bytes_up", "bytes_down")]
        yield [name, microseconds(row["device_us"]), microseconds(row["server_us"]), *sizes, *ends, row["seen"]]


def microseconds(count: float) -> str:
    """Return a time of so many microseconds in the unit that suits it.

    >>> microseconds(290.4), microseconds(6_900), microseconds(49e6)
    ('290 us', '6.9 ms', '49 s')
    """
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} us"
