"""Novelty: a trunk that tells normal recordings apart, and the detector made of it."""
