"""Runs on a SuperLink: what goes there, and what became of it."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import tomli_w

from fedsplit.common.errors import ConfigError
from fedsplit.flower.programs import run_flower
from fedsplit.flower.record import TERMS
from fedsplit.server.link.folder import server_of


def submit(terms_json: str, name: str, folder: Path, *, resume: bool, modules: Sequence[Path] = ()) -> str:
    """Start a run on a SuperLink and return its id.

    The app that is sent holds the nodes' terms and ``modules``. It holds none of fedsplit's code, which nodes and
    server have installed. The settings themselves are in the run folder.

    Parameters
    ----------
    terms_json : str
        The nodes' terms.
    name : str
        Of the SuperLink.
    folder : Path
        The run folder.
    resume : bool
        Whether the run goes on from its last checkpoint.
    modules : sequence of Path
        The user's own modules and packages that the settings name.

    Raises
    ------
    ConfigError
        If the SuperLink is not known, has no nodes, or refuses the run.
    """
    server = server_of(name)
    if server is not None and not server.owners():
        raise ConfigError(f"SuperLink {name!r} has no nodes yet: let them in with fedsplit server register")
    config: dict[str, str | bool] = {TERMS: terms_json, "out": str(folder.resolve()), "resume": resume}
    config["nodes"] = str(server.folder) if server else ""
    with tempfile.TemporaryDirectory() as app:
        write_app(Path(app), config, modules)
        return start_run(Path(app), name)


def write_app(folder: Path, config: dict[str, str | bool], modules: Sequence[Path] = ()) -> None:
    """Write the Flower app of a run.

    Parameters
    ----------
    folder : Path
        Is there already.
    config : dict
        The run config.
    modules : sequence of Path
        The user's own files and folders, which are copied.
    """
    for side in ("server", "client"):
        text = f"from fedsplit.{side}_app import app\n__all__ = ['app']\n"
        (folder / f"run_{side}.py").write_text(text, encoding="utf-8")
    for module in modules:
        if module.is_dir():
            copytree(module, folder / module.name, ignore=ignore_patterns("__pycache__"))
        else:
            copy(module, folder)
    components = {"serverapp": "run_server:app", "clientapp": "run_client:app"}
    project = {
        "project": {"name": "fedsplit-run", "version": "1.0.0", "description": "", "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "fedsplit", "components": components, "config": config}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")


def start_run(app: Path, name: str) -> str:
    """Start a Flower app on a SuperLink and return the run's id; raises ConfigError."""
    said = run_flower(["run", str(app), name, "--format", "json"])
    try:
        return str(json.loads(said)["run-id"])
    except (ValueError, KeyError):
        raise ConfigError(f"SuperLink {name!r} did not start the run: {said.strip()[:300]}") from None


def own_modules(references: Iterable[str], folders: Sequence[Path]) -> list[Path]:
    """Return the modules and packages that hold a user's own ``module:Name``, to go with the run.

    They are looked for in the folders, in their order, as Python does; what is nowhere there is installed, or else
    missed where the run trains.
    """
    tops = {reference.partition(":")[0].partition(".")[0] for reference in references} - {"fedsplit"}
    found = (next(filter(None, (_own_module(folder, top) for folder in folders)), None) for top in sorted(tops))
    return [path for path in found if path is not None]


def _own_module(folder: Path, name: str) -> Path | None:
    package, module = folder / name, folder / f"{name}.py"
    if (package / "__init__.py").exists():
        return package
    return module if module.exists() else None


def run_status(run: str, name: str) -> str:
    """Return Flower's word for how a run is: running, or finished and how."""
    try:
        said = json.loads(run_flower(["ls", "--run-id", run, name, "--format", "json"]))
    except ValueError:
        return "unknown"
    found = [str(r.get("status")) for r in said.get("runs", [])]
    return found[0] if found else "unknown"
