"""Flower's objects: records, grids, programs."""
