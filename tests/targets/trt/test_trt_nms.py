"""EfficientNMS at the end of a detector: the node is the plugin's, its function keeps what suppression by hand does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.targets.trt import nms, preflight, strong_typing, support

pytest.importorskip("onnxruntime")


def detector(boxes: int = 60, classes: int = 3, batch: int | str = 2, dtype: int = TensorProto.FLOAT) -> Graph:
    """Two inputs as the outputs of a detector."""
    shapes = {"scores": [batch, boxes, classes], "boxes": [batch, boxes, 4]}
    nodes = [helper.make_node("Identity", [f"{n}_in"], [n], f"/head/{n}/n") for n in shapes]
    inputs = [helper.make_tensor_value_info(f"{n}_in", dtype, s) for n, s in shapes.items()]
    outputs = [helper.make_tensor_value_info(n, dtype, s) for n, s in shapes.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def scene(seed: int, boxes: int, classes: int, batch: int) -> dict[str, np.ndarray]:
    """Boxes that overlap a good deal, and scores that all differ."""
    rng = np.random.default_rng(seed)
    corner, size = rng.uniform(0, 60, (batch, boxes, 2)), rng.uniform(5, 40, (batch, boxes, 2))
    scores = rng.permutation(batch * boxes * classes).reshape(batch, boxes, classes) / (batch * boxes * classes)
    found = {"scores_in": scores, "boxes_in": np.concatenate([corner, corner + size], 2)}
    return {name: values.astype(np.float32) for name, values in found.items()}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - shared)


def by_hand(
    scores: np.ndarray, boxes: np.ndarray, score: float, iou: float, count: int
) -> list[tuple[float, int, int]]:
    """Of one image: score, class and box of what is kept, the best first."""
    kept: list[tuple[float, int, int]] = []
    for kind in range(scores.shape[1]):
        mine: list[int] = []
        for box in np.argsort(-scores[:, kind]):
            if scores[box, kind] > score and all(overlap(boxes[box], boxes[m]) <= iou for m in mine):
                mine.append(int(box))
        kept += [(float(scores[b, kind]), kind, b) for b in mine[:count]]
    return sorted(kept, reverse=True)[:count]


@pytest.mark.parametrize(("score", "iou", "count"), [(0.05, 0.7, 100), (0.5, 0.3, 20), (0.9, 0.5, 50), (1.0, 0.5, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_kept(score: float, iou: float, count: int, batch: int):
    graph = nms.append(detector(batch=batch), score, iou, count)
    graph.tidy()
    graph.check()
    feeds = scene(count, 60, 3, batch)
    found = oracle.run(graph, feeds)
    assert list(found) == ["scores", "boxes", *nms.OUTPUTS]
    for image in range(batch):
        scores, boxes = feeds["scores_in"][image], feeds["boxes_in"][image]
        expected = by_hand(scores, boxes, score, iou, count)
        number = len(expected)
        assert found["num_detections"][image].tolist() == [number]
        np.testing.assert_allclose(found["detection_scores"][image][:number], [s for s, _, _ in expected])
        assert found["detection_classes"][image][:number].tolist() == [k for _, k, _ in expected]
        np.testing.assert_array_equal(found["detection_boxes"][image][:number], boxes[[b for _, _, b in expected]])
        for name in ("detection_scores", "detection_classes", "detection_boxes"):
            assert not found[name][image][number:].any()
    np.testing.assert_array_equal(found["scores"], feeds["scores_in"])


def test_the_scenes_tell_suppression_from_none():
    feeds = scene(20, 60, 3, 1)
    scores, boxes = feeds["scores_in"][0], feeds["boxes_in"][0]
    assert by_hand(scores, boxes, 0.5, 0.3, 20) != by_hand(scores, boxes, 0.5, 1.0, 20)
    assert len(by_hand(scores, boxes, 0.9, 0.5, 50)) < 50


def test_the_node_is_the_plugins():
    graph = nms.append(detector(batch="n"), 0.25, 0.65, 10)
    (node,) = (n for n in graph.nodes if n.op == nms.OPERATOR)
    assert node.op in support.PLUGINS
    assert [t.name for t in node.inputs] == ["boxes", "scores"]
    assert node.attrs["score_threshold"] == 0.25 and node.attrs["max_output_boxes"] == 10
    assert node.attrs["plugin_version"] == "1" and node.attrs["plugin_namespace"] == ""
    model = graph.to_proto()
    onnx.checker.check_model(model)
    assert [f.name for f in model.functions] == [nms.OPERATOR]
    for version in support.VERSIONS:
        assert preflight.check(graph, version) == []
        assert strong_typing.check(graph, version) == []


def test_the_detector_is_not_changed():
    graph = detector()
    before = graph.digest()
    nms.append(graph)
    assert graph.digest() == before and len(graph.outputs) == 2


@pytest.mark.parametrize("options", [{"score": -0.1}, {"iou": 1.5}, {"boxes": 0}, {"boxes": 3840}, {"boxes": 200}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(InputError):
        nms.append(detector(), **options)


def test_what_is_no_detector_is_refused():
    graph = detector()
    graph.outputs = graph.outputs[:1]
    with pytest.raises(InputError, match="no detector"):
        nms.append(graph)
    with pytest.raises(InputError, match="float32"):
        nms.append(detector(dtype=TensorProto.FLOAT16))


def test_four_classes_are_told_from_boxes_by_their_order():
    graph = nms.append(detector(classes=4))
    (node,) = (n for n in graph.nodes if n.op == nms.OPERATOR)
    assert [t.name for t in node.inputs] == ["boxes", "scores"]
