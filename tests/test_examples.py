from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgecompile import driver, oracle
from edgecompile.frontend import load, parse_dynamics
from edgecompile.graph import Graph

EXAMPLES = Path(__file__).parent.parent / "examples"


def same_as_torch(source) -> None:
    assert source.attempts[-1].ok
    for feed, wanted in zip(source.feeds, source.reference, strict=True):
        errors = oracle.compare_all(wanted, oracle.run(source.graph, feed))
        assert max(e.max_rel for e in errors.values()) < 1e-5


def test_keyword_inputs(tmp_path):
    pytest.importorskip("torch")
    source = load(str(EXAMPLES / "keyword_inputs.py"), folder=tmp_path)
    same_as_torch(source)
    assert {p.name: p.shape for p in source.graph.signature().inputs} == {
        "input_ids": (1, 16), "attention_mask": (1, 16), "pixel_values": (1, 3, 64, 64),
    }  # fmt: skip
    assert [p.name for p in source.graph.signature().outputs] == ["similarity", "text_embeds", "image_embeds"]
    masked = {**source.feeds[0], "attention_mask": np.ones((1, 16), np.int64)}
    assert not np.allclose(oracle.run(source.graph, masked)["text_embeds"], source.reference[0]["text_embeds"])


def test_dict_outputs(tmp_path):
    pytest.importorskip("torch")
    source = load(
        str(EXAMPLES / "dict_outputs.py"), dynamic=parse_dynamics(["images:0=1:2:8"]), folder=tmp_path
    )  # fmt: skip
    same_as_torch(source)
    assert [f["images"].shape[0] for f in source.feeds] == [2, 2, 1]
    assert {p.name: p.shape for p in source.graph.signature().outputs} == {
        "detections.scores": ("batch", 320, 5), "detections.boxes": ("batch", 320, 4),
        "features.0": ("batch", 32, 16, 16), "features.1": ("batch", 64, 8, 8),
    }  # fmt: skip
    assert source.notes == ("outputs that are no tensors are left out: num_classes (int)",)


@pytest.mark.slow
def test_accuracy(tmp_path):
    pytest.importorskip("torch")
    source = load(str(EXAMPLES / "accuracy.py"), folder=tmp_path / "scratch")
    same_as_torch(source)
    options = driver.Options(seconds=0.1, target_options={"threads": 1})
    made = driver.build(source, tmp_path / "out", options)
    found = json.loads((made.path / "report.json").read_text())["accuracy"]
    assert 0.8 < found["engine"] < 0.98  # guessing gives 0.25, and a task without errors would show nothing
    assert abs(found["engine"] - found["reference"]) <= 1 / 512 and found["note"] == ""


def test_external_data(tmp_path):
    path = EXAMPLES / "external_data.py"
    spec = importlib.util.spec_from_file_location("external_data", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.write(tmp_path / "net.onnx")
    weights = onnx.load(tmp_path / "net.onnx", load_external_data=False).graph.initializer
    assert {w.data_location for w in weights} == {onnx.TensorProto.EXTERNAL}
    source = load(str(tmp_path / "net.onnx"), folder=tmp_path)
    assert source.graph.external
    whole = Graph.from_proto(onnx.load(tmp_path / "net.onnx"))
    for feed in source.feeds:
        np.testing.assert_array_equal(
            oracle.run(source.graph, feed)["logits"], oracle.run(whole, feed)["logits"], strict=True
        )


def test_shift_add_finetune(tmp_path):
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("shift_add_finetune", EXAMPLES / "shift_add_finetune.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(tmp_path)
    assert 0.8 < found["float"] < 0.99
    assert found["rewritten"] < found["float"] - 0.01, "nothing to win back"
    assert found["tuned"] > found["rewritten"] and found["tuned"] > found["float"] - 0.02
    graph = Graph.load(tmp_path / "tuned.onnx")
    ops = [n.op for n in graph.nodes if n.domain == "ai.edgecompile"]
    assert ops.count("ShiftLinear") == 5 and ops.count("BinaryAngularAttention") == 1
    assert not any(n.op == "Softmax" for n in graph.nodes)
