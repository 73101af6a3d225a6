"""The first layer in ONNX, for devices that run another runtime than torch: from raw records to activations.

Dropping is *not* in it, nor are guard and ledger: whoever sends these activations as they are reveals the record. What
leaves has to be dropped from before, as :class:`fedsplit.device.predictor.Predictor` does it.
"""

from typing import Any

import numpy as np

from fedsplit.common.arrays import FloatArray
from fedsplit.common.errors import ConfigError
from fedsplit.data import Scaling
from fedsplit.device.bundle import Bundle

ONNX = "first_layer.onnx"
RECORDS, ACTIVATED = "records", "activations"
_OPSET, _IR = 17, 8  # of 2022: runtimes that are not of today read them, too
_TOLD = (
    "The first layer of model {}: raw records to activations. Dropping is not in it: whoever sends these activations "
    "as they are reveals the record."
)


class _Graph:
    """Nodes in the order in which they run, and the constants that they take."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, FloatArray] = {}

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.ascontiguousarray(value, dtype=np.float32)
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append((op, list(inputs), output, attributes))
        return output


def onnx_model(bundle: Bundle) -> bytes:
    """Return the model file: ``records`` (batch, *input_shape) to ``activations`` (batch, *cut_shape), float32.

    Raises
    ------
    ConfigError
        If the package onnx is not there, or the layer is of a kind that says no form for it.
    """
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError:
        raise ConfigError("--onnx needs the package onnx: pip install 'fedsplit[onnx]'") from None
    layer, graph = bundle.layer, _Graph()
    scaled = _scaled(graph, bundle.scaling, len(layer.input_shape))
    layer.nonlinearity.onnx(graph, layer.kind.onnx(graph, scaled))
    op, inputs, _, attributes = graph.nodes[-1]
    nodes = [*graph.nodes[:-1], (op, inputs, ACTIVATED, attributes)]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in nodes],
            f"first_layer_{bundle.model}",
            [helper.make_tensor_value_info(RECORDS, TensorProto.FLOAT, ["batch", *layer.input_shape])],
            [helper.make_tensor_value_info(ACTIVATED, TensorProto.FLOAT, ["batch", *layer.cut_shape])],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="fedsplit",
        doc_string=_TOLD.format(bundle.model),
    )
    checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _scaled(graph: _Graph, scaling: Scaling, axes: int) -> str:
    """Add ``(raw - subtract) / divide``; see :class:`fedsplit.data.Scaling`."""
    wide = (-1,) + (1,) * (axes - 1)  # along a record's first axis
    raw = graph.node("Sub", RECORDS, graph.constant("subtract", np.reshape(scaling.subtract, wide)))
    return graph.node("Div", raw, graph.constant("divide", np.reshape(scaling.divide, wide)))
