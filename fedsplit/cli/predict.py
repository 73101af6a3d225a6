"""Predictions: ``fedsplit export | serve | token | predict``."""

import csv
import gc
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer

from fedsplit.cli.console import stderr
from fedsplit.cli.extras import need
from fedsplit.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsplit.device.remote import Remote


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    device: Annotated[Path, typer.Option(help="Where what a device needs goes.")],
    onnx: Annotated[bool, typer.Option(help="Also the first layer for other runtimes; dropping is not in it.")] = False,
) -> None:
    """Write what a device needs to ask for predictions: the first layer, the policy, the scaling of its input."""
    from fedsplit.cli.node import find_functions
    from fedsplit.runs.folder import run_bundle

    find_functions(run)
    bundle = run_bundle(run)
    others: dict[str, bytes] = {}
    if onnx:
        from fedsplit.device.onnx_export import ONNX, onnx_model

        others[ONNX] = onnx_model(bundle)
    bundle.save(device, others)
    print(f"wrote {device} of model {bundle.model}: give it to the devices, the trunk is not in it")


def token(
    path: Annotated[Path, typer.Argument(help="The file of the tokens' hashes.")],
    name: Annotated[str, typer.Argument(help="Whose token it is, one word.")],
) -> None:
    """Make a token for somebody; it is shown once, the file holds its hash."""
    from fedsplit.service.tokens import add_token

    print(add_token(path, name))


def serve(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; one service can serve several models.")],
    certs: Annotated[Path | None, typer.Option(help="Folder made by fedsplit certs.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File made by fedsplit token.")] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS and no tokens: for a trial on one machine.")] = False,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 9443,
    rate: Annotated[float, typer.Option(help="Requests a second for each token; 0: any number.")] = 0.0,
    demo: Annotated[
        bool, typer.Option(help="Add a page where a prediction, and attacks on it, can be watched.")
    ] = False,
    false_alarms: Annotated[
        float,
        typer.Option(help="Novelty: alarms a day that a device may give where all is normal: an aim, no promise."),
    ] = 10.0,
    watcher: Annotated[
        list[str] | None, typer.Option(help="Novelty: whose token may see all devices' scores; repeatable.")
    ] = None,
) -> None:
    """Answer devices with predictions, from what dropping left of their records, or watch them for what is new."""
    need("serve")
    import logging

    from fedsplit.cli.node import find_functions
    from fedsplit.server.link.folder import ServerFolder, check_pair, check_port_free
    from fedsplit.service.app import service
    from fedsplit.service.running import run as run_service
    from fedsplit.service.served import Served
    from fedsplit.service.tokens import Tokens

    logging.getLogger("fedsplit").setLevel(logging.INFO)
    if insecure != (certs is None) or insecure != (tokens is None):
        raise ConfigError("a service needs --certs and --tokens, or else --insecure")
    if rate < 0:
        raise ConfigError(f"--rate must be at least 0, got {rate:g}")
    if insecure and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(f"--insecure is for this machine alone: --host must be 127.0.0.1, got {host}")
    files: dict[str, Any] = {}
    if certs:
        _, certificate, key = ServerFolder(certs).certificates
        files = {"ssl_certfile": certificate, "ssl_keyfile": key}
        check_pair(certificate, key)
    for run in runs:
        find_functions(run)
    if not 0 < false_alarms < math.inf:
        raise ConfigError(f"--false-alarms must be above 0, got {false_alarms:g}")
    models = [Served.of_run(run) for run in runs]
    known = Tokens(tokens) if tokens else None
    if strangers := set(watcher or ()) - set(known.names if known else ()):
        raise ConfigError(f"--watcher {min(strangers)}: there is no token of that name")
    app = service(models, known, rate=rate)
    if demo:
        import torch

        from fedsplit.service.demo import Attacker, add_demo

        torch.set_num_threads(1)  # attacks train small networks: threads would mostly wait for each other
        add_demo(app, [Attacker.of_run(run, model) for run, model in zip(runs, models, strict=True)])
    watching = [(run, model) for run, model in zip(runs, models, strict=True) if model.detector]
    if watching:
        from fedsplit.runs.folder import RunFolder
        from fedsplit.service.fleet import Fleet, add_fleets

        add_fleets(app, [Fleet(model, RunFolder(run).fleet, false_alarms) for run, model in watching], watcher or ())
    check_port_free(host, port)
    gc.collect()
    gc.freeze()  # what is there stays: looking through all of it again and again would hold requests up
    url = f"http{'' if insecure else 's'}://{host}:{port}"
    for run, model in zip(runs, models, strict=True):
        print(f"serving {run} as model {model.name} at {url}", flush=True)
    if demo:
        print(f"the page is at {url}/demo/", flush=True)
    if watching:
        print(f"the devices that are watched are at {url}/fleet/", flush=True)
    run_service(app, host, port, files)


