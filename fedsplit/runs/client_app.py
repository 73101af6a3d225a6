"""The Flower ClientApp: one node's side of every exchange.

Flower starts a process for each message of a deployed node, so what is imported here is paid for by every message:
torch and all that needs it comes later, and where the node's resident process answers not at all.
"""

import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp

from fedsplit.common.errors import ConfigError, FedsplitError, RunError, StateError
from fedsplit.device.link import resident
from fedsplit.flower.record import from_record, to_record

if TYPE_CHECKING:
    from fedsplit.device.node import Node

log = logging.getLogger(__name__)
APP_FOLDER = Path(__file__).parents[2]
HOME, DATA, SOCKET = "fedsplit-home", "fedsplit-data", "fedsplit-socket"  # keys of a real node's node config
CONFIG, SETTINGS = "config", "settings"  # keys of a run config: a file in the app, or the settings themselves
STATE_FOLDER = Path.home() / ".fedsplit" / "state"
KINDS = ("query", "train", "evaluate")


def client_app(settings_json: str | None = None, state_folder: str | None = None) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    settings_json : str, optional
        The run's settings; without it they are in the run config.
    state_folder : str, optional
        Where virtual nodes keep their state; by default below the user's home.
    """
    built = ClientApp()
    # handlers are module-level functions, so that Ray pickles them by name and this process's caches persist
    for kind in KINDS:
        getattr(built, kind)()(partial(_handle, kind=kind, settings_json=settings_json, state_folder=state_folder))
    return built


def _handle(
    message: Message, context: Context, *, kind: str, settings_json: str | None, state_folder: str | None
) -> Message:
    config = context.node_config
    if SOCKET in config:
        payload = resident.ask(
            str(config[SOCKET]), kind, run_settings(context.run_config), from_record(message.content)
        )
    else:
        payload = answer(lambda: _node(context, settings_json, state_folder), kind, from_record(message.content))
    return Message(to_record(payload), reply_to=message)


def answer(node: Callable[[], "Node"], kind: str, payload: bytes) -> bytes:
    """Return a node's answer to a payload.

    Raises
    ------
    FedsplitError
        With a text that holds nothing of a record, as every other error, too: it reaches the server.
    """
    try:
        return _answer(node(), kind, payload)
    except StateError as error:
        log.warning("a %s message is refused: %s", kind, error)
        raise StateError("the node's own state is missing or damaged: nothing leaves") from None
    except FedsplitError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]  # its text could hold records
        log.warning("a %s message fails: %s at %s:%s", kind, type(error).__name__, where.filename, where.lineno)
        raise RunError(f"{type(error).__name__} in a {kind} message") from None


def _answer(node: "Node", kind: str, payload: bytes) -> bytes:
    if kind == "query":
        return node.register().to_bytes()
    if kind not in KINDS:
        raise RunError("there is no message of this kind")
    return node.answer(kind, payload)


def run_settings(run_config: UserConfig) -> str:
    """Return a run's settings as JSON; they are in its run config, or in the file that this names."""
    if SETTINGS in run_config:
        return str(run_config[SETTINGS])
    from fedsplit.plan.settings import load_settings

    return load_settings(APP_FOLDER / str(run_config[CONFIG])).to_json()


def _node(context: Context, settings_json: str | None, state_folder: str | None) -> "Node":
    from fedsplit.runs.nodes import real_node, simulated_node

    config, settings_json = context.node_config, settings_json or run_settings(context.run_config)
    if HOME in config:
        return real_node(settings_json, str(config[HOME]), str(config[DATA]) if DATA in config else None)
    folder = state_folder or str(STATE_FOLDER)
    if state_folder and not Path(state_folder).parent.exists():
        # the next message may reach another machine, where nobody knows what has left
        raise ConfigError(f"run folder {Path(state_folder).parent} is not there: all Ray nodes must share it")
    return simulated_node(settings_json, int(config["partition-id"]), int(config["num-partitions"]), folder)


app = client_app()
