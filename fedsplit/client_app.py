"""The Flower ClientApp: one node's side of every exchange."""

from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.assemble import real_node, simulated_node
from fedsplit.config import load_settings
from fedsplit.device import Node
from fedsplit.errors import ConfigError, FedsplitError, StateError
from fedsplit.wire import Download, from_record, to_record

APP_FOLDER = Path(__file__).parent.parent
HOME = "fedsplit-home"  # key of a real node's folder in its node config
STATE_FOLDER = Path.home() / ".fedsplit" / "state"


def client_app(settings_json: str | None = None, state_folder: str | None = None) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    settings_json : str, optional
        The run's settings; without it they are read from the file that the run config names.
    state_folder : str, optional
        Where virtual nodes keep their state; by default below the user's home.
    """
    built = ClientApp()
    # handlers are module-level functions, so that Ray pickles them by name and this process's caches persist
    for register, answer in ((built.query, _register), (built.train, _exchange), (built.evaluate, _evaluate)):
        register()(partial(_handle, answer=answer, settings_json=settings_json, state_folder=state_folder))
    return built


def _handle(message: Message, context: Context, *, answer, settings_json, state_folder) -> Message:  # type: ignore[no-untyped-def]
    try:
        node = _node(context, settings_json, state_folder)
        return Message(to_record(answer(node, message)), reply_to=message)
    except StateError:
        raise RuntimeError("fedsplit: the node's own state is missing or damaged: nothing leaves") from None
    except FedsplitError as error:
        raise type(error)(str(error)) from None
    except Exception as error:
        # an exception's text reaches the server, and could hold a record
        raise RuntimeError(f"fedsplit: {type(error).__name__} in a {message.metadata.message_type} message") from None


def _node(context: Context, settings_json: str | None, state_folder: str | None) -> Node:
    if settings_json is None:
        settings_json = load_settings(APP_FOLDER / str(context.run_config["config"])).to_json()
    config = context.node_config
    if HOME in config:
        return real_node(settings_json, str(config[HOME]))
    folder = state_folder or str(STATE_FOLDER)
    if state_folder and not Path(state_folder).parent.exists():
        # the next message may reach another machine, where nobody knows what has left
        raise ConfigError(f"run folder {Path(state_folder).parent} is not there: all Ray nodes must share it")
    return simulated_node(settings_json, int(config["partition-id"]), int(config["num-partitions"]), folder)


def _register(node: Node, message: Message) -> bytes:
    return node.register().to_bytes()


def _exchange(node: Node, message: Message) -> bytes:
    return node.exchange(_download(node, message)).to_bytes()


def _evaluate(node: Node, message: Message) -> bytes:
    return node.evaluate(_download(node, message)).to_bytes()


def _download(node: Node, message: Message) -> Download:
    return Download.from_bytes(from_record(message.content), parameters=node.first_layer.size)


app = client_app()
