"""The zoo in fp32, fp16 and int8 for TensorRT: the preflight passes, and the double builds, loads and runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import signatures

from edgecompile import models, oracle
from edgecompile.graph import Graph
from edgecompile.targets.trt import TrtTarget, support

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "trt_preflight.py"
SMALL = {
    # the least of each family, and its resolution
    "shvit_cifar": 32,
    "efficientvit_cifar": 32,
    "repavit_cifar": 32,
    "repvgg_cifar": 32,
    "litepose_xs": 64,
    "damoyolo_ns": 64,
    "deanet": 32,
}
QUICK = ("repavit_cifar", "repvgg_cifar")
SNR = {
    "fp32": 80.0,
    "fp16": 40.0,
    "int8": 15.0,
}  # the runtime that computes for the double fuses what the oracle does not


def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_trt_preflight", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preflight = script()
Install = Callable[..., Any]


def exported(name: str, size: int, folder: Path) -> tuple[Graph, dict[str, np.ndarray]]:
    import torch

    from edgecompile.models.randomize import randomize

    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = randomize(models.create(name), 0, example).eval()
    path = folder / f"{name}.onnx"
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=17)
    graph = Graph.load(path)
    return graph, {graph.inputs[0].name: example.numpy()}


def check(
    name: str, size: int, folder: Path, install: Install, versions: tuple[str, ...], precisions: tuple[str, ...]
) -> None:
    source, feeds = exported(name, size, folder)
    for precision, graph, _ in preflight.lowered(source, feeds, precisions):
        verdicts = preflight.checked(graph)
        assert list(verdicts) == list(support.VERSIONS)
        assert all(v["ok"] for v in verdicts.values()), (precision, verdicts)
        quantized = any(n.op == "QuantizeLinear" for n in graph.nodes)
        assert quantized == (precision == "int8")
        assert any(w.dtype == np.float16 for w in graph.constants().values()) == (precision == "fp16")
        wanted = oracle.run(graph, feeds)
        for version in versions:
            install(version)
            place = folder / f"{precision}-{version}"
            place.mkdir()
            made = TrtTarget().build(graph, place, {})
            made.close()
            engine = TrtTarget().load(place, made.manifest, graph)
            for output, error in oracle.compare_all(wanted, engine.run(feeds)).items():
                assert error.snr_db >= SNR[precision], (precision, version, output, error)
            engine.close()


def test_a_detector_that_suppresses(tmp_path: Path, install: Install):
    source, feeds = exported("damoyolo_ns", 64, tmp_path)
    ((_, graph, _),) = preflight.lowered(source, feeds, ("fp32",))
    install("10.3.0")
    engine = TrtTarget().build(graph, tmp_path, {"nms": "true", "nms_score": "0", "nms_boxes": "20"})
    scores, boxes, number, kept, best, classes = engine.run(feeds).values()
    wanted = oracle.run(graph, feeds)
    for name, value in zip(wanted, (scores, boxes), strict=True):
        np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=1e-3 * np.abs(wanted[name]).max())
    assert number.tolist() == [[20]] and best[0, 0] == scores.max() and (np.diff(best[0]) <= 0).all()
    for box, score, kind in zip(kept[0], best[0], classes[0], strict=True):
        assert any((boxes[0] == box).all(1) & (scores[0][:, kind] == score))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_a_model_of_each_family(name: str, tmp_path: Path, install: Install):
    version = signatures.VERSIONS[list(SMALL).index(name) % len(signatures.VERSIONS)]
    precisions = preflight.PRECISIONS if name in ("shvit_cifar", "repvgg_cifar") else ("fp32", "int8")
    check(name, SMALL[name], tmp_path, install, (version,), precisions)


@pytest.mark.slow
def test_the_benchmark_keeps_the_rows_of_other_models(tmp_path: Path):
    output = tmp_path / "rows.json"
    others = [{"model": name, "precisions": {}} for name in ("no_such_model", "repvgg_cifar", "shvit_s1")]
    output.write_text(json.dumps({"rows": others}))
    command = [sys.executable, str(SCRIPT), "repvgg_cifar", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = {row["model"]: row["precisions"] for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["shvit_s1", "repvgg_cifar"] and rows["shvit_s1"] == {}
    assert list(rows["repvgg_cifar"]) == list(preflight.PRECISIONS)
    assert "| repvgg_cifar | int8 |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_model(name: str, tmp_path: Path, install: Install):
    # What takes images of any size has the same graph for small ones; benchmarks/trt_preflight.py takes the full size.
    free = name.startswith(("litepose", "damoyolo", "deanet"))
    size = min(models.ZOO[name].resolution, 128 if free else 1 << 20)
    check(name, size, tmp_path, install, signatures.VERSIONS, preflight.PRECISIONS)
