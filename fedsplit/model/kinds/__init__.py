"""Kinds of first layers: one class for each, which knows all facts about it."""

from fedsplit.model.kinds import convolution, linear
from fedsplit.model.kinds.base import Graph, LayerKind, kind_named, kind_of, register_layer_kind

__all__ = ["Graph", "LayerKind", "convolution", "kind_named", "kind_of", "linear", "register_layer_kind"]
