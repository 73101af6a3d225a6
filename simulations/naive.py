"""Split learning as it is first written on Flower: one message for each device and half-step, weights in every one.

All devices take a step together, each with a mini-batch of its own; the server keeps the trunk and both optimizers. A
device that does not answer is left out of the step.
"""

import os
import time
from collections.abc import Callable
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

from fedsplit.common.seeds import scheduled
from fedsplit.data import Records, Source
from fedsplit.model.split import SplitModel
from fedsplit.model.tasks import task_of
from fedsplit.plan.experiment import Experiment
from fedsplit.plan.settings import Settings

BATCH = 16  # records of each device in a step
SETTINGS = "NAIVE_SETTINGS"  # environment variable: the run's settings as JSON

app = ClientApp()


@lru_cache(maxsize=1)
def _model() -> tuple[SplitModel, float, Source]:
    settings = Settings.from_json(os.environ[SETTINGS])
    source = Experiment(settings).source
    return Experiment(settings).model, Experiment(settings).policy.keep, source


@lru_cache(maxsize=64)
def _data(device: int) -> Records:
    return _model()[2].device(device).train


def _rows(device: int, seed: int, step: int) -> Any:
    """Return a device's mini-batch: it goes through its records in a new order in each pass."""
    records = len(_data(device))
    passed, within = divmod(step, -(-records // BATCH))
    order = np.random.default_rng([seed, device, passed]).permutation(records)
    return order[np.arange(within * BATCH, (within + 1) * BATCH) % records]


def _cut(message: Message, context: Context) -> tuple[torch.Tensor, Any, SplitModel]:
    """Return a step's first-layer outputs after dropping, with their graph."""
    model, keep, _ = _model()
    model.first_layer.layer.load_state_dict(message.content["weights"].to_torch_state_dict())
    device, config = int(context.node_config["partition-id"]), message.content["config"]
    step, records = int(config["step"]), _data(device)
    rows = _rows(device, int(config["seed"]), step)
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
    nodes = settings.devices.count or 0

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        seconds.append(train(grid, settings, steps))

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {n: os.environ[n] for n in (SETTINGS, replicated.RECORDS)}},
    )
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, num_supernodes=nodes, backend_config=resources)
    return seconds[0] / (steps * BATCH * nodes)


def train(
    grid: Grid, settings: Settings, steps: int, after: Callable[[int, SplitModel], None] = lambda step, model: None
) -> float:
    """Train over a grid's nodes for some steps, after one that starts everything; return the seconds that they took.

    ``after`` is called after every step with its number, from 0.
    """
    model = Experiment(settings).model
    layer, trunk = model.first_layer.layer, model.trunk
    optimizer = torch.optim.Adam([*layer.parameters(), *trunk.parameters()], settings.trunk.lr)
    nodes = list(grid.get_node_ids())
    began = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:
            began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = scheduled(settings.trunk.lr, settings.trunk.schedule, step + 1, steps + 1)

        def ask(kind: str, extra: dict[int, Any], step: int = step) -> dict[int, Message]:
            weights = ArrayRecord(layer.state_dict())
            config = ConfigRecord({"step": step, "seed": settings.run.seed})
            contents = {n: RecordDict({"weights": weights, "config": config, **more}) for n, more in extra.items()}
            messages = [Message(c, n, f"{MessageType.TRAIN}.{kind}") for n, c in contents.items()]
            return {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}

        if replies := ask("forward", {node: {} for node in nodes}):
            cuts = {n: torch.from_numpy(np.array(r.content["cut"]["cut"].numpy())) for n, r in replies.items()}
            cut = torch.cat(list(cuts.values())).requires_grad_()
            labels = torch.from_numpy(np.concatenate([r.content["cut"]["labels"].numpy() for r in replies.values()]))
            optimizer.zero_grad()
            (task_of("classification").loss(trunk(cut), labels) / len(cut)).backward()
            assert cut.grad is not None
            parts = dict(zip(replies, cut.grad.split(BATCH), strict=True))
            back = ask("backward", {n: {"gradients": _arrays(cut=g.numpy())} for n, g in parts.items()})
            for name, parameter in layer.named_parameters():
                found = [reply.content["gradients"][name].numpy() for reply in back.values()]
                parameter.grad = torch.from_numpy(sum(found)) if found else None
            optimizer.step()
        after(step, model)
    return time.perf_counter() - began
