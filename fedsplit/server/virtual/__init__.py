"""The virtual clock: what a round would take on devices of a profile."""
