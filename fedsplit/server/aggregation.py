"""The first layer as an ordinary federated model: its aggregation is delegated to any Flower strategy."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from numpy.typing import NDArray

from fedsplit.common.errors import ConfigError, RunError
from fedsplit.common.plugins import resolve_function
from fedsplit.common.seeds import scheduled, seed_of

if TYPE_CHECKING:  # it imports torch, which a simulation does while Ray starts
    from fedsplit.model.layer import Weights
from fedsplit.plan.strategies import ADAPTIVE, NOISY, PER_DEVICE

Gradient = Mapping[str, NDArray[np.float64]]
_TINY = 1e-12  # a step for a device whose own has norm zero, by which Flower's clipping would divide


def build_strategy(name: str, args: Mapping[str, Any]) -> Strategy:
    """Build a Flower strategy by name.

    Those of :data:`NOISY` are built around FedAvg: their noise fits a mean of clipped steps, and no other rule. It
    protects one device's gradients from those who see the first layer's weights afterwards, and nobody else: the
    server sees every gradient before, and the trunk learns from the releases, without this noise. The clipping norm
    is in units of weights: of a device's mean gradient times ``first-layer.lr``.

    Parameters
    ----------
    name : str
        One of :data:`STRATEGIES`, or ``module:Class``: a user's own subclass of Flower's Strategy. This gets one
        contribution per device, or per node if it is a subclass of FedAvg and of none of :data:`ROBUST`; only the
        server imports it. Checkpoints hold its attributes that are numbers, arrays, or lists and dicts of these.
    args : mapping
        Further arguments of the strategy's constructor.

    Raises
    ------
    ConfigError
        If there is no such class, it is no strategy, or it does not take an argument.
    """
    if ":" in name:
        return _own_strategy(name, args)
    kind = getattr(flower, name)
    # what FedAvg takes is about sampling nodes and naming records, which SplitStrategy does; eta is the setting lr
    allowed = sorted(_parameters(kind) - _parameters(flower.FedAvg) - {"eta", "eta_l", "strategy", "accountant"})
    if unknown := sorted(set(args) - set(allowed)):
        raise ConfigError(f"first-layer.args: {name} takes no {unknown[0]!r}; it takes {', '.join(allowed) or 'none'}")
    # Flower's tau (1e-3) is larger than most gradients here and would swamp them: Adam's usual epsilon instead.
    defaults = {"tau": 1e-8} if name in ADAPTIVE else {"strategy": flower.FedAvg()} if name in NOISY else {}
    try:
        strategy: Strategy = kind(**{**defaults, **args})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"first-layer.args: {error}") from None
    return strategy


def _own_strategy(name: str, args: Mapping[str, Any]) -> Strategy:
    kind = resolve_function(name, "first-layer.strategy", "class")
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise ConfigError(f"first-layer.strategy {name!r} must be a subclass of flwr.serverapp.strategy.Strategy")
    try:
        return kind(**args)
    except Exception as error:  # a user's own code may raise anything
        raise ConfigError(f"first-layer.args: {name}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _parameters(kind: type) -> set[str]:
    return set(inspect.signature(kind).parameters)


class Aggregation(Protocol):
    """Holds the first layer's weights, and steps them.

    Attributes
    ----------
    weights : dict of float32 arrays
    teaches : bool
        Whether it takes devices' gradients.
    per_device : bool
        Whether it needs one contribution per device, as opposed to one of each node.
    """

    weights: "Weights"

    @property
    def teaches(self) -> bool: ...  # noqa: D102

    @property
    def per_device(self) -> bool: ...  # noqa: D102

    def step(
        self, round_number: int, contributions: Sequence[tuple[Gradient, int]], stream: str = "first-layer"
    ) -> None:
        """Apply the gradients of one round.

        Parameters
        ----------
        round_number, contributions, stream : int, sequence, str
            As in :meth:`FirstLayerServer.step`.
        """

    def state(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state(self, weights: "Weights", state: Mapping[str, Any]) -> None: ...  # noqa: D102


class Frozen:
    """A first layer that stays as it is."""

    teaches = False
    per_device = False

    def __init__(self, weights: "Weights") -> None:
        self.weights = weights

    def step(
        self, round_number: int, contributions: Sequence[tuple[Gradient, int]], stream: str = "first-layer"
    ) -> None:
        """Do nothing.

        Parameters
        ----------
        round_number, contributions, stream : int, sequence, str
            As in :meth:`FirstLayerServer.step`.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the weights: nothing."""
        return {}

    def load_state(self, weights: "Weights", state: Mapping[str, Any]) -> None:
        """Restore the weights."""
        self.weights = {n: weights[n] for n in self.weights}


class _Stub:
    """Stands in for a Grid while a strategy configures messages that are never sent."""

    run = Run.create_empty(0)

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._nodes + 1)


class FirstLayerServer:
    """Steps the shared first layer by a Flower strategy.

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
        Of the learning rate over ``rounds``; see :func:`fedsplit.common.seeds.scheduled`.
    seed : int or None
        Of what a strategy draws from numpy's global generator, as noise: a simulation can be repeated. None, where
        noise must protect something: whoever knows the seed could subtract it.
    """

    def __init__(
        self,
        strategy: Strategy,
        weights: "Weights",
        lr: float,
        schedule: str = "constant",
        rounds: int = 1,
        *,
        seed: int | None = None,
    ) -> None:
        self.strategy = strategy
        self.weights = weights
        self.teaches = True
        self.lr = lr
        self.schedule = schedule
        self.rounds = rounds
        self.seed = seed

    @property
    def per_device(self) -> bool:
        """Whether the strategy needs one contribution per device."""
        return _is_a(self.strategy, PER_DEVICE) or not isinstance(self.strategy, flower.FedAvg)

    def step(
        self, round_number: int, contributions: Sequence[tuple[Gradient, int]], stream: str = "first-layer"
    ) -> None:
        """Apply the gradients of one round, in the order given.

        Parameters
        ----------
        round_number : int
        contributions : sequence of (mapping of str to float64 array, int)
            The sum of gradients by parameter name, and the number of records that it is over.
        stream : str
            Names the step's random numbers. The last round has two steps, each with its own name.

        Raises
        ------
        RunError
            If the strategy refuses the gradients, or returns weights that are not finite.
        """
        if not contributions:
            return
        lr = scheduled(self.lr, self.schedule, round_number, self.rounds)
        if _is_a(self.strategy, ADAPTIVE):
            self.strategy.eta, lr = lr, 1.0  # type: ignore[attr-defined]
        replies = [self._reply(i, total, lr / count, count) for i, (total, count) in enumerate(contributions, start=1)]
        if _is_a(self.strategy, NOISY):  # a mean over fewer devices than were expected needs more noise
            self.strategy.num_sampled_clients = len(replies)  # type: ignore[attr-defined]
        with _seeded(None if self.seed is None else seed_of(self.seed, stream, round_number)):
            new = self._aggregated(round_number, replies)
        if new is None:
            return
        name = type(self.strategy).__name__
        if {n: w.shape for n, w in new.items()} != {n: w.shape for n, w in self.weights.items()}:
            raise RunError(f"first-layer strategy {name} must return arrays of the names and shapes it was given")
        if not all(np.isfinite(w).all() for w in new.values()):
            raise RunError(f"round {round_number}: first-layer weights are not finite; lower first-layer.lr")
        self.weights = {n: new[n] for n in self.weights}

    def _aggregated(self, round_number: int, replies: Sequence[Message]) -> "Weights | None":
        # Adaptive strategies remember the current weights here; the messages they make are discarded.
        stub = _Stub(
            max(getattr(self.strategy, "min_available_nodes", 2), getattr(self.strategy, "min_train_nodes", 2))
        )
        try:
            list(self.strategy.configure_train(round_number, _arrays(self.weights), ConfigRecord(), stub))  # type: ignore[arg-type]
            arrays, _ = self.strategy.aggregate_train(round_number, replies)
            return None if arrays is None else {n: a.numpy().astype(np.float32) for n, a in arrays.items()}
        except Exception as error:  # a user's own strategy may raise anything
            name = type(self.strategy).__name__
            raise RunError(
                f"first-layer strategy {name} cannot aggregate {len(replies)} contributions: {_one_line(error)}"
            ) from None

    def _reply(self, node: int, total: Gradient, step: float, count: int) -> Message:
        model = {name: w - step * total[name] for name, w in self.weights.items()}
        if _is_a(self.strategy, NOISY):
            count = 1  # with equal weights no device's step can be more than its share of the mean
            if not sum(np.linalg.norm(model[name] - w) ** 2 for name, w in self.weights.items()):
                model = {name: w + np.float64(_TINY) for name, w in self.weights.items()}
        content = RecordDict({"arrays": _arrays(model), "metrics": MetricRecord({"num-examples": count})})
        request = Message(RecordDict(), node, MessageType.TRAIN)
        request.metadata.__dict__["_message_id"] = str(node)  # a reply needs one; only a SuperLink sets it
        return Message(content, reply_to=request)

    def state(self) -> dict[str, Any]:
        """Return what training has changed in the strategy (moments and the like), for a checkpoint."""
        return {k: copy.deepcopy(v) for k, v in vars(self.strategy).items() if _is_state(v)}

    def load_state(self, weights: "Weights", state: Mapping[str, Any]) -> None:
        """Restore the weights and :meth:`state`."""
        self.weights = {n: weights[n] for n in self.weights}  # noise is drawn in their order, which no file keeps
        for name, value in state.items():
            setattr(self.strategy, name, copy.deepcopy(value))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed numpy's global generator for a while, or have the operating system do so."""
    before = np.random.get_state()  # noqa: NPY002  Flower's noise comes from it
    np.random.seed(None if seed is None else seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


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
