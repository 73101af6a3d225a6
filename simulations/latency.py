"""How long an exchange takes on real nodes, beside Flower's own loop, and how many records are trained in a second.

    python simulations/latency.py

Two nodes over loopback, with TLS and keys, the wearables data, uploads of about 1 MB. The same app in every row: once
as Flower runs it by itself (its own loop in the server, a process that imports all for each message in the nodes), once
with `fedsplit node start`, once with `--warm`; and split learning written naively, a mini-batch a message. The time of
an exchange is a round's without that of the trunk. Medians over rounds, without the first; writes
`simulations/results/latency.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import naive
import replicated
from processes import NAME, Deployment, deployment, free_port

from fedsplit.flower.programs import environment, flower
from fedsplit.plan.settings import Settings, check_settings
from fedsplit.server.link.runs import start_run, write_app

RESULTS = Path(__file__).parent / "results" / "latency.json"
HERE = Path(__file__).parent
RECORDS = 3200
STOCK_SERVER = """
import fedsplit.runs.server_app, fedsplit.runs.training
fedsplit.runs.training.PollingGrid = lambda grid, over: grid
fedsplit.runs.server_app.DeploymentGrid = lambda grid: grid
app = fedsplit.runs.server_app.app
"""
NAIVE_SERVER = """
import os
from flwr.serverapp import ServerApp
import naive
from fedsplit.plan.settings import Settings
app = ServerApp()
@app.main()
def main(grid, context):
    seconds = naive.train(grid, Settings.from_json(os.environ[naive.SETTINGS]), int(os.environ["NAIVE_STEPS"]))
    with open(os.environ["NAIVE_OUT"], "w") as file:
        file.write(str(seconds))
"""


def settings_for(rounds: int) -> Settings:
    """Return a pipelined run over two devices, a whole epoch of 1,600 records in each upload."""
    return check_settings(
        {
            "run": {"name": "latency", "rounds": rounds},
            "data": {"builder": "replicated:device", "task": "classification", "outputs": 7},
            "devices": {"count": 2, "test": [0]},
            "model": {"name": "sensor-cnn", "width": 16},
            "dropping": {"policy": "top-k", "k": 250},
            "protocol": {"mode": "pipelined", "chunk": "epoch"},
        }
    )


def rounds_of(folder: Path) -> dict[str, float]:
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
        trial.make_node(name, [device], settings_for(1), allow=["replicated:device"])
    return names


def stock_nodes(trial: Deployment, names: list[str], **config: str) -> None:
    """Start Flower's SuperNodes by themselves, with nothing of fedsplit around them."""
    for place, name in enumerate(names):
        home = trial.folder / name
        own = {"fedsplit-home": str(home), "fedsplit-data": f"{home}-data"} if not config else {}
        numbers = {"partition-id": place, "num-partitions": len(names)}
        node_config = " ".join(f"{key}={json.dumps(value)}" for key, value in {**own, **numbers}.items())
        command = [
            flower("flower-supernode"),
            "--superlink",
            trial.address,
            "--root-certificates",
            str(trial.authority),
        ]
        command += ["--auth-supernode-private-key", str(home / "key"), "--port", str(free_port())]
        trial.processes[name] = subprocess.Popen(
            [*command, "--node-config", node_config],
            env={**trial.environment, **config},
            stdout=(trial.folder / f"{name}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ours(folder: Path, rounds: int, *, warm: bool) -> dict[str, float]:
    """Measure fedsplit's own nodes and loop."""
    with deployment(folder) as trial:
        for name in nodes(trial):
            trial.start_node(name, warm=warm)
        config = trial.folder / "run.toml"
        config.write_text(settings_for(rounds).to_toml())
        trial.run(config, "run")
        trial.result("run")
        return rounds_of(trial.folder / "run")


def stock(folder: Path, rounds: int) -> dict[str, float]:
    """Measure the same app as Flower runs it."""
    with stock_deployment(folder) as trial:
        stock_nodes(trial, nodes(trial))
        out = trial.folder / "run"
        app = trial.folder / "app"
        app.mkdir()
        config: dict[str, str | bool] = {
            "settings": settings_for(rounds).to_json(),
            "out": str(out),
            "nodes": str(trial.folder / "server"),
        }
        write_app(app, config)
        (app / "run_server.py").write_text(STOCK_SERVER)
        start(trial, app)
        wait_for(out / "result.json")
        return rounds_of(out)


def naive_app(folder: Path, steps: int) -> dict[str, float]:
    """Measure split learning with a mini-batch in each message."""
    out = folder / "seconds"
    settings = settings_for(1).model_copy(
        update={"dropping": check_settings({**json.loads(settings_for(1).to_json()), "dropping": RANDOM}).dropping}
    )
    more = {naive.SETTINGS: settings.to_json(), "NAIVE_STEPS": str(steps), "NAIVE_OUT": str(out)}
    with stock_deployment(folder, **more) as trial:
        stock_nodes(trial, nodes(trial), **more)
        app = trial.folder / "app"
        app.mkdir()
        write_app(app, {"settings": ""}, [HERE / "naive.py", HERE / "replicated.py"])
        (app / "run_server.py").write_text(NAIVE_SERVER)
        (app / "run_client.py").write_text("from naive import app\n__all__ = ['app']\n")
        start(trial, app)
        wait_for(out)
        seconds = float(out.read_text()) / steps
    return {"exchange": seconds / 2, "round": seconds, "records_per_second": 2 * naive.BATCH / seconds}


RANDOM = {"policy": "random", "keep": 0.25}


def stock_deployment(folder: Path, **more: str) -> Any:
    """Open a deployment whose SuperLink has Flower's own waits."""
    for name in set(environment()) - set(os.environ) - {"FLWR_TELEMETRY_ENABLED"}:
        more[name] = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1.0"}.get(name, "2")
    return deployment(folder, environment=more)


def start(trial: Deployment, app: Path) -> None:
    """Submit an app."""
    os.environ["FLWR_HOME"] = trial.environment["FLWR_HOME"]
    start_run(app, NAME)


def wait_for(path: Path, timeout: float = 600) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + timeout
    while not path.exists() or not path.read_text():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path} was not written")
        time.sleep(0.5)


def main() -> None:
    """Measure all rows in turns and print the medians over repetitions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    os.environ[replicated.RECORDS] = str(RECORDS)
    os.environ["PYTHONPATH"] = str(HERE)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number in range(repeats):
            rows = {
                "naive": lambda f: naive_app(f, 3),
                "Flower's own loop": lambda f: stock(f, 6),
                "fedsplit node start": lambda f: ours(f, 8, warm=False),
                "fedsplit node start --warm": lambda f: ours(f, 20, warm=True),
            }
            for title, measure in rows.items():
                found.setdefault(title, []).append(measure(Path(place) / f"{number}-{len(found)}-{title[-4:]}"))
                print(title, {k: round(v, 3) for k, v in found[title][-1].items()}, file=sys.stderr, flush=True)
    middle = {title: {k: median(row[k] for row in rows) for k in rows[0]} for title, rows in found.items()}
    base, plain = middle["Flower's own loop"], middle["naive"]
    for title, row in middle.items():
        print(
            f"{title:28} round {row['round']:6.2f} s, exchange {row['exchange']:6.2f} s "
            f"(Flower's own {base['exchange'] / row['exchange']:5.1f} times), {row['records_per_second']:7.1f} "
            f"records/s ({row['records_per_second'] / plain['records_per_second']:7.1f} times naive)"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": found, "median": middle}, indent=2) + "\n")


if __name__ == "__main__":
    main()
