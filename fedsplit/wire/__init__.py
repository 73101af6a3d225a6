"""What crosses the network, and how it is read from a hostile peer."""
