"""The one way from records to what leaves of them: first layer, dropping, guard, packing."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedsplit.common.arrays import FloatArray, IntArray
from fedsplit.guard.guard import Guard
from fedsplit.guard.proposal import Proposal, release_cost, release_name
from fedsplit.model.layer import FirstLayer
from fedsplit.release.admitted import Admitted, unguarded
from fedsplit.release.making import Chunk, Outputs, Secret, forward
from fedsplit.release.policy import Policy, name_of
from fedsplit.release.streams import KEYED_ROUND
from fedsplit.wire.release import Release


@dataclass(frozen=True)
class Made:
    """Outputs after dropping, which no guard has seen yet.

    Attributes
    ----------
    chunk : Chunk
        The records.
    outputs : Outputs
    weights : float32 array (parameters,)
    name : bytes
        Digest of all that decides the bytes besides the records.
    """

    chunk: Chunk
    outputs: Outputs
    weights: FloatArray
    name: bytes


@dataclass(frozen=True)
class Leaving:
    """What a guard lets leave of a chunk.

    Attributes
    ----------
    chunk, outputs
        Those of the records that leave.
    admitted : Admitted
    codes : int64 array (records of the whole chunk,)
        0, or why a record is refused, or would be if the guard enforced (:class:`fedsplit.wire.ledger.Reason`).
    """

    chunk: Chunk
    outputs: Outputs
    admitted: Admitted
    codes: IntArray


class Releaser:
    """Makes releases of one first layer under one policy.

    Parameters
    ----------
    layer : FirstLayer
        Its initial weights are not used: they come with each call.
    policy : Policy
    dtype : str
        Of values on the wire: ``float16`` or ``float32``.
    secret : callable
        Returns a device's 32-byte secret by its id.
    """

    def __init__(self, layer: FirstLayer, policy: Policy, dtype: str, secret: Secret) -> None:
        self.layer = layer
        self.policy = policy
        self.dtype = dtype
        self._secret = secret
        self._terms = f"{name_of(policy)} {dtype if policy.code.floats else ''}"

    def make(
        self, chunk: Chunk, weights: FloatArray, mask_round: int, purpose: str, *, want_slopes: bool = False
    ) -> Made:
        """Compute a chunk's outputs and drop.

        Parameters
        ----------
        weights : float32 array (parameters,)
        mask_round : int
            Which masks to draw; those of a policy that draws nothing are the same in all rounds.
        purpose : str
            What else decides the bytes, such as the scaling of the records. Two purposes never share noise, which
            could be subtracted.
        want_slopes : bool
            Whether a backward half will follow.
        """
        mask_round = KEYED_ROUND if self.policy.deterministic else mask_round
        name = release_name(self.layer, weights, f"{self._terms} {purpose}", mask_round)
        outputs = forward(
            self.layer, self.policy, self._secret, chunk, weights, mask_round, name, want_slopes=want_slopes
        )
        return Made(chunk, outputs, weights, name)

    def admit(self, guard: Guard, made: Made, run: int = 0, round_number: int = 0) -> Leaving:
        """Ask the guard, which writes down what leaves before this returns.

        Parameters
        ----------
        guard : Guard
        made : Made
            The releases that are about to leave.
        run : int
            The run's number.
        round_number : int

        Raises
        ------
        StateError
            If the ledger is missing, damaged or another owner's.
        """
        chunk, outputs = made.chunk, made.outputs
        proposal = Proposal(
            run=run,
            round_number=round_number,
            weights=made.weights,
            name=made.name,
            owners=chunk.owners,
            records=chunk.numbers,
            segments=chunk.shared,
            bitmap=outputs.kept.bitmap,
            active=outputs.active,
            cost=release_cost(outputs.kept, self.layer, self.policy, self.dtype, made.weights),
            exact=self.policy.code.exact,
        )
        codes, admitted = guard.release(proposal, outputs.kept)
        if guard.enforce and codes.any():
            chunk, outputs = chunk.take(codes == 0), outputs.take(codes == 0)
        return Leaving(chunk, outputs, admitted, codes)

    def pack(self, leaving: Leaving, targets: NDArray[Any]) -> Release:
        """Return the release of what leaves, with labels ``(records, ...)``."""
        return self._packed(leaving.admitted, leaving.chunk, targets)

    def unguarded(self, chunk: Chunk, weights: FloatArray, why: str) -> Release:
        """Return a release of records that nobody has to protect, such as public ones, with prediction's masks.

        Parameters
        ----------
        chunk : Chunk
        weights : float32 array
            The layer's, flat.
        why : str
            Why they need no guard.
        """
        return self.pack_unguarded(self.make(chunk, weights, KEYED_ROUND, why), why)

    def pack_unguarded(self, made: Made, why: str) -> Release:
        """Return the release of a chunk that nobody has to protect; ``why`` as in :func:`unguarded`."""
        return self._packed(unguarded(made.outputs.kept, why), made.chunk, made.chunk.y)

    def _packed(self, admitted: Admitted, chunk: Chunk, targets: NDArray[Any]) -> Release:
        return Release.pack(admitted, chunk.devices, chunk.records, targets, self.dtype, self.policy.code.bits)
