from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import measure, models

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reparam.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_reparam", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reparam = script()


# -- the verdict -------------------------------------------------------------------------------------------------------


def arms(ratios: list[float]) -> tuple[measure.Samples, measure.Samples]:
    """Two arms whose pairs of sessions have these ratios: three rounds of two calls each."""
    pairs = np.repeat(np.arange(len(ratios)), 6)
    rounds = np.repeat(np.arange(3 * len(ratios)), 2)
    baseline = np.full(len(pairs), 1e-3) * (1 + 0.2 * pairs)
    both = (baseline * np.array(ratios)[pairs], baseline)
    ours, other = (measure.Samples("arm", "thread_cpu", s, 1, rounds, sessions=pairs) for s in both)
    return ours, other


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.03, 1.05, 1.04, 1.02, 1.05, 1.06], "slower"),
        ([0.95, 0.97, 0.96, 0.98, 0.94, 0.95], "faster"),
        ([1.005, 1.02, 1.03, 1.02, 1.02, 1.04], "unclear"),  # one pair of six within 1 %
        ([0.995, 0.97, 0.96, 0.98, 0.94, 0.95], "unclear"),
        ([1.001, 0.999, 1.004, 0.996, 1.0, 1.002], "even"),
        ([0.9, 1.1, 1.0, 1.0, 1.0, 1.0], "unclear"),
        ([0.9, *[1.04] * 7, 1.05], "slower"),  # nine pairs can afford one that disagrees
    ],
)
def test_verdict(ratios, expected):
    ours, other = arms(ratios)
    assert reparam.verdict(measure.ratio(ours, other)) == expected
    turned = {"slower": "faster", "faster": "slower"}.get(expected, expected)
    assert reparam.verdict(measure.ratio(other, ours)) == turned


