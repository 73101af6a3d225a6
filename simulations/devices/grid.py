"""Flower's grid on devices of a virtual clock."""

from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedsplit.flower.grid import InProcessGrid
from fedsplit.server.virtual.clock import VirtualClock, Work
from simulations.devices.exchanges import Cost, array_bytes

Records = Callable[[Message], tuple[int, int]]


class ClockedGrid(InProcessGrid):
    """Runs a ClientApp on devices of a virtual clock: a reply from one that is away, late or lost does not come.

    Parameters
    ----------
    app : ClientApp
    count : int
        Devices, each a node of its own with its id as partition id.
    devices : iterable of int
        Those that are asked.
    clock : VirtualClock
    cost : Cost
    records : callable
        Returns from a reply how many records it took on the way to the cut, and how many on the way back.
    """

    def __init__(
        self,
        app: ClientApp,
        count: int,
        devices: Iterable[int],
        clock: VirtualClock,
        cost: Cost,
        records: Records,
    ) -> None:
        super().__init__(app, count)
        nodes = {int(context.node_config["partition-id"]): node for node, context in self._contexts.items()}
        self._node = {device: nodes[device] for device in devices}
        self._clock = clock
        self._cost = cost
        self._records = records
        self._round = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the devices' nodes."""
        return list(self._node.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Have the devices that are there answer, and return the replies that come in time."""
        asked = {message.metadata.dst_node_id: message for message in messages}
        devices = np.array([d for d, node in self._node.items() if node in asked], dtype=np.int64)
        if not len(devices):
            return []
        if all(message.metadata.message_type != "train.backward" for message in asked.values()):
            self._round += 1  # the backward half is of the same round: whoever was there still is
            self._clock.begin(self._round)
            devices = self._clock.there(devices, least=1)
        sent = [asked[self._node[device]] for device in devices.tolist()]
        replies = list(self.pull_messages(self.push_messages(sent)))
        heard = self._exchange(devices, sent, replies)
        return [reply for reply, there in zip(replies, heard, strict=True) if there]

    def _exchange(self, devices: NDArray[np.int64], sent: list[Message], replies: list[Message]) -> NDArray[np.bool_]:
        """Let the exchange take its time; return which devices are heard."""
        forward, back = np.array([self._records(reply) for reply in replies]).T
        work = Work(
            devices,
            np.array([array_bytes(message.content) for message in sent]),
            np.array([array_bytes(reply.content) for reply in replies]),
            forward * self._cost.seconds[0] + back * self._cost.seconds[1],
        )
        outcome = self._clock.exchange(work)
        self._clock.note_records(work, outcome, forward, back)
        return outcome.heard
