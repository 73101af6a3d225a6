"""What both sides derive from one settings file: records, model, policy, limits."""

import math
from functools import cached_property
from typing import Any

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
from fedsplit.plan.strategies import PER_DEVICE
from fedsplit.release.policy import Policy
from fedsplit.wire.description import BuiltLayer, Description, Dropping, Layer
from fedsplit.wire.terms import Terms


class Experiment:
    """What a settings file means: each part is made when it is first asked for, and kept.

    Parameters
    ----------
    settings : Settings
    source : Source, optional
        The records, where they are not those that the settings name.
    """

    def __init__(self, settings: Settings, source: Source | None = None) -> None:
        self.settings = settings
        if source is not None:
            self.source = source

    @cached_property
    def source(self) -> Source:
        """The data that the settings name; raises ConfigError or DataError."""
        data, devices = self.settings.data, self.settings.devices
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
            seed=self.settings.run.seed,
            overlap=data.overlap,
            novel=data.novel,
            shape=tuple(data.shape) if data.shape else None,
        )
        protocol = self.settings.protocol
        if source.task.watches and protocol.facts.teaches:
            raise ConfigError(
                f"{source.task.noun} is for protocol.mode 'release-once', not {protocol.mode!r}: only releases of one "
                "first layer tell what is normal"
            )
        if protocol.at_home and not source.task.labels_at_home:
            raise ConfigError(f"protocol.labels 'at-home' is not for {source.task.noun}: its loss may be negative")
        return source

    @cached_property
    def model(self) -> SplitModel:
        """The model, built with the run's seed, which data and dropping fit; raises ConfigError."""
        chosen = self.settings.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.settings.run.seed, "model"))
            if chosen.builder is not None:
                built = _built(chosen.builder)
            else:
                assert chosen.name is not None
                shape = self.source.input_shape
                built = build_model(chosen.name, shape, self._trunk_outputs, chosen.width, chosen.activation)
        self._check_fit(built)
        if self.settings.protocol.at_home:
            cut_head(built.trunk)  # raises
        self.policy.fits(built.first_layer)
        return built

    @cached_property
    def policy(self) -> Policy:
        """The dropping policy; raises ConfigError."""
        return self.settings.dropping.built()

    @cached_property
    def terms(self) -> Terms:
        """What a node needs to know of the run; raises ConfigError."""
        settings, source = self.settings, self.source
        protocol = settings.protocol
        return Terms.made(
            model=Description.made(
                task=source.task.name,
                outputs=source.outputs,
                layer=self._layer_terms(),
                dropping=Dropping.of(self.policy),
                dtype=protocol.dtype,
                scaling=source.scaling,
            ),
            data=self._data_terms(),
            asked=self._asked_terms(),
            seed=settings.run.seed,
            keyed=settings.dropping.mask == "keyed",
            head=self._head_terms() if protocol.at_home else None,
        )

    def _layer_terms(self) -> Layer | BuiltLayer:
        layer, builder = self.model.first_layer, self.settings.model.builder
        shipped = all(type(known).__module__.startswith("fedsplit.") for known in (layer.kind, layer.nonlinearity))
        if builder is None or (shipped and layer.kind.describes):
            return Layer.of(layer)
        return BuiltLayer(builder=builder, input_shape=layer.input_shape)

    def _data_terms(self) -> dict[str, Any]:
        data, devices = self.settings.data, self.settings.devices
        return {
            **data.model_dump(include={"name", "folder", "builder", "overlap", "novel"}),
            "count": self.source.count,
            "test": tuple(devices.test) if isinstance(devices.test, list) else devices.test,
            "partition": devices.partition,
            "alpha": devices.alpha,
        }

    def _asked_terms(self) -> dict[str, Any]:
        settings, protocol = self.settings, self.settings.protocol
        strategy = settings.first_layer.strategy
        return {
            "rounds": settings.run.rounds,
            "once": protocol.facts.once,
            "chunk": protocol.chunk,
            "fraction": settings.devices.fraction,
            "sampling": settings.devices.sampling,
            "evaluate_every": settings.run.evaluate_every,
            "teaches": settings.teaches,
            "alone": strategy if strategy in PER_DEVICE else None,
            "donors": settings.donors,
        }

    def _head_terms(self) -> dict[str, Any]:
        head = cut_head(self.model.trunk)[1]
        return {"features": head.in_features, "outputs": head.out_features, "bias": head.bias is not None}

    @cached_property
    def public(self) -> Records | None:
        """The records that nobody has to protect, if the settings name any.

        Raises
        ------
        ConfigError
            If a device that gives its records is also one that is tested, or there is no such device.
        DataError
            If they cannot be read, or share a record with a device that does not give it.
        """
        if self.settings.public is None:
            return None
        source, donors = self.source, self.settings.donors
        if tested := sorted(set(donors) & set(source.test_devices)):
            raise ConfigError(f"public.devices: device {tested[0]} is a test device")
        if wrong := [d for d in donors if d >= source.count]:
            raise ConfigError(f"public.devices: device {wrong[0]} does not exist: ids are 0..{source.count - 1}")
        file = self.settings.public.file
        public = self._given() if file is None else self._read(file)
        if not len(public):
            raise ConfigError("public: there are no records")
        self._check_disjoint(public)
        return public

    @cached_property
    def limits(self) -> Limits:
        """The limits that a simulation's guard goes by; raises ConfigError."""
        return load_limits(self.settings.guard.limits or SHIPPED)

    @property
    def nodes(self) -> int:
        """How many nodes a simulation has."""
        return math.ceil(self.source.count / self.settings.devices.per_node)

    @property
    def _trunk_outputs(self) -> int:
        """How many outputs the trunk has; a ``public.file`` counts as one device more."""
        source, public = self.source, self.settings.public
        also = public is not None and public.file is not None
        return source.task.trunk_outputs(source.outputs, source.count + also)

    def _given(self) -> Records:
        """Return the records of the devices that give theirs."""
        source, donors = self.source, self.settings.donors
        given = [source.device(device).train for device in donors]
        targets = [source.task.to_trunk(r.y, source.outputs, d) for r, d in zip(given, donors, strict=True)]
        return Records(np.concatenate([r.x for r in given]), np.concatenate(targets))

    def _read(self, file: str) -> Records:
        source = self.source
        public = read_records(file, source)
        return Records(public.x, source.task.to_trunk(public.y, source.outputs, source.count))  # one device more

    def _check_disjoint(self, public: Records) -> None:
        source, known = self.source, {row.tobytes() for row in public.x}
        if source.absent:
            return  # each node has its own, and nobody can compare them
        for device in sorted({*range(source.count)} - {*self.settings.donors}):
            data = source.device(device)
            if any(row.tobytes() in known for part in (data.train, data.test) for row in part.x):
                raise DataError(f"public records overlap with those of device {device}, which does not give them")

    def _check_fit(self, model: SplitModel) -> None:
        first, given, outputs = model.first_layer, self.source.input_shape, self._trunk_outputs
        if first.input_shape != given:
            raise ConfigError(f"the model takes records of shape {first.input_shape}, the data's have {given}")
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


def _built(name: str) -> SplitModel:
    built = resolve_function(name, "model.builder")()
    if not isinstance(built, SplitModel):
        raise ConfigError(f"model.builder {name!r} must return a SplitModel, not {type(built).__name__}")
    return built
