"""What may leave a device: outputs that a guard has admitted, or that nobody has to protect."""

from fedsplit.release.kept import Kept
from fedsplit.release.seal import SEAL


class Admitted:
    """Kept outputs that may leave: the only thing that a release is packed from.

    :meth:`fedsplit.guard.guard.Guard.admit` makes one of what the limits allow, and :func:`unguarded` one of records
    that nobody has to protect.

    Parameters
    ----------
    kept : Kept
    by : str
        Who says so: ``"guard"``, or why no guard was asked.
    seal : object
        That of :mod:`fedsplit.release.seal`.

    Raises
    ------
    TypeError
        If the seal is another, or ``kept`` is no :class:`Kept`: dense activations have no way onto the wire.
    """

    def __init__(self, kept: Kept, by: str, seal: object) -> None:
        if seal is not SEAL:
            raise TypeError("only a guard admits what leaves; see fedsplit.release.admitted.unguarded")
        if not isinstance(kept, Kept):
            raise TypeError(f"a release is packed from Kept, not from {type(kept).__name__}")
        self.kept = kept
        self.by = by


def unguarded(kept: Kept, why: str) -> Admitted:
    """Let outputs of records leave that nobody has to protect, without asking a guard.

    Parameters
    ----------
    kept : Kept
    why : str
        Such as ``"public"`` or ``"audit"``: it stands in :attr:`Admitted.by`.
    """
    return Admitted(kept, why, SEAL)
