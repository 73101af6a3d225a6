"""Noticing what is new: a trunk that tells recordings apart, and what has been normal for a device."""
