"""Split learning as it is first written on Flower: one message for each device and half-step, weights in every one.

All devices take a step together, each with a mini-batch of its own; the server keeps the trunk and both optimizers. A
device that does not answer is left out of the step.
"""

import os
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedsplit.common.seeds import scheduled
from fedsplit.data import Records
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings
from simulations.shared import replicated

BATCH = 16  # records of each device in a step
SETTINGS = "NAIVE_SETTINGS"  # environment variable: the run's settings as JSON
Replies = dict[int, Message]
After = Callable[[int, SplitModel], None]

app = ClientApp()


@lru_cache(maxsize=1)
def _experiment() -> Experiment:
    return Experiment(Settings.from_json(os.environ[SETTINGS]))


@lru_cache(maxsize=64)
def _data(device: int) -> Records:
    return _experiment().source.device(device).train


def forget() -> None:
    """Forget the settings and records of this process."""
    _experiment.cache_clear()
    _data.cache_clear()


def _rows(device: int, seed: int, step: int) -> NDArray[Any]:
    """Return a device's mini-batch: it goes through its records in a new order in each pass."""
    records = len(_data(device))
    passed, within = divmod(step, -(-records // BATCH))
    order = np.random.default_rng([seed, device, passed]).permutation(records)
    return np.asarray(order[np.arange(within * BATCH, (within + 1) * BATCH) % records])


def _cut(message: Message, context: Context) -> tuple[torch.Tensor, NDArray[Any], SplitModel]:
    """Return a step's first-layer outputs after dropping, with their graph."""
    model, keep = _experiment().model, _experiment().settings.dropping.keep or 1.0
    model.first_layer.layer.load_state_dict(message.content.array_records["weights"].to_torch_state_dict())
    device, config = int(cast(int, context.node_config["partition-id"])), message.content.config_records["config"]
    step, seed, records = cast(int, config["step"]), cast(int, config["seed"]), _data(device)
    rows = _rows(device, seed, step)
    outputs = model.first_layer.activation(model.first_layer.outputs(torch.from_numpy(records.x[rows])))
    generator = torch.Generator().manual_seed(step)
    return outputs * (torch.rand(outputs.shape, generator=generator) < keep), records.y[rows], model


@app.train("forward")
def forward(message: Message, context: Context) -> Message:
    """Send a mini-batch's dropped outputs and its labels."""
    cut, labels, _ = _cut(message, context)
    return Message(RecordDict({"cut": _arrays(cut=cut.detach().numpy(), labels=labels)}), reply_to=message)


@app.train("backward")
def backward(message: Message, context: Context) -> Message:
    """Send the first layer's gradients of the mini-batch before."""
    cut, _, model = _cut(message, context)
    model.first_layer.layer.zero_grad()
    gradients = message.content.array_records["gradients"]["cut"].numpy()
    cut.backward(torch.from_numpy(np.array(gradients)))  # type: ignore[no-untyped-call]
    found = {name: p.grad.numpy() for name, p in model.first_layer.layer.named_parameters() if p.grad is not None}
    return Message(RecordDict({"gradients": _arrays(**found)}), reply_to=message)


def _arrays(**arrays: NDArray[Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in arrays.items()})


class _Server:
    """Has the model, and the optimizer of both its halves."""

    def __init__(self, grid: Grid, settings: Settings) -> None:
        self._grid, self._settings = grid, settings
        self.model = Experiment(settings).model
        self._layer, self._trunk = self.model.first_layer.layer, self.model.trunk
        parameters = [*self._layer.parameters(), *self._trunk.parameters()]
        self._optimizer = torch.optim.Adam(parameters, settings.trunk.lr)
        self._nodes = list(grid.get_node_ids())

    def step(self, number: int, steps: int) -> None:
        """Take a step with all devices that answer."""
        trunk = self._settings.trunk
        for group in self._optimizer.param_groups:
            group["lr"] = scheduled(trunk.lr, trunk.schedule, number + 1, steps + 1)
        if replies := self._ask("forward", number, {node: {} for node in self._nodes}):
            gradients = self._learn(replies.values())
            parts = dict(zip(replies, torch.split(gradients, BATCH), strict=True))
            asked = {node: {"gradients": _arrays(cut=part.numpy())} for node, part in parts.items()}
            self._add(self._ask("backward", number, asked).values())
            self._optimizer.step()

    def _ask(self, kind: str, step: int, asked: dict[int, dict[str, Any]]) -> Replies:
        """Send a message to each node, with weights in it; return the replies that came."""
        weights = ArrayRecord(self._layer.state_dict())
        config = ConfigRecord({"step": step, "seed": self._settings.run.seed})
        contents = {node: RecordDict({"weights": weights, "config": config, **more}) for node, more in asked.items()}
        messages = [Message(content, node, f"{MessageType.TRAIN}.{kind}") for node, content in contents.items()]
        return {reply.metadata.src_node_id: reply for reply in self._grid.send_and_receive(messages)}

    def _learn(self, replies: Iterable[Message]) -> torch.Tensor:
        """Compute the trunk's gradients; return those at the cut."""
        received = [reply.content.array_records["cut"] for reply in replies]
        cut = torch.cat([torch.from_numpy(np.array(each["cut"].numpy())) for each in received]).requires_grad_()
        labels = torch.from_numpy(np.concatenate([each["labels"].numpy() for each in received]))
        self._optimizer.zero_grad()
        loss = task_of("classification").loss(self._trunk(cut), labels) / len(cut)
        loss.backward()  # type: ignore[no-untyped-call]
        assert cut.grad is not None
        return cut.grad

    def _add(self, replies: Iterable[Message]) -> None:
        """Add up the first layer's gradients."""
        received = [reply.content.array_records["gradients"] for reply in replies]
        for name, parameter in self._layer.named_parameters():
            found = [gradients[name].numpy() for gradients in received]
            parameter.grad = torch.from_numpy(sum(found)) if found else None


def train(grid: Grid, settings: Settings, steps: int, after: After = lambda step, model: None) -> float:
    """Train over a grid's nodes for some steps, after one that starts everything; return the seconds that they took.

    ``after`` is called after every step with its number, from 0.
    """
    server = _Server(grid, settings)
    began = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            began = time.perf_counter()
        server.step(step, steps)
        after(step, server.model)
    return time.perf_counter() - began


def run(settings: Settings, steps: int) -> float:
    """Train on Ray for some steps, after one that starts everything; return the seconds of one record."""
    import ray
    from flwr.simulation import run_simulation

    os.environ[SETTINGS] = settings.to_json()
    server, seconds = ServerApp(), []
    nodes = settings.devices.count or 0

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        seconds.append(train(grid, settings, steps))

    variables = {name: os.environ[name] for name in (SETTINGS, replicated.RECORDS)}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, num_supernodes=nodes, backend_config=resources)
    return float(seconds[0] / (steps * BATCH * nodes))
