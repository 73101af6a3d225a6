"""The device's trusted base: what may leave, by its owner's limits."""
