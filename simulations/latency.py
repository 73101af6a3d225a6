"""How long an exchange takes on real nodes, beside Flower's own loop, and how many records are trained in a second.

    python -m simulations latency

Two nodes over loopback, with TLS and keys, the wearables data, uploads of about 1 MB. The same app in every row: once
as Flower runs it by itself (its own loop in the server, a process that imports all for each message in the nodes), once
with `fedsplit node start`, once with `--warm`; and split learning written naively, a mini-batch a message. The time of
an exchange is a round's without that of the trunk. Medians over rounds, without the first.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fedsplit.flower.programs import environment, flower
from fedsplit.flower.record import TERMS
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.runs.folder import RunFolder
from fedsplit.server.link.runs import start_run, write_app
from simulations.shared import naive, replicated
from simulations.shared.network import free_port
from simulations.shared.options import option
from simulations.shared.processes import NAME, Deployment, deployment
from simulations.shared.results import Results
from simulations.shared.settings import changed
from simulations.shared.statistics import medians
from simulations.shared.tables import figure, markdown

RECORDS = 3200
NAIVE, STOCK, NODE, WARM = "naive", "Flower's own loop", "fedsplit node start", "fedsplit node start --warm"
NAMES = {
    NAIVE: f"a mini-batch of {naive.BATCH} a message, naive split learning on Flower",
    STOCK: "fedsplit over Flower's own loop and SuperNode",
    NODE: "`fedsplit node start`",
    WARM: "`fedsplit node start --warm`",
}
STOCK_SERVER = """
import fedsplit.runs.server_app, fedsplit.runs.training
fedsplit.runs.training.PollingGrid = lambda grid, over: grid
fedsplit.runs.server_app.DeploymentGrid = lambda grid: grid
app = fedsplit.runs.server_app.app
"""
NAIVE_SERVER = """
import os
from flwr.serverapp import ServerApp
from fedsplit.plan.settings import Settings
from simulations.shared import naive
app = ServerApp()
@app.main()
def main(grid, context):
    seconds = naive.train(grid, Settings.from_json(os.environ[naive.SETTINGS]), int(os.environ["NAIVE_STEPS"]))
    with open(os.environ["NAIVE_OUT"], "w") as file:
        file.write(str(seconds))
"""
NAIVE_CLIENT = "from simulations.shared.naive import app\n__all__ = ['app']\n"
Row = dict[str, float]


@dataclass(frozen=True)
class Options:
    """What is run, and how long."""

    repeats: int = option(1)
    steps: int = option(3, quick=1, help="of naive split learning")
    rounds: tuple[int, ...] = option((6, 8, 20), quick=(3, 3, 3), help="of Flower's loop, a node, and a warm one")
    only: tuple[str, ...] = option(tuple(NAMES), quick=(WARM,), choices=tuple(NAMES), help="rows")


def settings_for(rounds: int) -> Settings:
    """Return a pipelined run over two devices, a whole epoch of 1,600 records in each upload."""
    return check_settings(
        {
            "run": {"name": "latency", "rounds": rounds},
            "data": replicated.DATA,
            "devices": {"count": 2, "test": [0]},
            "model": {"name": "sensor-cnn", "width": 16},
            "dropping": {"policy": "top-k", "k": 250},
            "protocol": {"mode": "pipelined", "chunk": "epoch"},
        }
    )


def rounds_of(folder: Path) -> Row:
    """Return the median round of a run, of its exchange alone, and the bytes of an upload."""
    result = json.loads((folder / "result.json").read_text())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:-1]
    seconds = median(r["seconds"] for r in rounds)
    return {
        "exchange": median(r["seconds"] - r["trunk_seconds"] for r in rounds),
        "round": seconds,
        "records_per_second": RECORDS / seconds,
        "upload": result["bytes_up"] / result["exchanges"],
    }


def nodes(trial: Deployment) -> list[str]:
    """Make two nodes with a device each."""
    names = ["n0", "n1"]
    for device, name in enumerate(names):
        trial.make_node(name, [device], settings_for(1), allow=[replicated.BUILDER])
    return names


def ours(folder: Path, rounds: int, *, warm: bool) -> Row:
    """Measure fedsplit's own nodes and loop."""
    with deployment(folder) as trial:
        for name in nodes(trial):
            trial.start_node(name, warm=warm)
        config = trial.folder / "run.toml"
        config.write_text(settings_for(rounds).to_toml())
        trial.run(config, "run")
        trial.result("run")
        return rounds_of(trial.folder / "run")


def stock(folder: Path, rounds: int) -> Row:
    """Measure the same app as Flower runs it."""
    with stock_deployment(folder) as trial:
        for place, name in enumerate(nodes(trial)):
            home = trial.folder / name
            stock_node(trial, name, place, {"fedsplit-home": str(home), "fedsplit-data": f"{home}-data"})
        out = trial.folder / "run"
        settings, server = settings_for(rounds), str(trial.folder / "server")
        terms = Experiment(settings).terms.to_json()
        with RunFolder(out).submitting(settings):
            start(trial, {TERMS: terms, "out": str(out), "nodes": server}, {"run_server.py": STOCK_SERVER})
        wait_for(out / "result.json")
        return rounds_of(out)