def predict(
    device: Annotated[Path, typer.Option(help="What fedsplit export wrote.")],
    home: Annotated[Path, typer.Option(help="The device's own folder, made by fedsplit node init.")],
    records: Annotated[Path, typer.Option("--input", help="Raw records: .npy, .npz with x, or .csv, a record a line.")],
    server: Annotated[str | None, typer.Option(help="The service, https://HOST:PORT.")] = None,
    offline: Annotated[Path | None, typer.Option(help="Run folder, to predict here instead.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The authority (ca.crt) of the server's certificate.")] = None,
    insecure: Annotated[bool, typer.Option(help="No TLS: for a trial on one machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with the outputs.")] = False,
) -> None:
    """Predict records that stay here; the token is taken from the variable FEDSPLIT_TOKEN."""
    from fedsplit.device.bundle import Bundle
    from fedsplit.device.home import Home
    from fedsplit.device.predictor import Predictor

    if (server is None) == (offline is None):
        raise ConfigError("give either --server or --offline")
    own = Home(home)
    bundle = Bundle.load(device, own.allowed)
    if bundle.task.watches:
        raise ConfigError(f"the model in {device} watches devices: see fedsplit monitor")
    raw = read_records(records, bundle.layer.input_shape)
    own.check()
    if server is not None:
        found = Predictor(bundle, own, remote(server, bundle.model, ca, insecure=insecure)).predict(raw)
    else:
        assert offline is not None
        found = Predictor(bundle, own, _offline(offline)).predict(raw)
    if as_json:
        outputs = [None if reason else row for row, reason in zip(found.outputs.tolist(), found.refused, strict=True)]
        print(json.dumps({"predictions": found.values(), "outputs": outputs, "refused": found.why()}))
    else:
        for value in found.values():
            print("-" if value is None else value)
    for reason, count in found.why().items():
        said = f"{count} records did not leave, for the limit on {reason} in {own.folder / 'limits.toml'}"
        stderr.print(said, markup=False, highlight=False)


def remote(server: str, model: str, ca: Path | None, *, insecure: bool) -> "Remote":
    """Return a service's answers about a model. The variable FEDSPLIT_TOKEN holds the token.

    Parameters
    ----------
    server : str
        URL of the service.
    model : str
        Name of the model.
    ca : Path or None
        File of the certificate authority (PEM); None is for the usual authorities.
    insecure : bool
        Whether ``http://``, which takes no token, is allowed.

    Raises
    ------
    ConfigError
        If the URL is not allowed, or the token is missing.
    """
    from fedsplit.device.remote import Remote

    if server.startswith("http://") and not insecure:
        raise ConfigError("--server must be https://HOST:PORT; for a trial on one machine add --insecure")
    token = os.environ.get("FEDSPLIT_TOKEN")
    if server.startswith("https://") and not token:
        raise ConfigError("a service with TLS wants a token: put it in the variable FEDSPLIT_TOKEN")
    return Remote(server, model, token, ca)


def _offline(run: Path) -> Any:
    from fedsplit.cli.node import find_functions
    from fedsplit.service.served import Served

    find_functions(run)
    model = Served.of_run(run)
    return lambda payload: model.outputs([model.read(payload)])


def read_records(path: Path, shape: tuple[int, ...]) -> Any:
    """Return the records in a .npy, .npz or .csv file; raises DataError."""
    readers: dict[str, Callable[[Path], Any]] = {".npy": _npy, ".npz": _npz, ".csv": partial(_csv, shape=shape)}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"input {path} must be a .npy, .npz or .csv file")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"input {path} cannot be read: {error.strerror or 'it is damaged'}") from None
    except (ValueError, KeyError, EOFError, TypeError, AttributeError, csv.Error, BadZipFile):
        form = {".csv": f"a line of {math.prod(shape)} numbers for each record, and no header", ".npz": "x"}
        said = f"it must hold records of shape {shape}{': ' if path.suffix in form else ''}{form.get(path.suffix, '')}"
        raise DataError(f"input {path} cannot be read: {said}") from None


def _npy(path: Path) -> Any:
    import numpy as np

    return np.load(path, allow_pickle=False)


def _npz(path: Path) -> Any:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return file["x"]


def _csv(path: Path, shape: tuple[int, ...]) -> Any:
    import numpy as np

    with path.open(newline="", encoding="utf-8") as file:
        rows = np.array([[float(cell) for cell in row] for row in csv.reader(file) if row])
    return rows.reshape(len(rows), *shape)
