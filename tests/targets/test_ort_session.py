"""Opening an engine with numpy and ONNX Runtime only: the same engine, the same refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.targets import ort_session
from edgecompile.targets.ort import ENGINE, OrtTarget

ort = pytest.importorskip("onnxruntime")
BLOCKED = "com.microsoft.nchwc"


def net(*, branches: bool = False) -> Graph:
    """Two convolutions, or an If that holds one in each branch."""

    def value(name: str, *shape, dtype=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, dtype, shape)

    rng = np.random.default_rng(0)
    weights = [("w1", (16, 3, 3, 3)), ("w2", (16, 16, 3, 3))]
    first = helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4)
    second = helper.make_node("Conv", ["a", "w2"], ["y"], "second", pads=[1] * 4)
    nodes, inputs = [first, second], [value("x", 1, 3, 16, 16)]
    if branches:
        bodies = {
            f"{name}_branch": helper.make_graph(
                [helper.make_node("Conv", ["x", "w1"], [f"{name}y"], f"{name}/Conv", pads=[1] * 4)],
                name,
                [],
                [value(f"{name}y", 1, 16, 16, 16)],
            )
            for name in ("then", "else")
        }
        nodes, inputs = (
            [helper.make_node("If", ["c"], ["y"], "choose", **bodies)],
            [*inputs, value("c", dtype=TensorProto.BOOL)],
        )
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 8, n) for n, s in weights]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", 1, 16, 16, 16)], tensors)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def build(graph: Graph, folder: Path, **options):
    return OrtTarget().build(graph, folder, {"threads": "1", **options})


def test_imports_nothing_but_numpy():
    code = (
        "import sys\n"
        "import edgecompile.targets.ort_session, edgecompile.board_runner, edgecompile.bundle, edgecompile.measure\n"
        "import edgecompile.fingerprint\n"
        "print(*{m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    third_party = {m for m in done.stdout.split() if not m.startswith("__editable__")}
    assert (
        third_party & {"onnx", "onnx_graphsurgeon", "onnxruntime", "click", "rich", "scipy", "torch", "jinja2"} == set()
    )
    assert {"edgecompile", "numpy"} <= third_party


@pytest.mark.parametrize("level", ["basic", "all"])
def test_is_the_same_engine(tmp_path, level):
    graph = net()
    built = build(graph, tmp_path, level=level)
    feeds = oracle.random_feeds(graph.signature().inputs)
    light = ort_session.load(tmp_path, built.manifest)
    full = OrtTarget().load(tmp_path, built.manifest, graph)
    assert (light.clock, light.threads) == (full.clock, full.threads) == ("thread_cpu", 1)
    np.testing.assert_array_equal(light.run(feeds)["y"], full.run(feeds)["y"])
    np.testing.assert_allclose(light.run(feeds)["y"], oracle.run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)
    call = light.call(feeds)
    call()
    np.testing.assert_array_equal(call.args[0].copy_outputs_to_cpu()[0], full.run(feeds)["y"])  # pyright: ignore
    light.close()


def test_without_files_runs_the_model(tmp_path):
    graph = net()
    manifest = dataclasses.replace(build(graph, tmp_path).manifest, files=())
    graph.save(tmp_path / "model.onnx")
    (tmp_path / ENGINE).unlink()
    feeds = oracle.random_feeds(graph.signature().inputs)
    result = ort_session.load(tmp_path, manifest).run(feeds)["y"]
    np.testing.assert_allclose(result, oracle.run(graph, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_refuses_another_version_and_another_cpu(tmp_path):
    manifest = build(net(), tmp_path).manifest
    ort_session.load(tmp_path, manifest)
    with pytest.raises(EnvironmentMissing, match=r"built with ONNX Runtime 1\.9\.0"):
        ort_session.load(tmp_path, dataclasses.replace(manifest, versions={"onnxruntime": "1.9.0"}))
    if ort_session.blocked(tmp_path / ENGINE):
        with pytest.raises(EnvironmentMissing, match="built for another CPU"):
            ort_session.load(tmp_path, dataclasses.replace(manifest, device="aarch64 asimd"))


@pytest.mark.parametrize("branches", [False, True], ids=["top", "branches"])
@pytest.mark.parametrize("level", ["basic", "extended", "layout", "all"])
def test_blocked_is_what_the_nodes_say(tmp_path, level, branches):
    build(net(branches=branches), tmp_path, level=level)
    graph = Graph.load(tmp_path / ENGINE)
    expected = any(node.domain == BLOCKED for node in graph.walk())
    assert ort_session.blocked(tmp_path / ENGINE) == expected
    if level in ("basic", "extended"):
        assert not expected
        assert BLOCKED in graph.opsets, "the import of the domain alone must not count"


def test_errors_need_no_graph(tmp_path):
    engine = ort_session.load(tmp_path, build(net(), tmp_path).manifest)
    for feeds in ({}, {"x": np.zeros((1, 4, 16, 16), np.float32)}, {"x": np.zeros((1, 3, 16, 16))}):
        for attempt in (engine.run, engine.call):
            with pytest.raises(InputError, match="rejects the model or its inputs"):
                attempt(feeds)
    (tmp_path / ENGINE).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="rejects the model"):
        ort_session.load(tmp_path, engine.manifest)


def test_the_model_that_tries_a_provider_is_a_relu():
    model = onnx.load_model_from_string(ort_session._RELU)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["Relu"]
    assert ort_session._defect(ort, "cpu") == ""
    missing = next(p for p, name in ort_session.PROVIDERS.items() if name not in ort.get_available_providers())
    assert ort_session._defect(ort, missing)