def naive_app(folder: Path, steps: int) -> Row:
    """Measure split learning with a mini-batch in each message."""
    out = folder / "seconds"
    settings = changed(settings_for(1), {"dropping": {"policy": "random", "keep": 0.25, "k": None}})
    more = {naive.SETTINGS: settings.to_json(), "NAIVE_STEPS": str(steps), "NAIVE_OUT": str(out)}
    with stock_deployment(folder, **more) as trial:
        for place, name in enumerate(nodes(trial)):
            stock_node(trial, name, place, {})
        start(trial, {TERMS: ""}, {"run_server.py": NAIVE_SERVER, "run_client.py": NAIVE_CLIENT})
        wait_for(out)
        seconds = float(out.read_text()) / steps
    return {"exchange": seconds / 2, "round": seconds, "records_per_second": 2 * naive.BATCH / seconds}


def stock_deployment(folder: Path, **more: str) -> AbstractContextManager[Deployment]:
    """Open a deployment whose SuperLink has Flower's own waits."""
    for name in set(environment()) - set(os.environ) - {"FLWR_TELEMETRY_ENABLED"}:
        more[name] = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0"}.get(name, "2")
    return deployment(folder, environment=more)


def stock_node(trial: Deployment, name: str, place: int, own: dict[str, str]) -> None:
    """Start Flower's SuperNode by itself, with nothing of fedsplit around it and ``own`` in its configuration."""
    numbers = {"partition-id": place, "num-partitions": 2}
    options = {
        "--superlink": trial.address,
        "--root-certificates": str(trial.authority),
        "--auth-supernode-private-key": str(trial.folder / name / "key"),
        "--port": str(free_port()),
        "--node-config": " ".join(f"{key}={json.dumps(value)}" for key, value in {**own, **numbers}.items()),
    }
    with (trial.folder / f"{name}.log").open("ab") as log:
        trial.processes[name] = subprocess.Popen(
            [flower("flower-supernode"), *(word for pair in options.items() for word in pair)],
            env=trial.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start(trial: Deployment, config: dict[str, str | bool], files: dict[str, str]) -> None:
    """Submit an app with some files in place of its own."""
    app = trial.folder / "app"
    app.mkdir()
    write_app(app, config)
    for name, text in files.items():
        (app / name).write_text(text)
    os.environ["FLWR_HOME"] = trial.environment["FLWR_HOME"]
    start_run(app, NAME)


def wait_for(path: Path, timeout: float = 600) -> None:
    """Wait until a file is there; raises RuntimeError."""
    deadline = time.monotonic() + timeout
    while not path.exists() or not path.read_text():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} was not written")
        time.sleep(0.5)


def rows_for(options: Options) -> dict[str, Callable[[Path], Row]]:
    """Return what measures each row, in a folder of its own."""
    loop, node, warm = options.rounds
    rows: dict[str, Callable[[Path], Row]] = {
        NAIVE: lambda folder: naive_app(folder, options.steps),
        STOCK: lambda folder: stock(folder, loop),
        NODE: lambda folder: ours(folder, node, warm=False),
        WARM: lambda folder: ours(folder, warm, warm=True),
    }
    return {name: rows[name] for name in NAMES if name in options.only}


def study(options: Options) -> Results:
    """Measure all rows in turns."""
    os.environ[replicated.RECORDS] = str(RECORDS)
    rows = rows_for(options)
    found: dict[str, list[Row]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.repeats):
            for name, measure in rows.items():
                found[name].append(measure(Path(place) / f"{number}-{list(rows).index(name)}"))
                print(name, {key: round(value, 3) for key, value in found[name][-1].items()}, file=sys.stderr)
    return {"rows": found}


def tables(results: Results) -> str:
    """Return the medians over repetitions, beside Flower's own loop and naive split learning where these were run."""
    middle = {name: medians(rows) for name, rows in results["rows"].items()}
    columns = ("", "seconds an exchange", "to Flower's loop", "records trained in a second", "to naive")
    return markdown(columns, [(NAMES[name], *_cells(row, middle, name)) for name, row in middle.items()])


def _cells(row: Row, middle: dict[str, Row], name: str) -> list[str]:
    loop, plain = middle.get(STOCK), middle.get(NAIVE)
    faster = f"{loop['exchange'] / row['exchange']:.1f}" if loop and name != NAIVE else ""
    times = f"{row['records_per_second'] / plain['records_per_second']:,.0f}" if plain else ""
    return [f"{row['exchange']:.2g}", faster, figure(row["records_per_second"]), times]
