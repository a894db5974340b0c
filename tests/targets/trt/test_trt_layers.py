"""Layer information in both JSON dialects, runs that trtexec made elsewhere, and the device without CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgecompile import device
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.targets.trt import layers, trtexec

CONV = {
    "Name": "/stem/conv/Conv + PWN(/stem/act/Relu)",
    "LayerType": "CaskConvolution",
    "Metadata": "[ONNX Layer: /stem/conv/Conv]\x1e[ONNX Layer: /stem/act/Relu]",
}
BARE = {"Name": "/stem/conv/Conv + PWN(/stem/act/Relu)", "LayerType": "CaskConvolution", "Metadata": ""}
MYELIN = {"Name": "__myl_Mul_0", "LayerType": "kgen", "Metadata": "[ONNX Layer: /head/Mul]"}
FUSED = layers.Layer(CONV["Name"], "CaskConvolution", ("/stem/conv/Conv", "/stem/act/Relu"))


def graph() -> Graph:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], "/stem/conv/Conv"),
        helper.make_node("Relu", ["a"], ["b"], "/stem/act/Relu"),
        helper.make_node("Mul", ["b", "b"], ["y"], "/head/Mul"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (4,)) for n in "xy"]
    model = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return Graph.from_proto(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


@pytest.mark.parametrize("ends", [{"Bindings": ["x", "y"]}, {"I/O Tensors": [{"Name": "x"}, {"Name": "y"}]}], ids=str)
def test_both_dialects(ends: dict[str, Any]):
    found = layers.inspect(json.dumps({"Layers": [CONV, MYELIN]} | ends))
    assert found.tensors == ("x", "y")
    assert found.layers == (FUSED, layers.Layer("__myl_Mul_0", "kgen", ("/head/Mul",)))


def test_names_where_there_is_no_metadata():
    found = layers.inspect(json.dumps({"Layers": [BARE, "/stem/act/Relu"], "Bindings": []}))
    assert found.layers == (FUSED, layers.Layer("/stem/act/Relu", "", ("/stem/act/Relu",)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": [3], "Bindings": []}', "null"])
def test_neither_dialect(text: str):
    with pytest.raises(InputError, match="layer information"):
        layers.inspect(text)


def test_times_go_to_modules():
    inspected = layers.inspect(json.dumps({"Layers": [CONV, MYELIN], "Bindings": []})).layers
    found = layers.timed(inspected, {"reformat": 1e-6, MYELIN["Name"]: 2e-6, CONV["Name"]: 3e-6}, graph())
    assert [(t.name, t.microseconds) for t in found] == [
        (CONV["Name"], pytest.approx(3)),
        (MYELIN["Name"], pytest.approx(2)),
        ("reformat", pytest.approx(1)),
    ]
    assert found[0].modules == ("stem.conv", "stem.act") and found[0].nodes == ("/stem/conv/Conv", "/stem/act/Relu")
    assert found[1].modules == ("head",) and found[2].modules == found[2].nodes == ()


# -- trtexec -----------------------------------------------------------------------------------------------------------


def query(start: float, compute: float) -> dict[str, float]:
    """One call as --exportTimes writes it: 0.1 ms to enqueue, 0.2 ms in, 0.3 ms out."""
    stages = {"startEnqMs": start, "endEnqMs": start + 0.1, "startH2dMs": start, "endH2dMs": start + 0.2}
    stages |= {"startComputeMs": start + 0.2, "endComputeMs": start + 0.2 + compute}
    return stages | {"h2dMs": 0.2, "computeMs": compute, "d2hMs": 0.3, "latencyMs": compute + 0.5}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_run_of_trtexec(tmp_path: Path):
    times = write(tmp_path / "times.json", [query(0, 1.0), query(2, 1.5)])
    entries = [{"count": 10}, {"name": CONV["Name"], "timeMs": 50, "averageMs": 5.0, "medianMs": 4.0, "percentage": 80}]
    entries.append({"name": MYELIN["Name"], "timeMs": 10, "averageMs": 1.0, "percentage": 20})
    profile = write(tmp_path / "profile.json", entries)
    info = write(tmp_path / "layers.json", {"Layers": [CONV, MYELIN], "Bindings": ["x"]})
    run = trtexec.load(graph(), times, profile, info)
    assert run.times is not None
    np.testing.assert_allclose(run.times.compute, [1e-3, 1.5e-3])
    np.testing.assert_allclose(run.times.enqueue, [1e-4, 1e-4])
    np.testing.assert_allclose(run.times.end_to_end, [1.5e-3, 2e-3])
    assert [layer.microseconds for layer in run.layers] == pytest.approx([4000, 1000])
    assert [layer.modules for layer in run.layers] == [("stem.conv", "stem.act"), ("head",)]
    assert [layer.op for layer in run.layers] == ["CaskConvolution", "kgen"]
    by_name = trtexec.load(graph(), profile=profile)
    assert by_name.times is None and by_name.layers[0].modules == ("stem.conv", "stem.act")
    assert by_name.layers[1].modules == ()


@pytest.mark.parametrize("content", [{}, [], [{}], [{"computeMs": 1}], ["x"], [{"computeMs": "x", "latencyMs": 1}], 3])
def test_times_that_trtexec_did_not_write(content: object, tmp_path: Path):
    with pytest.raises(InputError):
        trtexec.load(graph(), times=write(tmp_path / "t", content))


@pytest.mark.parametrize("content", [[{"name": "x"}], [{"name": "x", "averageMs": "y"}], 3])
def test_a_profile_that_trtexec_did_not_write(content: object, tmp_path: Path):
    with pytest.raises(InputError):
        trtexec.load(graph(), profile=write(tmp_path / "t", content))


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(InputError, match="cannot read"):
            trtexec.load(graph(), times=tmp_path / name)


# -- the device --------------------------------------------------------------------------------------------------------


def test_no_cuda():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(EnvironmentMissing, match="no torch with CUDA, no cuda-python"):
        device.open_device()


@pytest.mark.gpu
def test_the_device_copies_times_and_captures():
    opened = device.open_device()
    array = np.arange(1000, dtype=np.float32)
    buffer, copy, result = opened.allocate(array.nbytes), opened.allocate(array.nbytes), np.empty_like(array)
    opened.upload(buffer, array)
    opened.synchronize()
    opened.download(result, buffer)
    opened.synchronize()
    np.testing.assert_array_equal(result, array)
    start, stop = opened.event(), opened.event()
    opened.record(start)
    opened.upload(copy, array)
    opened.record(stop)
    opened.synchronize()
    assert 0 <= opened.seconds(start, stop) < 1
