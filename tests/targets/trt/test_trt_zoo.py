"""The zoo in fp32, fp16 and int8 for TensorRT: the preflight passes, and the double builds, loads and runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import signatures

from edgecompile import models, oracle
from edgecompile.graph import Graph
from edgecompile.targets.trt import TrtTarget, support
from edgecompile.targets.trt import device as trt_device
from edgecompile.targets.trt import probe as trt_probe

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
Install = Callable[[str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    from tensorrt_double import HostDevice, Knobs, make

    def put(version: str) -> None:
        knobs = Knobs()
        trt = make(version, knobs)
        monkeypatch.setattr(trt_probe, "runtime", lambda: trt)
        for module in (trt_device, trt_probe):
            monkeypatch.setattr(module, "open_device", lambda: HostDevice(knobs))

    return put


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


@pytest.mark.parametrize("name", SMALL)
def test_a_model_of_each_family(name: str, tmp_path: Path, install: Install):
    version = signatures.VERSIONS[list(SMALL).index(name) % len(signatures.VERSIONS)]
    precisions = preflight.PRECISIONS if name in ("shvit_cifar", "repvgg_cifar") else ("fp32", "int8")
    check(name, SMALL[name], tmp_path, install, (version,), precisions)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_model(name: str, tmp_path: Path, install: Install):
    check(name, models.ZOO[name].resolution, tmp_path, install, signatures.VERSIONS, preflight.PRECISIONS)
