"""The calibration benchmark: both arms run on a small network, failures are recorded, ratios pair like with like."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

pytest.importorskip("onnxruntime")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "calibration.py"
_SPEC = importlib.util.spec_from_file_location("benchmark_calibration", SCRIPT)
assert _SPEC is not None and _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 6, 6))], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "tiny.onnx")
    (tmp_path / "tiny.json").write_text(json.dumps({"shape": [1, 3, 8, 8], "tensors": ["c", "x", "y"]}))
    return tmp_path


@pytest.mark.parametrize("arm", ["ours", "theirs"])
def test_an_arm_is_measured_in_a_process_of_its_own(folder, arm):
    row = benchmark.measure(arm, str(folder), "tiny", "entropy", 2)
    assert "failed" not in row, row
    assert (row["arm"], row["images"], row["tensors"]) == (arm, 2, 3)
    assert 0 < row["cpu_s"] < row["wall_s"] + 5
    assert 30 < row["base_mb"] <= row["peak_mb"] < 1000


def test_an_arm_that_fails_is_recorded_with_its_reason(folder):
    (folder / "tiny.onnx").write_bytes(b"")
    row = benchmark.measure("ours", str(folder), "tiny", "entropy", 2)
    assert "InputError" in row["failed"]
    assert "peak_mb" not in row


def test_images_differ_and_come_again():
    images = benchmark.Images(5, [1, 3, 8, 8])
    assert len(list(images)) == 5
    assert np.array_equal(images[3], benchmark.Images(9, [1, 3, 8, 8])[3])
    assert not np.array_equal(images[3], images[4])


def test_ratios_pair_the_same_model_method_and_number_of_images():
    def row(arm: str, images: int, cpu: float, peak: float, **more):
        return {"model": "m", "arm": arm, "method": "entropy", "images": images, "cpu_s": cpu, "peak_mb": peak, **more}

    rows = [row("ours", 16, 1, 100), row("theirs", 16, 4, 400), row("ours", 64, 3, 102), row("ours", 512, 24, 104)]
    rows.append(row("theirs", 64, 1, 1, failed="killed"))
    assert benchmark.ratios(rows) == {
        "m entropy 16: cpu over quantize_static": 0.25,
        "m entropy 16: peak over quantize_static": 0.25,
        "m entropy: peak at 512 over that at 16 images": 1.04,
    }
