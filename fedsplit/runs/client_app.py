"""The Flower ClientApp: one node's side of every exchange.

Flower starts a process for each message of a deployed node, so what is imported here is paid for by every message:
torch and all that needs it comes later, and where the node's resident process answers not at all.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.common.errors import ConfigError
from fedsplit.device.link import DATA, HOME, KINDS, SOCKET, resident
from fedsplit.flower.record import TERMS, from_record, to_record

if TYPE_CHECKING:
    from fedsplit.device.node import Node

APP_FOLDER = Path(__file__).parents[2]
CONFIG = "config"  # the key of a run config without terms: a settings file in the app
STATE_FOLDER = Path.home() / ".fedsplit" / "state"


def client_app(simulated_json: str | None = None, state_folder: str | None = None) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    simulated_json : str, optional
        What a simulation tells its nodes, a :class:`fedsplit.runs.nodes.Simulated`; without it the run config names
        the settings file that says it.
    state_folder : str, optional
        Where virtual nodes keep their state; by default below the user's home.
    """
    built = ClientApp()
    # handlers are module-level functions, so that Ray pickles them by name and this process's caches persist
    for kind in KINDS:
        getattr(built, kind)()(partial(_handle, kind=kind, simulated_json=simulated_json, state_folder=state_folder))
    return built


def _handle(
    message: Message, context: Context, *, kind: str, simulated_json: str | None, state_folder: str | None
) -> Message:
    config, payload = context.node_config, from_record(message.content)
    if SOCKET in config:
        given = resident.ask(str(config[SOCKET]), kind, _terms(context), payload)
    else:
        from fedsplit.device.nodes import answer

        given = answer(lambda: _node(context, simulated_json, state_folder), kind, payload)
    return Message(to_record(given), reply_to=message)


def _node(context: Context, simulated_json: str | None, state_folder: str | None) -> "Node":
    config = context.node_config
    if HOME in config:
        from fedsplit.device.nodes import real_node

        return real_node(_terms(context), str(config[HOME]), str(config[DATA]) if DATA in config else None)
    from fedsplit.runs.nodes import simulated_by, simulated_node

    folder = state_folder or str(STATE_FOLDER)
    if state_folder and not Path(state_folder).parent.exists():
        # the next message may reach another machine, where nobody knows what has left
        raise ConfigError(f"run folder {Path(state_folder).parent} is not there: all Ray nodes must share it")
    told = simulated_json or simulated_by(str(APP_FOLDER / str(context.run_config[CONFIG])))
    return simulated_node(told, int(config["partition-id"]), int(config["num-partitions"]), folder)


def _terms(context: Context) -> str:
    """Return a run's terms for a real node: those of the run config, or of the settings file that this names."""
    config = context.run_config
    if TERMS in config:
        return str(config[TERMS])
    from fedsplit.runs.nodes import terms_by

    path = (APP_FOLDER / str(config[CONFIG])).resolve()
    if not path.is_relative_to(APP_FOLDER.resolve()):  # what is wrong with a file is told to the server
        raise ConfigError("the run's settings file must be in the app")
    return terms_by(str(path), str(context.node_config[HOME]))


app = client_app()
