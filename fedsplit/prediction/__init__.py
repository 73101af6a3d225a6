"""Predictions without records: what a device needs for them, the device's side, and the server's."""
