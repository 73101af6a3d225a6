"""A node's link over Flower's SuperNode."""

HOME, DATA, SOCKET = "fedsplit-home", "fedsplit-data", "fedsplit-socket"
"""Keys of a real node's node config: its folder, its records, and the socket of its resident process."""
KINDS = ("query", "train", "evaluate")
"""Of messages."""
