"""The network on both sides of the cut."""
