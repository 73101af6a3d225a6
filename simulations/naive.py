"""Split learning as it is first written on Flower: one message for each device and half-step, weights in every one.

All devices take a step together, each with a mini-batch of its own; the server keeps the trunk and both optimizers.
"""

import os
import time
from functools import lru_cache
from typing import Any

import numpy as np
import ray
import replicated
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedsplit.assemble import data_source, dropping, split_model
from fedsplit.config import Settings
from fedsplit.loss import summed_loss
from fedsplit.model import SplitModel

BATCH = 16  # records of each device in a step
SETTINGS = "NAIVE_SETTINGS"  # environment variable: the run's settings as JSON

app = ClientApp()


@lru_cache(maxsize=1)
def _model() -> tuple[SplitModel, float, int]:
    settings = Settings.from_json(os.environ[SETTINGS])
    return split_model(settings, data_source(settings)), dropping(settings).keep, settings.devices.count or 0


@lru_cache(maxsize=64)
def _data(device: int, count: int) -> Any:
    return replicated.device(device, count).train


def _cut(message: Message, context: Context) -> tuple[torch.Tensor, Any, SplitModel]:
    """Return a step's first-layer outputs after dropping, with their graph."""
    model, keep, count = _model()
    model.first_layer.layer.load_state_dict(message.content["weights"].to_torch_state_dict())
    step = int(message.content["config"]["step"])
    records = _data(int(context.node_config["partition-id"]), count)
    rows = np.arange(step * BATCH, (step + 1) * BATCH) % len(records)
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
    cut.backward(torch.from_numpy(np.array(message.content["gradients"]["cut"].numpy())))
    found = {name: p.grad.numpy() for name, p in model.first_layer.layer.named_parameters() if p.grad is not None}
    return Message(RecordDict({"gradients": _arrays(**found)}), reply_to=message)


def _arrays(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in arrays.items()})


def run(settings: Settings, steps: int) -> float:
    """Train for some steps, after one that starts everything; return the seconds of one record."""
    os.environ[SETTINGS] = settings.to_json()
    server, seconds = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seconds.append(train(grid, settings, steps))

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {n: os.environ[n] for n in (SETTINGS, replicated.RECORDS)}},
    )
    nodes = settings.devices.count or 0
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, num_supernodes=nodes, backend_config=resources)
    return seconds[0] / (steps * BATCH * nodes)


def train(grid: Grid, settings: Settings, steps: int) -> float:
    """Train over a grid's nodes for some steps, after one that starts everything; return the seconds that they took."""
    model = split_model(settings, data_source(settings))
    layer, trunk = model.first_layer.layer, model.trunk
    optimizer = torch.optim.Adam([*layer.parameters(), *trunk.parameters()], settings.trunk.lr)
    while len(nodes := list(grid.get_node_ids())) < (settings.devices.count or 0):
        time.sleep(0.1)
    began = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            began = time.perf_counter()

        def ask(kind: str, extra: dict[int, Any], step: int = step) -> dict[int, Message]:
            weights, config = ArrayRecord(layer.state_dict()), ConfigRecord({"step": step})
            contents = {n: RecordDict({"weights": weights, "config": config, **extra.get(n, {})}) for n in nodes}
            messages = [Message(c, n, f"{MessageType.TRAIN}.{kind}") for n, c in contents.items()]
            return {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}

        replies = ask("forward", {})
        cuts = {n: torch.from_numpy(np.array(r.content["cut"]["cut"].numpy())) for n, r in replies.items()}
        cut = torch.cat(list(cuts.values())).requires_grad_()
        labels = torch.from_numpy(np.concatenate([r.content["cut"]["labels"].numpy() for r in replies.values()]))
        optimizer.zero_grad()
        (summed_loss("classification", trunk(cut), labels) / len(cut)).backward()
        assert cut.grad is not None
        parts = dict(zip(replies, cut.grad.split(BATCH), strict=True))
        back = ask("backward", {n: {"gradients": _arrays(cut=g.numpy())} for n, g in parts.items()})
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.from_numpy(sum(r.content["gradients"][name].numpy() for r in back.values()))
        optimizer.step()
    return time.perf_counter() - began
