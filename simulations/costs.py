"""What a round of a simulation costs: per exchange, device, record and byte, from runs that differ in one of them.

    python simulations/costs.py --repeats 3

Writes a table and `costs.json` to `simulations/results/costs`, with what that predicts for other rounds.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from scale import CONFIG, watch

RESULTS = Path(__file__).parent / "results" / "costs"
ROUNDS = 7
# name: devices, records of each, nodes, policy
RUNS = {
    "base": (1000, 10, 2, "random"),
    "records": (1000, 100, 2, "random"),
    "devices": (10_000, 10, 2, "random"),
    "nodes": (1000, 10, 50, "random"),
    "bytes": (1000, 100, 2, "none"),
}
# devices, actors: the first as scale.py measures it, to compare with
ROUNDS_TO_COME = ((100_000, os.cpu_count() or 1), (10_000, 64), (1_000_000, 64), (1_000_000, 1024))


def run(devices: int, records: int, nodes: int, policy: str) -> dict[str, float]:
    """Simulate with all devices in every round."""
    settings = CONFIG.format(rounds=ROUNDS, devices=devices, per_node=-(-devices // nodes), fraction=1.0)
    if policy == "none":
        settings = settings.replace('policy = "random", keep = 0.25', 'policy = "none"')
    return watch(settings, records * devices, ROUNDS)


def solve(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return seconds per unit, from the differences between runs."""
    outside = {name: r["round"] - r["trunk"] for name, r in found.items()}  # nodes, transport, packing
    base, wide = RUNS["base"], RUNS["records"]
    more = base[0] * (wide[1] - base[1])
    megabytes = {name: r["megabytes_up"] + r["megabytes_down"] for name, r in found.items()}
    return {
        "trunk_record": (found["records"]["trunk"] - found["base"]["trunk"]) / more,
        "node_record": (outside["records"] - outside["base"]) / more,
        "device": (outside["devices"] - outside["records"]) / (RUNS["devices"][0] - wide[0]),
        "exchange": (outside["nodes"] - outside["base"]) / (RUNS["nodes"][2] - base[2]),
        "megabyte": (outside["bytes"] - outside["records"]) / (megabytes["bytes"] - megabytes["records"]),
    }


def predict(costs: dict[str, float], devices: int, records: int, actors: int) -> dict[str, float]:
    """Return the seconds of a round in which ``devices`` take part, 2,500 on each node, on so many actors."""
    exchanges = devices / 2500
    spread = (devices * (costs["device"] + records * costs["node_record"])) * (os.cpu_count() or 1) / actors
    server = devices * records * costs["trunk_record"] + exchanges * costs["exchange"]
    return {"devices": devices, "actors": actors, "nodes_seconds": spread, "server_seconds": server}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    solved = []
    for _ in range(arguments.repeats):
        found = {name: run(*chosen) for name, chosen in RUNS.items()}
        solved.append(solve(found))
        print(json.dumps(solved[-1]), file=sys.stderr)
    costs = {name: median(s[name] for s in solved) for name in solved[0]}
    predictions = [predict(costs, n, 10, actors) for n, actors in ROUNDS_TO_COME]
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = {"costs": costs, "repeats": solved, "predictions": predictions}
    (RESULTS / "costs.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"Seconds of a round on {os.cpu_count()} cores", title_justify="left")
    for name in ("for each", "microseconds", "lowest", "highest"):
        table.add_column(name, justify="left" if name == "for each" else "right")
    for name, seconds in costs.items():
        every = [1e6 * s[name] for s in solved]
        table.add_row(name, f"{1e6 * seconds:,.1f}", f"{min(every):,.1f}", f"{max(every):,.1f}")
    Console(width=100).print(table)
    for p in predictions:
        print(
            f"{p['devices']:,} devices of 10 records in a round, {p['actors']:,} actors: "
            f"{p['nodes_seconds']:.1f} s on the nodes, {p['server_seconds']:.1f} s on the server"
        )


if __name__ == "__main__":
    main()
