"""The server's link over Flower's SuperLink."""
