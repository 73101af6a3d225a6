"""A node in one long-lived process, which serves Flower's fleet API itself.

Flower's SuperNode looks for messages every three seconds and starts a process for each. This one looks about when the
next is expected, ever less often when nothing comes, and has everything loaded. The app that a run brings along is read
for the run's terms, never executed.

The API is internal to Flower, so this module is for one version of it, which is checked before it is imported. To the
server it is an ordinary SuperNode.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.config import get_fused_config_from_fab
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as FleetNode
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsplit.common.errors import ConfigError, FedsplitError, RunError
from fedsplit.device.link.resident import Answer
from fedsplit.device.link.supernode import TAKEOVER
from fedsplit.flower.grid import PULL_AGAIN, PULL_LONGEST, PULL_MOST, Pauses
from fedsplit.flower.record import TERMS, from_record, to_record

log = logging.getLogger(__name__)
Response = TypeVar("Response")
_SHORTEST, _LONGEST = 0.02, 3.0  # seconds between two looks
_AT_ONCE = 4  # objects of a message that are sent or fetched at once
_HEARTBEAT = 10.0  # seconds, the least that Flower takes: a node is gone after twice as long
_REFUSED = '"code":2004'  # Flower's word for an unknown key, and for one that is online already
_AWAY = 500  # and above: what a server in trouble answers, or a proxy while it is away
_BEHIND, _CLOCKS = -299.0, 4.0  # seconds by which Flower lets a node's clock be off, less one


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"key {path} is missing or damaged: it must be as fedsplit node init wrote it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"key {path} must be an ECDSA key")
    return key


class _Stopped(Exception):
    """The node was told to stop while it waited for the server."""


class WarmNode:
    """A node's connection to a SuperLink.

    Parameters
    ----------
    address : str
        HOST:PORT.
    certificates : bytes or None
        The authority that the server's certificate must be signed by; None: no TLS and no authentication.
    key : Path
        The node's private key; not used without TLS, where the node makes one up.
    seen : Path
        A file that is there once the node has been connected.
    answer : callable
        Takes a message's kind, the run's terms as JSON, and its payload; returns the answer's.
    """

    def __init__(self, address: str, certificates: bytes | None, key: Path, seen: Path, answer: Answer) -> None:
        private = _read_key(key) if certificates else ec.generate_private_key(ec.SECP384R1())
        public = private.public_key()
        self._client = FleetHttpClient.from_server_address(
            address,
            certificates is None,
            certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, public),
            ],
        )
        self._public = public_key_to_bytes(public)
        self._registers = certificates is None
        self._seen = seen
        self._answer = answer
        self._address = address
        self._stop = threading.Event()
        self._configs: dict[int, dict[str, Any]] = {}
        self._node = FleetNode()
        self._until = math.inf  # when the message at hand expires

    def serve(self, stop: threading.Event) -> None:
        """Answer messages until ``stop`` is set.

        Raises
        ------
        ConfigError
            If the server refuses the node.
        """
        self._stop = stop
        try:
            self._serve()
        except _Stopped:
            return

    def _serve(self) -> None:
        stop = self._stop
        self._activate(stop)
        beating = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        beating.start()
        try:
            pauses = Pauses(_SHORTEST, _LONGEST)
            while not stop.wait(pauses.next()):
                if self._take_message(pauses):
                    pauses.begin()
        finally:
            stop.set()  # for the thread
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, RuntimeError):
                pass  # the server finds out by itself

    def _activate(self, stop: threading.Event) -> None:
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=_HEARTBEAT)
        self._node = FleetNode()  # nothing is said in the old one's name meanwhile
        refused: float | None = None
        while True:
            try:
                if self._registers:
                    self._call(self._client.RegisterNode, RegisterNodeFleetRequest(public_key=self._public))
                self._node = FleetNode(node_id=self._call(self._client.ActivateNode, request).node_id)
                break
            except httpx.HTTPStatusError as error:
                refused = refused or time.monotonic()
                if not (_REFUSED in error.response.text and self._seen.exists()) or (
                    time.monotonic() - refused > TAKEOVER
                ):
                    raise self._refused(error) from None
            log.warning("the server refuses this node: it takes an earlier process for online, or has just started")
            if stop.wait(5):
                raise _Stopped
        self._seen.touch()
        log.info("connected to %s as node %d", self._address, self._node.node_id)

    def _refused(self, error: httpx.HTTPStatusError) -> ConfigError:
        response = error.response
        if _REFUSED in response.text:
            why = ", or another node with it is connected" if self._seen.exists() else ""
            return ConfigError(f"{self._address} refuses this node's key: it is not registered{why}")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            try:
                ahead = time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
            except (KeyError, ValueError):
                ahead = 0.0
            why = (
                f"this machine's clock is {ahead:.0f} s ahead of the server's" if not _BEHIND < ahead < _CLOCKS else ""
            )
            return ConfigError(f"{self._address} refuses this node: {why or 'its key is not registered'}")
        return ConfigError(f"{self._address} refuses this node: HTTP status {response.status_code}")

    def _beat(self, stop: threading.Event) -> None:
        """Tell the server now and then that the node is there."""
        while not stop.wait(_HEARTBEAT / 3):
            if not self._node.node_id:
                continue
            try:
                self._client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_HEARTBEAT))
            except Exception:  # whatever a server or a proxy answers: the main loop sees it, too
                continue

    def _take_message(self, pauses: Pauses) -> bool:
        """Answer a message, if there is one."""
        try:
            response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.UNAUTHORIZED:
                raise self._refused(error) from None
            log.warning("%s does not know this node any more: it was restarted, or the key was removed", self._address)
            self._activate(self._stop)
            return False
        if not response.messages_list:
            return False
        pauses.came()
        try:
            began = time.monotonic()
            message, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
            self._until = began + message.metadata.ttl
            self._send(self._reply(self._content(message, tree)), time.monotonic() - began)
        except httpx.HTTPStatusError as error:  # the run has ended meanwhile, or the message is too old
            log.warning("a message could not be answered: HTTP status %d", error.response.status_code)
        except _Stopped:
            raise
        except Exception as error:  # whatever else a message can hold: one must not end the node
            log.warning("a message could not be answered: %s", type(error).__name__)
        finally:
            self._until = math.inf
        return True

    def _content(self, message: Message, tree: ObjectTree) -> Message:
        """Fetch a message's content."""
        run = message.metadata.run_id
        pull = make_pull_object_fn_protobuf(partial(self._call, self._client.PullObject), self._node, run)
        confirm = make_confirm_message_received_fn_protobuf(
            partial(self._call, self._client.ConfirmMessageReceived), self._node, run
        )
        whole = pull_and_inflate_object_from_tree(
            tree,
            pull,
            confirm,
            return_type=Message,
            max_concurrent_pulls=_AT_ONCE,
            initial_backoff=PULL_AGAIN,
            backoff_cap=PULL_LONGEST,
            max_time=PULL_MOST,
        )
        whole.metadata.__dict__["_message_id"] = tree.object_id
        return whole

    def _reply(self, message: Message) -> Message:
        kind, run = message.metadata.message_type, message.metadata.run_id
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, self._node.node_id
        began = time.monotonic()
        try:
            payload = self._answer(kind, self._terms(run), from_record(message.content))
        except FedsplitError as error:
            log.warning("%s refused: %s", kind, error)
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        log.info("%s answered in %.3f s: %d bytes left", kind, time.monotonic() - began, len(payload))
        return Message(to_record(payload), reply_to=message)

    def _terms(self, run: int) -> str:
        if run not in self._configs:
            info = run_from_proto(self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run)).run)
            request = GetFabRequest(node=self._node, hash_str=info.fab_hash, run_id=run)
            app = fab_from_proto(self._call(self._client.GetFab, request).fab)
            self._configs = {run: dict(get_fused_config_from_fab(app.content, info))}
        terms = self._configs[run].get(TERMS)
        if not isinstance(terms, str):
            raise RunError("the run does not bring its terms: submit it with fedsplit run")
        return terms

    def _send(self, reply: Message, seconds: float) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply) if reply.has_content() else reply)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            response = self._call(self._client.PushMessages, request)
            push = make_push_object_fn_protobuf(
                partial(self._call, self._client.PushObject),
                self._node,
                reply.metadata.run_id,
                response.session_id,
            )
            push_objects(
                objects, push, object_ids_to_push=set(response.objects_to_push), max_concurrent_pushes=_AT_ONCE
            )

    def _call(self, method: Callable[[Any], Response], request: Any) -> Response:
        """Call the server, again and again while it is away, at most until the message at hand has expired."""
        pause = 0.1
        while True:
            try:
                response = method(request)
            except (httpx.RequestError, ValueError) as error:  # also if what answers is no SuperLink, but a proxy
                reason = type(error).__name__
            except httpx.HTTPStatusError as error:
                if error.response.status_code < _AWAY:
                    raise
                reason = f"HTTP status {error.response.status_code}"
            else:
                if pause > 0.1:
                    log.warning("%s is there again", self._address)
                return response
            if pause == 0.1:
                log.warning("%s is away (%s), trying again", self._address, reason)
            if self._stop.wait(pause):
                raise _Stopped
            if time.monotonic() > self._until:
                raise RunError("the message has expired")
            pause = min(2 * pause, _LONGEST)
