"""From a run's terms to a node: a real one in its own folder, and what simulated ones share with it."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fedsplit.common.errors import ConfigError, FedsplitError, RunError, StateError
from fedsplit.data import Source, open_own, open_source
from fedsplit.data.devices import describe
from fedsplit.data.source import choose_test
from fedsplit.device.at_home import AtHomeNode
from fedsplit.device.home import Home
from fedsplit.device.link import KINDS
from fedsplit.device.node import Node
from fedsplit.device.pending import NodeState
from fedsplit.model.head import Head
from fedsplit.model.tasks import task_of
from fedsplit.plan.preflight import check_limits
from fedsplit.wire.terms import Terms

log = logging.getLogger(__name__)
_KNOWN_DEVICES = 256  # of a real node: those whose records were compared with the ones it knows


@lru_cache(maxsize=4)
def real_node(terms_json: str, folder: str, data: str | None = None) -> Node:
    """Return a real node, whose folder ``fedsplit node init`` has made; its guard enforces the owner's limits.

    Parameters
    ----------
    terms_json : str
        The server's :class:`fedsplit.wire.terms.Terms`.
    folder : str
    data : str, optional
        The folder or file with the node's own records; without it they are those that the terms name.

    Raises
    ------
    FedsplitError
        If the terms or something of the folder are not as they must be, or the owner does not allow the run.
    """
    home, terms = Home(Path(folder)), Terms.from_json(terms_json)
    check_allowed(terms.named(), home.allowed)
    policy = terms.model.dropping.built(home.allowed)
    layer = terms.model.build(policy, home.allowed)
    source = open_records(terms) if data is None else open_own(data, home.devices, _absent(terms))
    if home.limits.enforce:
        check_limits(terms, source, layer, policy, home.limits, home.devices)
    return node_kind(terms)(
        layer,
        policy,
        home.devices,
        lru_cache(maxsize=_KNOWN_DEVICES)(lambda device: home.known(device, source.device(device))),
        home.device_secret,
        lambda run: NodeState(home.run_folder(run)),
        lambda run, ledger: home.guard(ledger, layer),
    )


def node_kind(terms: Terms) -> Callable[..., Node]:
    """Return what makes a run's nodes: it takes the arguments of :class:`Node` that the terms do not say."""
    model = terms.model
    said: dict[str, Any] = {"dtype": model.dtype, "keyed": terms.keyed}
    if terms.head is None:
        return partial(Node, **said)
    return partial(AtHomeNode, **said, head=Head(**terms.head.model_dump(), task=task_of(model.task)))


def open_records(terms: Terms) -> Source:
    """Open the data that a run's terms name; raises ConfigError or DataError."""
    model, data = terms.model, terms.data.model_dump()
    shape = model.layer.input_shape
    nobody = terms.data.name is terms.data.folder is terms.data.builder is None
    source = open_source(
        **data, task=model.task, outputs=model.outputs, seed=terms.seed, shape=shape if nobody else None
    )
    if source.input_shape != shape:
        raise ConfigError(f"the first layer takes records of shape {shape}, the data's have {source.input_shape}")
    return source


def _absent(terms: Terms) -> Source:
    """Return what records are like, without any."""
    model, data = terms.model, terms.data
    like = describe(model.layer.input_shape, task=model.task, outputs=model.outputs, count=data.count, test=())
    return replace(like, chosen=choose_test(data.test, data.count))


def check_allowed(named: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Refuse code or files of this machine, named by a server, that the node's owner does not allow.

    Raises
    ------
    ConfigError
    """
    for setting, name in named.items():
        if name not in allowed:
            raise ConfigError(f"{setting} {name!r} is not among what the node's owner allows (allow in node.toml)")


def answer(node: Callable[[], Node], kind: str, payload: bytes) -> bytes:
    """Return a node's answer to a payload.

    Parameters
    ----------
    node : callable
        Returns the node; its errors are treated as those of the answer.
    kind : str
        Of the message.
    payload : bytes
        Packed for the wire, as the answer is.

    Raises
    ------
    FedsplitError
        Its text holds nothing of a record, since the server reads it. This is so for every error.
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


def _answer(node: Node, kind: str, payload: bytes) -> bytes:
    if kind == "query":
        return node.register().to_bytes()
    if kind not in KINDS:
        raise RunError("there is no message of this kind")
    return node.answer(kind, payload)
