"""A server that sends the nodes of a run what it likes, and looks for records in all that it hears."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import simulated_json, small_settings
from flwr.app import Context, Message, MessageType, RecordDict
from proposals import WIDTH, N, dense, flat
from torch import nn

from fedsplit import DeviceData, SplitModel
from fedsplit.device.link import HOME
from fedsplit.flower.grid import InProcessGrid
from fedsplit.flower.record import TERMS, from_record, to_record
from fedsplit.model.tasks.targets import Classes
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from fedsplit.runs.client_app import client_app
from fedsplit.server.answers import PendingBlock, check_upload
from fedsplit.wire.exchange import CutGradients, Download, Upload, weights_digest
from fedsplit.wire.ledger import Reason

NOTHING_LEAVES = "StateError: the node's own state is missing or damaged: nothing leaves"


def private(device_id: int, num_devices: int) -> DeviceData:
    """Records whose numbers can be looked for in whatever a node says."""
    rng = np.random.default_rng(1000 + device_id)
    x, y = rng.normal(size=(30, N)).astype(np.float32), rng.integers(0, 3, 30)
    return DeviceData(train=(x[:20], y[:20]), test=(x[20:], y[20:]))


def model() -> SplitModel:
    net = nn.Sequential(nn.Linear(N, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        net[0].weight[:] = torch.from_numpy(dense(42))
        net[0].bias[:] = 0
    return SplitModel.from_sequential(net, input_shape=(N,))


def run_settings(folder: Path, lines: str = "", mode: str = "enforce", **changes: Any) -> Settings:
    """A run over three devices, whose guard has the limits of the given lines."""
    folder.mkdir(exist_ok=True)
    (folder / "limits.toml").write_text(lines)
    given = {
        "data": {"builder": "hostile_server:private"},
        "model": {"builder": "hostile_server:model"},
        "devices": {"count": 3, "test": [2], "per-node": 3},
        "dropping": {"policy": "top-k", "k": 2},
        "guard": {"mode": mode, "limits": str(folder / "limits.toml")},
    }
    return small_settings(
        **{section: {**given.get(section, {}), **changes.get(section, {})} for section in given | changes}
    )


class Server:
    """Talks to the nodes of a run, and remembers all that it hears."""

    def __init__(self, settings: Settings, folder: Path, home: Path | None = None) -> None:
        experiment = Experiment(settings)
        self.layer, self.terms = experiment.model.first_layer, experiment.terms.to_json()
        self.app = client_app(simulated_json(settings), str(folder / "nodes"))
        nodes = -(-settings.devices.count // settings.devices.per_node) if settings.devices.count else 0
        self.grid = InProcessGrid(self.app, nodes)
        self.home, self.bits = home, settings.dropping.bits
        self.states = folder / "nodes"
        self.released: dict[tuple[int, int], np.ndarray] = {}  # records of each device, by weights and round
        self.heard: list[bytes] = []
        self.errors: list[str] = []
        self.asked = 0

    def ask(
        self,
        round_number: int = 1,
        *,
        weights: np.ndarray | None = None,
        rows: Any = None,
        run: int = 1,
        pending: Any = (),
        per_device: bool = False,
    ) -> Download:
        """A download that asks for all records of all devices, unless ``rows`` says otherwise."""
        rows = [(0, 0, 0, 20), (1, 0, 0, 20), (2, 0, 0, 20)] if rows is None else rows
        weights = flat(dense(42)) if weights is None else weights
        schedule = np.array(rows, np.int64).reshape(-1, 4)
        self.asked += 1
        return Download(run, round_number, 0, per_device, weights, schedule, list(pending), nonce=self.asked)

    def send(
        self, download: Download, kind: str = MessageType.TRAIN, node: int = 2, *, honest: bool = True
    ) -> Upload | None:
        """Return what the node answers; None if that is an error. An honest server accepts the answer."""
        message = Message(to_record(download.to_bytes()), node, kind, ttl=100.0)
        if self.home is not None:
            context = Context(1, node, {HOME: str(self.home)}, RecordDict(), {TERMS: self.terms})
            try:
                reply = self.app(message, context)
            except Exception as error:  # what Flower would send
                self.errors.append(f"{type(error).__name__}: {error}")
                return None
        else:
            (reply,) = self.grid.send_and_receive([message])
        if reply.has_error():
            self.errors.append(str(reply.error.reason))
            return None
        self.heard.append(from_record(reply.content))
        upload = Upload.from_bytes(self.heard[-1], parameters=self.layer.size)
        if honest:
            blocks = [PendingBlock(cut, self.released[cut.digest, cut.round_number]) for cut in download.pending]
            check_upload(upload, download, blocks, self.layer.width, Classes(3))
        self.released[weights_digest(download.weights), download.round_number] = upload.release.records
        return upload

    def cut(self, upload: Upload, download: Download, deltas: np.ndarray) -> CutGradients:
        """Cut gradients for what was released: ``deltas`` (records, width) at what was sent."""
        released = upload.release
        pattern = np.unpackbits(released.bitmap, axis=1, count=WIDTH, bitorder="little").astype(bool)
        own = np.repeat(released.devices, released.records)
        lengths = [int(pattern[own == d].sum()) for d in released.devices]
        digest = weights_digest(download.weights)
        values = np.asarray(deltas, np.float32)[pattern]
        return CutGradients.pack(download.round_number, digest, released.devices, np.array(lengths), values, "float32")


Start = Callable[..., Server]


def said(server: Server, *texts: str) -> None:
    """Look for the numbers of all records: as bytes in payloads, as decimals in texts."""
    records = [private(device, 3) for device in range(3)]
    numbers = np.concatenate([part.x.ravel() for data in records for part in (data.train, data.test)])
    wanted = {struct.pack(f"{order}{kind}", v) for v in numbers.tolist() for order in "<>" for kind in "fd"}
    for payload in server.heard:
        assert not wanted & {payload[i : i + size] for size in (4, 8) for i in range(len(payload) - size + 1)}
    for text in (*server.errors, *texts):
        assert not [v for v in numbers.tolist() if f"{v:.5g}" in text or repr(v)[:7] in text]


def only_refusals(upload: Upload | None, expected: dict[int, tuple[Reason, int]]) -> None:
    """A node's answer holds no output, no gradient and no label: only devices, reasons and counts."""
    assert upload is not None
    release, gradients = upload.release, upload.gradients
    for part in (release.devices, release.records, release.targets, release.counts, release.bitmap, release.codes):
        assert part.size == 0
    assert release.exponents.size == gradients.devices.size == gradients.records.size == gradients.sums.size == 0
    assert upload.failed.size == 0
    assert {d: (Reason(r), n) for d, r, n in upload.refused.tolist()} == expected


def all_of(reason: Reason, records: int = 20) -> dict[int, tuple[Reason, int]]:
    return {device: (reason, records) for device in range(3)}
