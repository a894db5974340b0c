"""EfficientNMS at the end of a detector: the node is the plugin's, its function keeps what suppression by hand does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import signatures
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgecompile import bench, cli, oracle
from edgecompile.bundle import Bundle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.targets.trt import TrtTarget, nms, preflight, session, strong_typing, support

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


# -- as an option of the target ----------------------------------------------------------------------------------------

NMS = {"nms": "true", "nms_score": "0.5", "nms_iou": "0.3", "nms_boxes": "20"}


@pytest.mark.parametrize("version", signatures.VERSIONS)
def test_an_engine_that_suppresses(version: str, install: Callable[..., Any], tmp_path: Path):
    install(version)
    graph, feeds = detector(), scene(20, 60, 3, 2)
    made = TrtTarget().build(graph, tmp_path, NMS)
    assert made.manifest.options["nms"] is True and made.manifest.options["nms_boxes"] == 20
    wanted = oracle.run(nms.append(graph, 0.5, 0.3, 20), feeds)
    assert 0 < wanted["num_detections"][0, 0] <= 20
    board = session.load(tmp_path, made.manifest)  # what opens it on a board has no graph
    for engine in (made, TrtTarget().load(tmp_path, made.manifest, graph), board):
        found = engine.run(feeds)
        assert sorted(found) == sorted(wanted) and (engine is board or list(found) == ["scores", "boxes", *nms.OUTPUTS])
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    layers = made.layers(feeds, repeats=1)
    assert nms.OPERATOR in {layer.op for layer in layers}
    assert layers == TrtTarget().layers(tmp_path, made.manifest, graph, board.profile(feeds, repeats=1))


def test_an_engine_that_does_not(install: Callable[..., Any], tmp_path: Path):
    install()
    engine = TrtTarget().build(detector(), tmp_path, {})
    assert list(engine.run(scene(20, 60, 3, 2))) == ["scores", "boxes"]
    assert engine.manifest.options["nms"] is False


@pytest.mark.parametrize(
    "wrong",
    [{"nms": "maybe"}, {"nms_score": "0.5"}, {"nms_iou": 0.2}, {"nms_boxes": 7},
     *({**NMS, name: value} for name, value in (
         ("nms_score", "1.5"), ("nms_score", "nan"), ("nms_iou", "-1"), ("nms_iou", "x"),
         ("nms_boxes", "0"), ("nms_boxes", "3840"), ("nms_boxes", "2.5"),
     ))],
    ids=str,
)  # fmt: skip
def test_wrong_numbers(wrong: dict[str, Any], install: Callable[..., Any], tmp_path: Path):
    install()
    for use in (TrtTarget().prepare, lambda graph, options: TrtTarget().build(graph, tmp_path, options)):
        with pytest.raises(InputError, match="nms"):
            use(detector(), wrong)


def test_a_model_that_is_no_detector(install: Callable[..., Any], tmp_path: Path):
    install()
    graph = detector()
    graph.outputs = graph.outputs[:1]
    for use in (TrtTarget().prepare, lambda graph, options: TrtTarget().build(graph, tmp_path, options)):
        with pytest.raises(InputError, match="no detector") as caught:
            use(graph, NMS)
        assert "scores [2, 60, 3]" in str(caught.value) and "leave out nms" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_suppresses(install: Callable[..., Any], tmp_path: Path):
    """Prepared here, finished there; what proves parity is the model's own outputs."""

    def command(*arguments: object) -> Any:
        return CliRunner().invoke(cli.main, [*map(str, arguments)])

    detector(batch=1).save(tmp_path / "net.onnx")
    options = [part for name, value in NMS.items() for part in ("--option", f"{name}={value}")]
    prepared = command("build", tmp_path / "net.onnx", "--target", "trt", "--prepare", *options, "-o", tmp_path / "out")
    assert prepared.exit_code == 0, prepared.output
    assert len(Bundle.open(tmp_path / "out").graph().outputs) == 2
    install()
    finished = command("build", tmp_path / "out", "--no-bench")
    assert finished.exit_code == 0, finished.output
    made = Bundle.open(tmp_path / "out")
    engine = made.engine()
    feeds, outputs = made.probe()
    assert list(outputs) == ["scores", "boxes"] and list(engine.run(feeds)) == ["scores", "boxes", *nms.OUTPUTS]
    assert nms.OPERATOR in {layer.op for layer in bench.layers(engine, feeds, repeats=1, graph=made.graph()).layers}
    wrong = command("build", tmp_path / "net.onnx", "--target", "trt", "--prepare", "--option", "nms_scor=0.5")
    assert wrong.exit_code == 2 and "did you mean 'nms_score'?" in " ".join(wrong.output.split())
