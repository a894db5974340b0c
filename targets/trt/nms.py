"""Non-maximum suppression inside a detector's engine: TensorRT's plugin EfficientNMS at the end of the graph.

A detector such as DAMO-YOLO ends in class scores and boxes, of which most are to be thrown away. :func:`append` adds
the plugin's node, which keeps the best boxes of each class and sorts them by score. Its operator is also a local
function of the model, written in ONNX operators, so that whatever is no TensorRT can run the model. The parser of
TensorRT 10.3 imports that function; since 10.7 it takes the plugin first (github.com/onnx/onnx-tensorrt,
ModelImporter.cpp; issue 4113 of NVIDIA/TensorRT).

The scores and boxes stay outputs of the model, before those of the node: what proves that an engine computes what the
model does goes on comparing them.

Source: plugin/efficientNMSPlugin/README.md of github.com/NVIDIA/TensorRT, standard mode; ONNX operator
NonMaxSuppression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgecompile.errors import InputError
from edgecompile.graph import Graph, Tensor
from edgecompile.targets.trt.options import MOST_BOXES

DOMAIN, OPERATOR = "TRT", "EfficientNMS_TRT"
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
_OPSET = 14  # the least at which every operator of the body has its present form


def append(graph: Graph, score: float = 0.05, iou: float = 0.7, boxes: int = 100) -> Graph:
    """A copy of a detector that also suppresses.

    Args:
        graph: with two outputs, float32 scores [N, boxes, classes] from 0 to 1 and boxes [N, boxes, 4] as corners
            (x1, y1, x2, y2); not changed.
        score: boxes of at most this score are dropped, from 0 to 1. The defaults are those that DAMO-YOLO is judged
            with.
        iou: of two boxes of one class that overlap by more than this share of their union, the lesser is dropped.
        boxes: number of boxes kept per image, over all classes.

    Returns:
        the copy. Its further outputs are int32 ``num_detections`` [N, 1], float32 ``detection_boxes`` [N, boxes, 4] and
        ``detection_scores`` [N, boxes], and int32 ``detection_classes`` [N, boxes], zero after the last detection.

    Raises:
        InputError: the outputs are not such, a number is out of its range, or the opset is older than 14.
    """
    if not (0 <= score <= 1 and 0 <= iou <= 1 and 1 <= boxes <= MOST_BOXES):
        raise InputError(
            "the suppression cannot be as asked",
            f"score={score:g}, iou={iou:g}, boxes={boxes}",
            f"scores and overlaps are from 0 to 1, and 1 to {MOST_BOXES} boxes may be kept",
        )
    if graph.opsets.get("", 0) < _OPSET:
        raise InputError("the model cannot suppress boxes", f"its opset is older than {_OPSET}", "export it again")
    made = graph.copy()
    scores, corners = _ends(made)
    if scores.shape[1] * scores.shape[2] < boxes:
        raise InputError(f"{boxes} boxes cannot be kept", f"there are {scores.shape[1] * scores.shape[2]}")
    batch = scores.shape[0]
    shapes = ([batch, 1], [batch, boxes, 4], [batch, boxes], [batch, boxes])
    results = [made.new_variable(name) for name in OUTPUTS]
    for tensor, shape, kind in zip(results, shapes, (np.int32, np.float32, np.float32, np.int32), strict=True):
        tensor.shape, tensor.dtype = shape, np.dtype(kind)
    attributes = {
        "plugin_version": "1",
        "plugin_namespace": "",
        "score_threshold": float(score),
        "iou_threshold": float(iou),
        "max_output_boxes": int(boxes),
        "background_class": -1,
        "score_activation": 0,
        "class_agnostic": 0,
        "box_coding": 0,
    }
    producers = [p for t in (scores, corners) for p in t.inputs[:1]]
    made.insert(OPERATOR, [corners, scores], results, attributes, replaces=producers, domain=DOMAIN)
    made.outputs = [*made.outputs, *results]
    made.function_protos = [*made.function_protos, _function(sorted(attributes), made.opsets[""])]
    made.import_domains = [*made.import_domains, helper.make_opsetid(DOMAIN, 1)]
    return made


def _ends(graph: Graph) -> tuple[Tensor, Tensor]:
    """The scores and the boxes."""
    shapes = [list(t.shape or ()) for t in graph.outputs]
    found = [
        t for t, s in zip(graph.outputs, shapes, strict=True) if len(s) == 3 and all(type(d) is int for d in s[1:])
    ]
    corners = [t for t in found if t.shape[2] == 4]
    scores = [t for t in found if t.shape[2] != 4]
    if len(graph.outputs) == len(found) == 2 and len(corners) == 2:  # four classes: the scores come first
        scores, corners = corners[:1], corners[1:]
    floats = all(t.dtype == np.float32 for t in found)
    if len(graph.outputs) != 2 or len(scores) != 1 or len(corners) != 1 or scores[0].shape[1] != corners[0].shape[1]:
        raise InputError(
            "the model is no detector whose boxes can be suppressed",
            f"its outputs are {', '.join(f'{t.name} {s}' for t, s in zip(graph.outputs, shapes, strict=True))}",
            "leave out nms, or give the model the outputs scores [N, boxes, classes] and boxes [N, boxes, 4] alone",
        )
    if not floats:
        raise InputError(
            "the scores and boxes must be float32",
            "the model's outputs are of another type",
            "end the model in a Cast to float32",
        )
    return scores[0], corners[0]


def _function(attributes: list[str], opset: int) -> onnx.FunctionProto:
    """EfficientNMS in ONNX operators: suppress by class, put the scores of what is left side by side, take the best."""

    def constant(name: str, value: np.ndarray) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value, name))

    def given(name: str, attribute: str, kind: str, code: Any) -> onnx.NodeProto:
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(onnx.AttributeProto(name=kind, ref_attr_name=attribute, type=code))
        return node

    node = helper.make_node
    nodes = [
        given("score", "score_threshold", "value_float", onnx.AttributeProto.FLOAT),
        given("iou", "iou_threshold", "value_float", onnx.AttributeProto.FLOAT),
        given("most", "max_output_boxes", "value_int", onnx.AttributeProto.INT),
        constant("zero", np.array(0, np.float32)),
        constant("first", np.array([0])),
        constant("rows", np.array([0, -1])),
        constant("end", np.array([-1])),
        constant("one", np.array([1])),
        node("Transpose", ["scores"], ["by_class"], perm=[0, 2, 1]),  # [N, C, B]
        node("NonMaxSuppression", ["boxes", "by_class", "most", "iou", "score"], ["chosen"]),  # [M, 3]
        node("GatherND", ["by_class", "chosen"], ["values"]),
        node("Mul", ["by_class", "zero"], ["nothing"]),
        node("ScatterND", ["nothing", "chosen", "values"], ["left"]),  # [N, C, B], zero for what is suppressed
        node("Reshape", ["left", "rows"], ["flat"]),
        node("Unsqueeze", ["most", "first"], ["k"]),
        node("TopK", ["flat", "k"], ["best", "where"], axis=1),  # [N, K]
        node("Shape", ["scores"], ["extents"]),
        node("Gather", ["extents", "one"], ["count"]),
        node("Div", ["where", "count"], ["class64"]),
        node("Mod", ["where", "count"], ["box"]),
        node("Greater", ["best", "zero"], ["there"]),
        node("Cast", ["there"], ["there32"], to=TensorProto.INT32),
        node("Cast", ["there"], ["there_float"], to=TensorProto.FLOAT),
        node("Cast", ["class64"], ["class32"], to=TensorProto.INT32),
        node("Mul", ["class32", "there32"], ["classes"]),
        node("ReduceSum", ["there32", "one"], ["number"], keepdims=1),
        node("Unsqueeze", ["box", "end"], ["box_index"]),
        node("GatherND", ["boxes", "box_index"], ["picked"], batch_dims=1),  # [N, K, 4]
        node("Unsqueeze", ["there_float", "end"], ["there_wide"]),
        node("Mul", ["picked", "there_wide"], ["kept"]),
    ]
    results = ["number", "kept", "best", "classes"]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, OPERATOR, ["boxes", "scores"], results, nodes, opsets, attributes)