def relus(path: Path, count: int, scale: float = 1.0) -> None:
    """``scale * relu(x)`` with as many Relu as asked, which ONNX Runtime does not fold."""
    nodes = [helper.make_node("Relu", ["x" if i == 0 else f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    nodes.append(helper.make_node("Mul", [f"t{count}", "scale"], ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16, 64, 64]) for n in ("x", "y")]
    weights = [helper.make_tensor("scale", TensorProto.FLOAT, [1], [scale])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_slower_arm_and_a_wrong_one_are_called_so(tmp_path):
    for arm, count, scale in (("plain", 20, 2.0), ("onnxslim", 200, 2.0), ("author", 2, 2.0), ("ours", 20, 2.0)):
        relus(tmp_path / f"{arm}.onnx", count, scale)
    relus(tmp_path / "onnxsim.onnx", 20, 2.001)
    np.save(tmp_path / "input.npy", np.random.default_rng(0).normal(size=(1, 16, 64, 64)).astype(np.float32))
    row: dict[str, Any] = {"arms": {arm: {"status": "ok"} for arm in reparam.ARMS}}
    reparam.time_arms(row, tmp_path, 0.3, 6, 0)
    assert row["arms"]["onnxsim"]["status"].startswith("failed: differs from the plain export by 5.0e-04")
    assert "onnxsim" not in row["ratios"]
    assert row["ratios"]["author"]["verdict"] == "slower"
    assert row["ratios"]["onnxslim"]["verdict"] == "faster"
    assert row["ratios"]["plain"]["rounds"] == 6
    assert row["ratios"]["plain"]["value"] == pytest.approx(1, abs=0.5)
    assert row["ratios"]["onnxslim"]["value"] < 0.5 and row["ratios"]["author"]["value"] > 2


# -- the arms ----------------------------------------------------------------------------------------------------------


def test_simplifiers_that_are_missing_or_crash(tmp_path, monkeypatch):
    source, result = tmp_path / "in.onnx", tmp_path / "out.onnx"
    relus(source, 2)
    codes = {
        "no_such_package": "",
        "json": "raise ValueError('boom')",
        "math": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "onnx": "import shutil; shutil.copy(source, result)",
    }
    monkeypatch.setattr(reparam, "_SIMPLIFY", codes)
    status = {tool: reparam.simplify(tool, source, result, sys.executable)["status"] for tool in codes}
    assert status == {
        "no_such_package": "not installed",
        "json": "failed: status 1, ValueError: boom",
        "math": "failed: signal 11, no message",
        "onnx": "ok",
    }
    assert reparam.simplify("onnx", source, result, str(tmp_path / "python"))["status"].startswith(
        "failed: No such file"
    )


def relative_error(name: str, seed: int = 0) -> tuple[float, int]:
    """Of the author's form of a model with random weights, and its number of parameters."""
    import torch

    from edgecompile.models.randomize import randomize

    x = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model = randomize(models.create(name), seed, x).eval()
        author = reparam.fuse(name, copy.deepcopy(model))
        pairs = zip(reparam._flat(model(x)), reparam._flat(author(x)), strict=True)
        return max(reparam._difference(a, b) for a, b in pairs), sum(p.numel() for p in author.parameters())


FAST = ("shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_t", "damoyolo_ns", "deanet", "repavit_tiny")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in reparam.FUSED_PARAMETERS]
)
def test_author_form_is_the_model_at_the_published_size(name):
    error, parameters = relative_error(name)
    assert error < reparam.TOLERANCE
    assert parameters == reparam.FUSED_PARAMETERS[name]


def test_a_wrong_fusion_is_refused(tmp_path, monkeypatch):
    fuse = reparam.fuse

    def wrong(name, model):
        author = fuse(name, model)
        author.head.bias.data[0] += 1
        return author

    monkeypatch.setattr(reparam, "fuse", wrong)
    with pytest.raises(RuntimeError, match="differs from the training form"):
        reparam.prepare("efficientvit_m0", tmp_path, 0, sys.executable)
    monkeypatch.setattr(reparam, "fuse", lambda name, model: model)
    with pytest.raises(RuntimeError, match="2349436 parameters, not 2334916"):
        reparam.prepare("efficientvit_m0", tmp_path, 0, sys.executable)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_short_pair(tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"scale": "kept"}))
    command = [sys.executable, str(SCRIPT), "--models", "shvit_s1", "--pairs", "1", "--seconds", "0.05"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    document = json.loads(out.read_text())
    assert document["scale"] == "kept"
    latency = document["latency"]
    assert {"date", "machine", "settings", "rows"} == latency.keys()
    assert latency["settings"]["seed"] == 0 and latency["machine"]["versions"]["onnxruntime"]
    (row,) = latency["rows"]
    assert "error" not in row, done.stderr
    present = [arm for arm in reparam.ARMS if row["arms"][arm]["status"] == "ok"]
    assert {"plain", "author", "ours"} <= set(present)
    assert all(row["arms"][arm]["status"] == "not installed" for arm in set(reparam.ARMS) - set(present))
    assert row["author_fused"] == {
        "parameters": 6_308_660,
        "published": 6_308_660,
        "max_rel": pytest.approx(0, abs=1e-4),
    }
    assert row["arms"]["ours"]["nodes"] < row["arms"]["plain"]["nodes"]
    assert row["arms"]["plain"]["exporter"] == row["arms"]["author"]["exporter"] == "dynamo"
    assert set(row["ratios"]) == {*present, reparam.CONTROL} - {"ours"}
    for ratio in row["ratios"].values():
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
        assert ratio["verdict"] == "too few pairs"
    assert done.returncode == 0
    assert "shvit_s1" in done.stdout and "slower beyond noise: nowhere" in done.stdout


def test_unknown_models_are_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--models", "shvit_s9"], capture_output=True, text=True)
    assert done.returncode == 2 and "no model shvit_s9" in done.stderr


@pytest.mark.slow
def test_scale_of_towers():
    large, small = reparam.run_scale({"500": 60.0, "100": 60.0}, 0)["rows"]
    assert (large["nodes"], small["nodes"]) == ([500, 200], [100, 40])
    assert (large["rewrites"], small["rewrites"]) == (100, 20)
    for row in (large, small):
        assert 0 < row["cpu_seconds"] == min(turn["cpu_seconds"] for turn in row["turns"])
        # The kernel counts pages per thread and adds them up late, so the peak may lie a little below the start.
        assert row["peak_mb"] > 0.98 * max(turn["rss_before_mb"] for turn in row["turns"]) > 0


@pytest.mark.parametrize("power", [1, 2])
def test_growth_tells_linear_from_quadratic(power):
    towers = [{"graph": "tower", "nodes": [n, 0], "cpu_seconds": 1e-6 * n**power} for n in (5_000, 10_000, 20_000)]
    assert reparam.growth([*towers, {"graph": "damoyolo_l", "nodes": [1, 1], "cpu_seconds": 9.0}]) == pytest.approx(
        power
    )
