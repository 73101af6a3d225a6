"""From settings to the parts of a run: data source, model, dropping, a node's devices, the server's strategy."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedsplit.common.errors import ConfigError, DataError
from fedsplit.common.plugins import resolve_function
from fedsplit.common.seeds import seed_of
from fedsplit.data import Records, Source, open_source, read_records
from fedsplit.guard.limits import SHIPPED, Limits, load_limits
from fedsplit.model.head import cut_head
from fedsplit.model.split import SplitModel
from fedsplit.model.zoo import build_model
from fedsplit.plan.settings import Settings
from fedsplit.release.policies import Dropping


def data_source(settings: Settings) -> Source:
    """Open the data that the settings name; raises ConfigError or DataError."""
    data, devices = settings.data, settings.devices
    source = open_source(
        name=data.name,
        folder=data.folder,
        builder=data.builder,
        task=data.task,
        outputs=data.outputs,
        count=devices.count,
        test=tuple(devices.test) if isinstance(devices.test, list) else devices.test,
        partition=devices.partition,
        alpha=devices.alpha,
        seed=settings.run.seed,
        overlap=data.overlap,
        novel=data.novel,
        shape=tuple(data.shape) if data.shape else None,
    )
    if source.task == "novelty" and settings.protocol.mode != "release-once":
        raise ConfigError(
            f"a novelty task is for protocol.mode 'release-once', not {settings.protocol.mode!r}: only releases of one "
            "first layer tell what is normal"
        )
    return source


def _trunk_outputs(settings: Settings, source: Source) -> int:
    """Return how many outputs the trunk has: of a novelty task also those for the recordings of ``public.file``."""
    also = source.task == "novelty" and settings.public is not None and settings.public.file is not None
    return source.trunk_outputs + (source.outputs if also else 0)


def public_records(settings: Settings, source: Source) -> Records | None:
    """Return the records that nobody has to protect, if the settings name any.

    Raises
    ------
    ConfigError
        If a device that gives its records is also one that is tested, or there is no such device.
    DataError
        If they cannot be read, or share a record with a device that does not give it.
    """
    chosen = settings.public
    if chosen is None:
        return None
    donors = settings.donors
    if tested := sorted(set(donors) & set(source.test_devices)):
        raise ConfigError(f"public.devices: device {tested[0]} is a test device")
    if wrong := [d for d in donors if d >= source.count]:
        raise ConfigError(f"public.devices: device {wrong[0]} does not exist: ids are 0..{source.count - 1}")
    if chosen.file is not None:
        public = read_records(chosen.file, source)
        if source.task == "novelty":  # as if of one device more
            public = Records(public.x, public.y + source.trunk_outputs)
    else:
        given = [source.device(device).train for device in donors]
        first = [device * source.outputs if source.task == "novelty" else 0 for device in donors]  # their recordings
        labels = [records.y + n for records, n in zip(given, first, strict=True)]
        public = Records(np.concatenate([r.x for r in given]), np.concatenate(labels))
    if not len(public):
        raise ConfigError("public: there are no records")
    _check_disjoint(public, source, donors)
    return public


def _check_disjoint(public: Records, source: Source, donors: Sequence[int]) -> None:
    known = {row.tobytes() for row in public.x}
    if source.absent:
        return  # each node has its own, and nobody can compare them
    for device in range(source.count):
        data = source.device(device)
        if device not in donors and any(row.tobytes() in known for part in (data.train, data.test) for row in part.x):
            raise DataError(f"public records overlap with those of device {device}, which does not give them")


def split_model(settings: Settings, source: Source) -> SplitModel:
    """Build the model with the run's seed and check that data and dropping fit it; raises ConfigError."""
    model = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings.run.seed, "model"))
        if model.builder is not None:
            built = resolve_function(model.builder, "model.builder")()
            if not isinstance(built, SplitModel):
                raise ConfigError(
                    f"model.builder {model.builder!r} must return a SplitModel, not {type(built).__name__}"
                )
        else:
            assert model.name is not None
            outputs = _trunk_outputs(settings, source)
            built = build_model(model.name, source.input_shape, outputs, model.width, model.activation)
    _check_fit(built, source, _trunk_outputs(settings, source))
    if settings.protocol.labels == "at-home":
        cut_head(built.trunk)  # raises
    dropping(settings).check_layer(built.first_layer.width, built.first_layer.positive_only)
    return built


def _check_fit(model: SplitModel, source: Source, outputs: int) -> None:
    first = model.first_layer
    if first.input_shape != source.input_shape:
        raise ConfigError(f"the model takes records of shape {first.input_shape}, the data's have {source.input_shape}")
    model.trunk.eval()  # a trial must not change running statistics
    try:
        shape = tuple(model.trunk(torch.zeros(2, *first.cut_shape, requires_grad=True)).shape)
    except RuntimeError:  # also where it begins with a module that changes them in place
        raise ConfigError(f"the trunk does not take cut activations of shape {first.cut_shape}") from None
    model.trunk.train()
    if shape != (2, outputs):
        raise ConfigError(
            f"the trunk must return {outputs} outputs per record (the data's), it returns shape {shape[1:]}"
        )


def dropping(settings: Settings) -> Dropping:
    """Return the dropping policy."""
    chosen = settings.dropping
    return Dropping(
        chosen.policy,
        keep=chosen.keep or 1.0,
        k=chosen.k or 0,
        bits=chosen.bits or 0,
        clip=chosen.clip or 0.0,
        noise=chosen.noise or 0.0,
    )


def limits(settings: Settings) -> Limits:
    """Return the limits that a simulation's guard goes by."""
    return load_limits(settings.guard.limits or SHIPPED)


def num_nodes(settings: Settings, source: Source) -> int:
    """Return how many nodes a simulation has."""
    return math.ceil(source.count / settings.devices.per_node)
