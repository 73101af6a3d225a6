"""The first layer as an ordinary federated model: its aggregation is delegated to any Flower strategy."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from numpy.typing import NDArray

from fedsplit.errors import ConfigError, RunError
from fedsplit.schedule import scheduled

if TYPE_CHECKING:  # it imports torch, which a simulation does while Ray starts
    from fedsplit.model import Weights

Gradient = Mapping[str, NDArray[np.float64]]
ADAPTIVE = ("FedAdam", "FedYogi", "FedAdagrad")
PER_DEVICE = ("FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
"""Strategies that are not a weighted mean: they need one contribution per device."""
STRATEGIES = ("FedAvg", "FedAvgM", *ADAPTIVE, *PER_DEVICE)


def build_strategy(name: str, args: Mapping[str, Any]) -> Strategy:
    """Build a Flower strategy by name.

    Parameters
    ----------
    name : str
        One of :data:`STRATEGIES`.
    args : mapping
        Further arguments of the strategy's constructor.

    Raises
    ------
    ConfigError
        If the strategy does not take an argument.
    """
    kind = getattr(flower, name)
    # what FedAvg takes is about sampling nodes and naming records, which SplitStrategy does; eta is the setting lr
    allowed = sorted(_parameters(kind) - _parameters(flower.FedAvg) - {"eta", "eta_l"})
    if unknown := sorted(set(args) - set(allowed)):
        raise ConfigError(f"first-layer.args: {name} takes no {unknown[0]!r}; it takes {', '.join(allowed) or 'none'}")
    # Flower's tau (1e-3) is larger than most gradients here and would swamp them: Adam's usual epsilon instead.
    defaults = {"tau": 1e-8} if name in ADAPTIVE else {}
    try:
        strategy: Strategy = kind(**{**defaults, **args})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"first-layer.args: {error}") from None
    return strategy


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


class _Stub:
    """Stands in for a Grid while a strategy configures messages that are never sent."""

    run = Run.create_empty(0)

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._nodes + 1)


class FirstLayerServer:
    """Steps the shared first layer.

    Each contribution becomes a pseudo-model ``W - lr * sum / count`` with weight ``count``, which the strategy
    aggregates like any client's model; in float64, so that the grouping of contributions does not show in the weights.

    Parameters
    ----------
    strategy : Strategy
        Any Flower strategy that aggregates one ArrayRecord per reply.
    weights : dict of float32 arrays
        The initial parameters.
    lr : float
        For an adaptive strategy its ``eta``, and the pseudo-model is then made with lr 1.
    schedule : str
        Of the learning rate over ``rounds``; see :func:`fedsplit.schedule.scheduled`.
    """

    def __init__(
        self, strategy: Strategy, weights: "Weights", lr: float, schedule: str = "constant", rounds: int = 1
    ) -> None:
        self.strategy = strategy
        self.weights = weights
        self.lr = lr
        self.schedule = schedule
        self.rounds = rounds

    @property
    def per_device(self) -> bool:
        """Whether the strategy needs one contribution per device."""
        return _is_a(self.strategy, PER_DEVICE) or not isinstance(self.strategy, flower.FedAvg)

    def step(self, round_number: int, contributions: Sequence[tuple[Gradient, int]]) -> None:
        """Apply (sum of gradients, record count) pairs, in the order given.

        Raises
        ------
        RunError
            If the strategy refuses them, or makes weights that are not finite.
        """
        if not contributions:
            return
        lr = scheduled(self.lr, self.schedule, round_number, self.rounds)
        if _is_a(self.strategy, ADAPTIVE):
            self.strategy.eta, lr = lr, 1.0  # type: ignore[attr-defined]
        # Adaptive strategies remember the current weights here; the messages they make are discarded.
        stub = _Stub(
            max(getattr(self.strategy, "min_available_nodes", 2), getattr(self.strategy, "min_train_nodes", 2))
        )
        list(self.strategy.configure_train(round_number, _arrays(self.weights), ConfigRecord(), stub))  # type: ignore[arg-type]
        replies = [self._reply(i, total, lr / count, count) for i, (total, count) in enumerate(contributions, start=1)]
        try:
            arrays, _ = self.strategy.aggregate_train(round_number, replies)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            name = type(self.strategy).__name__
            raise RunError(
                f"first-layer strategy {name} cannot aggregate {len(replies)} contributions: {error}"
            ) from None
        if arrays is None:
            return
        new = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
        if not all(np.isfinite(w).all() for w in new.values()):
            raise RunError(f"round {round_number}: first-layer weights are not finite; lower first-layer.lr")
        self.weights = {name: new[name] for name in self.weights}

    def _reply(self, node: int, total: Gradient, step: float, count: int) -> Message:
        model = {name: w - step * total[name] for name, w in self.weights.items()}
        content = RecordDict({"arrays": _arrays(model), "metrics": MetricRecord({"num-examples": count})})
        request = Message(RecordDict(), node, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = str(node)  # a reply needs one; only a SuperLink sets it
        return Message(content, reply_to=request)

    def state(self) -> dict[str, Any]:
        """Return what training has changed in the strategy (moments and the like), for a checkpoint."""
        return {k: copy.deepcopy(v) for k, v in vars(self.strategy).items() if _is_state(v)}

    def load_state(self, weights: "Weights", state: Mapping[str, Any]) -> None:
        """Restore the weights and :meth:`state`."""
        self.weights = weights
        for name, value in state.items():
            setattr(self.strategy, name, copy.deepcopy(value))


def _is_a(strategy: Strategy, names: Sequence[str]) -> bool:
    return any(kind.__name__ in names for kind in type(strategy).__mro__)


def _is_state(value: Any) -> bool:
    """Whether an attribute is plain numbers and arrays: moments, momentum, clipping norms, counters."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_state(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_state(v) for v in value)
    return isinstance(value, int | float | np.ndarray)


def _arrays(weights: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(w)) for name, w in weights.items()})
