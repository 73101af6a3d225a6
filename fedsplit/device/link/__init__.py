"""A node's link over Flower's SuperNode."""
