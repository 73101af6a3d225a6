"""What makes an :class:`fedsplit.release.admitted.Admitted` genuine. A contract of imports keeps it to the guard."""

SEAL = object()
