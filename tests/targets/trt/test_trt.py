"""The target end to end against the double: build, header, deserialise, run, time, profile, close."""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import io
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgecompile import board_runner, cli, oracle
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.targets.trt import ENGINE, TIMING_CACHE, TrtTarget, plan, session
from edgecompile.targets.trt import build as build_module
from edgecompile.targets.trt import probe as trt_probe

pytest.importorskip("onnxruntime")
import signatures
from tensorrt_double import Knobs, make

Install = Callable[..., Knobs]


@pytest.fixture(params=signatures.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def network(batch: int | str = 2) -> Graph:
    """A small network of two outputs, whose module paths are those of the node names."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "w2": rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "/stem/conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "/stem/act/Relu"),
        helper.make_node("MaxPool", ["r1"], ["p"], "/pool/MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "w2"], ["y"], "/head/conv/Conv"),
        helper.make_node("GlobalAveragePool", ["y"], ["m"]),
    ]
    shapes = {"x": (batch, 3, 8, 8), "y": (batch, 4, 4, 4), "m": (batch, 4, 1, 1)}
    x, y, m = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(nodes, "g", [x], [y, m], [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()])
    opsets = [helper.make_opsetid("", 17)]
    return Graph.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def feeds(batch: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)}


def assert_same(got: dict[str, np.ndarray], graph: Graph, given: dict[str, np.ndarray]) -> None:
    wanted = oracle.run(graph, given)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5)


# -- end to end --------------------------------------------------------------------------------------------------------


def test_build_run_load_profile_close(version: str, install: Install, tmp_path: Path):
    knobs, graph = install(version), network()
    engine = TrtTarget().build(graph, tmp_path, {})
    assert_same(engine.run(feeds()), graph, feeds())
    assert_same(engine.run(feeds(seed=2)), graph, feeds(seed=2))
    assert engine.manifest.files == (ENGINE, TIMING_CACHE)
    assert engine.manifest.versions == {"tensorrt": version}
    engine.close()
    again = TrtTarget().load(tmp_path, engine.manifest, graph)
    assert_same(again.run(feeds()), graph, feeds())
    layers = again.layers(feeds(), repeats=3)
    assert [layer.modules for layer in layers] == [("stem.conv",), ("stem.act",), ("pool",), *[("head.conv",)] * 2]
    assert [layer.nodes[0] for layer in layers[:2]] == ["/stem/conv/Conv", "/stem/act/Relu"]
    assert [layer.op for layer in layers] == ["Conv", "Relu", "MaxPool", "Conv", "GlobalAveragePool"]
    assert [layer.microseconds for layer in layers] == pytest.approx([500, 1500, 2500, 3500, 4500])
    assert knobs.deserialised == 2
    native = weakref.ref(again._engine)  # type: ignore[attr-defined]
    again.close()
    gc.collect()
    assert native() is None


def test_every_version_is_strongly_typed_and_detailed(version: str, install: Install, tmp_path: Path):
    install(version)
    engine: Any = TrtTarget().build(network(), tmp_path, {})
    assert engine._engine._facts["strong"] and engine._engine._facts["detailed"]


def test_a_model_from_torch(install: Install, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from edgecompile import models

    install("11.4.0.106")
    model = models.create("shvit_s1").eval()
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        torch.onnx.export(model, (example,), str(path), dynamo=False, opset_version=17)
        wanted = model(example).numpy()
    graph = Graph.load(path)
    engine = TrtTarget().build(graph, tmp_path, {})
    (got,) = engine.run({graph.inputs[0].name: example.numpy()}).values()
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    layers = engine.layers({graph.inputs[0].name: example.numpy()}, repeats=1)
    named = [layer for layer in layers if layer.modules]
    assert len(named) > 0.8 * len(layers) > 100


@pytest.mark.gpu
def test_on_hardware(tmp_path: Path):
    pytest.importorskip("tensorrt")
    graph = network("n")
    engine: Any = TrtTarget().build(graph, tmp_path, {"dynamic": "x:0=1:2:4"})
    again: Any = TrtTarget().load(tmp_path, engine.manifest, graph)
    for batch in (1, 4):
        wanted = oracle.run(graph, feeds(batch))
        for name, array in again.run(feeds(batch)).items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-2, atol=1e-2)
    times = again.times(feeds(), calls=20)
    assert (times.compute > 0).all() and times.compute.mean() < 0.1
    layers = again.layers(feeds())
    assert layers and any("stem.conv" in layer.modules for layer in layers)


def test_the_driver_makes_a_bundle_of_it(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from edgecompile import driver, frontend, registry

    install("10.16.1.11")
    monkeypatch.setitem(registry.TARGETS, "trt", "edgecompile.targets.trt:TrtTarget")
    network().save(tmp_path / "net.onnx")
    (tmp_path / "scratch").mkdir()
    source = frontend.load(str(tmp_path / "net.onnx"), folder=tmp_path / "scratch")
    made = driver.build(source, tmp_path / "out", driver.Options("trt", passes="clean", bench=False))
    opened = Bundle.open(made.path)
    assert {ENGINE, TIMING_CACHE} <= opened.manifest["files"].keys()
    assert opened.manifest["versions"]["tensorrt"] == "10.16.1.11"
    engine = opened.engine()
    given, wanted = opened.probe()
    for name, array in engine.run(given).items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-5)
    assert next(layer.modules for layer in engine.layers(given)) == ("stem.conv",)
    install("11.4.0.106")
    with pytest.raises(EnvironmentMissing, match=rf"run edgecompile build {made.path}$"):
        opened.engine()


# -- calls and times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cuda_graph": "false"}, {"transfers": "true"}], ids=str)
def test_calls_and_times(options: dict[str, str], install: Install, tmp_path: Path):
    install()
    engine: Any = TrtTarget().build(network(), tmp_path, options)
    call, timer = engine.call(feeds()), engine.timer(feeds(seed=3))
    gc.collect()
    call()
    assert 0 < timer() < 1
    call()
    times = engine.times(feeds(), calls=5)
    assert len(times.compute) == len(times.enqueue) == len(times.end_to_end) == 5
    assert (times.compute > 0).all() and (times.enqueue > 0).all()
    assert (times.end_to_end >= 0).all()
    assert times.pinned == {
        "cuda_graph": options.get("cuda_graph") != "false",
        "transfers": options.get("transfers") == "true",
        "in_flight": 1,
        "wait": "stream synchronize",
    }
    assert engine.clock == "cuda_event" and engine.threads == 0
    assert_same(engine.run(feeds()), network(), feeds())


def test_an_engine_that_cannot_be_captured_runs_all_the_same(install: Install, tmp_path: Path):
    install(capture_error=True)
    engine: Any = TrtTarget().build(network(), tmp_path, {})
    engine.call(feeds())()
    times = engine.times(feeds(), calls=2)
    assert (times.compute > 0).all() and times.pinned["cuda_graph"] is False


def test_two_prepared_calls_do_not_disturb_each_other(install: Install, tmp_path: Path):
    install()
    engine: Any = TrtTarget().build(network(), tmp_path, {"cuda_graph": "false"})
    (first, run_first, _), (second, run_second, _) = (engine._prepared(feeds(seed=s)) for s in (4, 5))
    for bound, execute, seed in ((first, run_first, 4), (second, run_second, 5), (first, run_first, 4)):
        execute()
        engine._download(bound)
        engine._device.synchronize()
        assert_same({n: bound.arrays[n] for n in engine._outputs}, network(), feeds(seed=seed))


def test_shape_inputs_stay_on_the_host(install: Install, tmp_path: Path):
    install(host=("s",))
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 6)),
        helper.make_tensor_value_info("s", TensorProto.INT64, (2,)),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("a", "b"))
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"], "r")]
    model = helper.make_graph(nodes, "g", ends, [output])
    graph = Graph.from_proto(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))
    engine = TrtTarget().build(graph, tmp_path, {})
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    for shape in ((3, 4), (12, 1), (4, 3)):
        np.testing.assert_array_equal(engine.run({"x": x, "s": np.array(shape)})["y"], x.reshape(shape))


def test_wrong_inputs(install: Install, tmp_path: Path):
    install()
    engine = TrtTarget().build(network(), tmp_path, {})
    for wrong in ({}, {"y": feeds()["x"]}, feeds(3), {"x": feeds()["x"].astype(np.float64)}):
        with pytest.raises(InputError):
            engine.run(wrong)


# -- what a file may not be --------------------------------------------------------------------------------------------


def test_no_hostile_file_reaches_the_runtime(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from test_trt_plan import HOSTILE, ORIN

    monkeypatch.setattr(trt_probe, "system", lambda: ORIN.os)
    knobs = install(ORIN.tensorrt, ORIN.compute_capability, dla_cores=ORIN.dla_cores)
    engine = TrtTarget().build(network(), tmp_path, {})
    assert knobs.deserialised == 1
    good = (tmp_path / ENGINE).read_bytes()
    refused = 0
    for content, label in HOSTILE:
        (tmp_path / ENGINE).write_bytes(content)
        with pytest.raises((InputError, EnvironmentMissing)):
            TrtTarget().load(tmp_path, engine.manifest, network())
            pytest.fail(label)
        refused += 1
    assert refused >= 200 and knobs.deserialised == 1
    (tmp_path / ENGINE).write_bytes(good)
    TrtTarget().load(tmp_path, engine.manifest, network())
    assert knobs.deserialised == 2


@pytest.mark.parametrize(
    ("version", "capability", "told"),
    [("11.4.0.106", "8.7", "here sm_87 / 11.4.0.106"), ("10.3.0", "11.0", "here sm_110 / 10.3.0")],
)
def test_an_engine_of_another_machine(version: str, capability: str, told: str, install: Install, tmp_path: Path):
    install("10.3.0")
    engine = TrtTarget().build(network(), tmp_path, {})
    knobs = install(version, capability)
    with pytest.raises(EnvironmentMissing, match=r"built for sm_87 / TensorRT 10\.3\.0") as caught:
        TrtTarget().load(tmp_path, engine.manifest, network())
    assert told in str(caught.value) and f"run edgecompile build {tmp_path}" in str(caught.value)
    assert knobs.deserialised == 0


def test_a_version_compatible_engine_moves_on(install: Install, tmp_path: Path):
    install("10.3.0")
    engine = TrtTarget().build(network(), tmp_path, {"version_compatible": "true"})
    knobs = install("11.4.0.106")
    moved: Any = TrtTarget().load(tmp_path, engine.manifest, network())
    assert knobs.deserialised == 1 and moved._runtime.engine_host_code_allowed is True
    assert_same(moved.run(feeds()), network(), feeds())


def test_a_payload_that_tensorrt_refuses(install: Install, tmp_path: Path):
    install()
    engine = TrtTarget().build(network(), tmp_path, {})
    plan.write(tmp_path / ENGINE, b"not an engine", plan.Machine("10.3.0", "8.7", trt_probe.system()))
    with pytest.raises(EnvironmentMissing, match="magic tag does not match"):
        TrtTarget().load(tmp_path, engine.manifest, network())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_parser_is_quoted_for_every_node_at_once(version: str, install: Install, tmp_path: Path):
    install(version, refuse={"Conv": "unsupported padding", "MaxPool": "only odd windows"})
    with pytest.raises(InputError, match="3 of 5 nodes") as caught:
        TrtTarget().build(network(), tmp_path, {})
    for told in ("stem.conv (Conv): unsupported padding", "pool (MaxPool): only odd", "head.conv (Conv): unsupp"):
        assert told in str(caught.value)
    assert not (tmp_path / ENGINE).exists()


def test_the_preflight_adds_what_the_parser_did_not_come_to(install: Install, tmp_path: Path):
    install(refuse={"Conv": "no"})
    graph = network()
    graph.nodes[2].attrs["dilations"] = [2, 2]
    graph.nodes[2].attrs["pads"] = [1, 1, 0, 0]
    with pytest.raises(InputError) as caught:
        TrtTarget().build(graph, tmp_path, {})
    assert "pool (MaxPool): dilations must be 1" in str(caught.value)


@pytest.mark.parametrize(
    ("message", "error", "told"),
    [
        ("Requested amount of GPU memory (1 GiB) could not be allocated: out of memory", EnvironmentMissing, "memory"),
        ("Timing cache miss for layer conv1", InputError, "timing cache"),
        ("Could not find any implementation for node", InputError, "any implementation"),
    ],
)
def test_a_build_that_fails(message: str, error: type, told: str, install: Install, tmp_path: Path):
    install(build_error=message)
    with pytest.raises(error, match=told):
        TrtTarget().build(network(), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_when_it_runs(install: Install, tmp_path: Path):
    knobs = install()
    engine = TrtTarget().build(network(), tmp_path, {})
    knobs.memory = 100
    with pytest.raises(EnvironmentMissing, match="out of memory"):
        engine.run(feeds())
    knobs.memory = 1 << 40
    engine.run(feeds())
    knobs.run_error = True
    with pytest.raises(EnvironmentMissing, match="cannot run the engine"):
        engine.run(feeds())
    knobs.context_error = True
    with pytest.raises(EnvironmentMissing, match="too little memory to run"):
        TrtTarget().load(tmp_path, engine.manifest, network())


# -- options -----------------------------------------------------------------------------------------------------------


def test_flags_pools_and_level(install: Install, tmp_path: Path):
    knobs = install("10.16.1.11", dla_cores=2)
    options = {
        "workspace": "2GiB",
        "level": "5",
        "refit": "yes",
        "sparsity": "true",
        "weight_streaming": "1",
        "hardware": "same_compute_capability",
        "dla": "1",
        "dla_sram": "1MiB",
    }
    engine: Any = TrtTarget().build(network(), tmp_path, options)
    config = knobs.config
    assert config._flags == {"REFIT", "SPARSE_WEIGHTS", "WEIGHT_STREAMING", "GPU_FALLBACK"}
    assert config._pools == {"WORKSPACE": 2 << 30, "DLA_MANAGED_SRAM": 1 << 20}
    assert config.builder_optimization_level == 5 and config.DLA_core == 1
    assert config.default_device_type.name == "DLA"
    assert config.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"
    assert engine._engine.weight_streaming_budget_v2 == 12345 and engine._runtime.DLA_core == 1
    assert plan.read(tmp_path / ENGINE, plan.Machine("10.16.1.11", "8.7", trt_probe.system(), 2))[0].dla_core == 1


def test_nothing_is_set_that_was_not_asked_for(version: str, install: Install, tmp_path: Path):
    knobs = install(version)
    TrtTarget().build(network(), tmp_path, {})
    assert knobs.config._flags == set() and knobs.config._pools == {} and "DLA_core" not in knobs.config._set


def test_tf32_only_on_request(version: str, install: Install, tmp_path: Path):
    knobs = install(version)
    TrtTarget().build(network(), tmp_path, {"tf32": "true"})
    assert knobs.config._flags == {"TF32"}


def test_the_dla_line(install: Install, tmp_path: Path):
    install(dla_cores=1)
    told: list[str] = []
    options = TrtTarget().build(network(), tmp_path, {"dla": "0"}, told.append).manifest.options
    assert options["_notes"] == ["DLA: 3 of 5 layers, 2 islands"] and options["_notes"][0] in told
    assert options["_dla"] == {"layers": 5, "taken": 3, "islands": 2}
    with pytest.raises(EnvironmentMissing, match="no DLA core 1"):
        TrtTarget().build(network(), tmp_path, {"dla": "1"})
    assert "_dla" not in TrtTarget().build(network(), tmp_path, {}).manifest.options


def test_a_session_needs_no_graph(version: str, install: Install, tmp_path: Path):
    knobs, graph = install(version), network("n")
    engine = TrtTarget().build(graph, tmp_path, {"dynamic": "x:0=1:2:4"})
    light = session.load(tmp_path, engine.manifest)
    assert knobs.deserialised == 2
    got = light.run(feeds(3))
    assert_same({name: got[name] for name in ("y", "m")}, graph, feeds(3))
    for wrong in ({}, {"y": feeds()["x"]}, feeds(5), {"x": feeds()["x"].astype(np.float64)}):
        with pytest.raises(InputError):
            light.run(wrong)
    told = json.loads(json.dumps(light.profile(feeds(), repeats=2)))
    layers = TrtTarget().layers(tmp_path, engine.manifest, graph, told)
    assert layers == engine.layers(feeds(), repeats=2)
    assert [layer.modules for layer in layers][:3] == [("stem.conv",), ("stem.act",), ("pool",)]
    with pytest.raises(InputError):
        TrtTarget().layers(tmp_path, engine.manifest, graph, told | {"information": "nonsense"})


def test_what_travels_to_a_board_needs_numpy_only():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"onnx", "onnx_graphsurgeon", "onnxruntime", "torch", "click", "rich", "scipy"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import edgecompile.targets.trt.session
ours = {m.rpartition(".")[2] for m in sys.modules if m.startswith("edgecompile.targets.trt.")}
from edgecompile.board_runner import LIGHT
assert ours <= set(LIGHT["trt"].modules["edgecompile.targets.trt"]), ours
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUNTIME = """
import enum
cudaError_t = enum.IntEnum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})
names = {"cudaDevAttrComputeCapabilityMajor": 75, "cudaDevAttrComputeCapabilityMinor": 76}
cudaDeviceAttr = enum.IntEnum("cudaDeviceAttr", names)
def cudaGetDevice(): return 0, 0
def cudaDeviceGetAttribute(attribute, device): return 0, attribute - 68
def cudaStreamCreate(): return 0, 4242
"""


@pytest.mark.parametrize("there", [True, False])
def test_onnx_runtime_on_a_board_has_the_clock_of_the_gpu(there: bool, tmp_path: Path):
    """What travels finds cuda-python, so that ONNX Runtime's CUDA provider is timed by events there too."""
    from edgecompile import remote

    (tmp_path / "runner.pyz").write_bytes(remote.runner())
    if there:
        (tmp_path / "cuda" / "bindings").mkdir(parents=True)
        (tmp_path / "cuda" / "bindings" / "runtime.py").write_text(RUNTIME)
    code = """
import sys
sys.modules["torch"] = None
sys.path[:0] = ["runner.pyz", "."]
from edgecompile.targets import ort_session
assert "runner.pyz" in ort_session.__file__
device = ort_session._device(ort_session.Options(("cuda", "cpu"), 1, "all", False))
print(device and (device.compute_capability, device.stream))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == ("('7.8', 4242)\n" if there else "None\n"), done.stderr


def test_bench_tells_the_phases_and_what_the_dla_takes(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from edgecompile import bench, driver, frontend, render_bench
    from edgecompile.remote import LocalBoard

    install("10.3.0", dla_cores=1)
    network().save(tmp_path / "net.onnx")
    (tmp_path / "scratch").mkdir()
    source = frontend.load(str(tmp_path / "net.onnx"), folder=tmp_path / "scratch")
    options = driver.Options("trt", passes="clean", bench=False, target_options={"dla": "0"})
    told: list[str] = []
    made = driver.build(source, tmp_path / "out", options, told.append)
    assert any(line.startswith("Building engine: ") for line in told), "the builder's progress"

    def elsewhere(folder: Path):
        raise InputError("the double does not reach another process")

    monkeypatch.setattr(board_runner, "footprint", elsewhere)
    with LocalBoard() as place:
        found = bench.run(made, made.probe()[0], board=place, seconds=0.3, sessions=2)
        table = bench.layers(made, made.probe()[0], repeats=2, board=place)
        arms = {"a": place.add(made.path), "b": place.add(made.path)}
        samples = place.session(arms, seconds=0.05)
        walls = place.session(arms, seconds=0.05, clock="wall")
    assert found.notes[0] == "DLA: 3 of 5 layers, 2 islands"
    assert found.phases and found.phases.pinned["cuda_graph"] is True and found.phases.compute > 0
    assert table.roofline is None and max(c.macs for c in table.layers) > 0
    assert "stem" in {m.path.partition(".")[0] for m in table.modules}
    found = bench.with_layers(found, table)
    assert bench.BenchResult.from_json(found.to_json()) == found
    jsonschema.validate(found.to_json(), bench.schema())
    shown = render_bench.markdown(found)
    assert "end to end" in shown and "cuda_graph on, transfers off" in shown and "longest first" in shown
    assert "roofline" not in shown and "<svg" in render_bench.page(found)
    assert {s.clock for s in samples.values()} == {"cuda_event"} and {s.clock for s in walls.values()} == {"wall"}
    for taken in samples.values():
        assert taken.wall is not None and (taken.seconds > 0).all()
        assert (taken.seconds < taken.wall).all(), "the clock of the GPU stands still while the host works"


def test_dynamic_batches(version: str, install: Install, tmp_path: Path):
    install(version)
    graph = network("n")
    with pytest.raises(InputError, match="axis 0 of input 'x' has no range") as caught:
        TrtTarget().build(graph, tmp_path, {})
    assert "--dynamic x:0=MIN:OPT:MAX" in str(caught.value)
    engine = TrtTarget().build(graph, tmp_path, {"dynamic": "x:0=1:2:4"})
    for batch in (1, 4, 2):
        assert_same(engine.run(feeds(batch)), graph, feeds(batch))
    with pytest.raises(InputError, match="5x3x8x8 is outside") as caught:
        engine.run(feeds(5))
    assert "1x3x8x8 to 4x3x8x8" in str(caught.value)
    again = TrtTarget().load(tmp_path, engine.manifest, graph)
    assert_same(again.run(feeds(3)), graph, feeds(3))
    for wrong in ("z:0=1:2:4", "x:2=1:2:4", "x:0=1:2:4,x:3=1:2:4"):
        with pytest.raises(InputError):
            TrtTarget().build(graph, tmp_path, {"dynamic": wrong})


def test_the_timing_cache_is_kept_and_replayed(install: Install, tmp_path: Path):
    knobs, cache = install(), tmp_path / "cache"
    first = TrtTarget().build(network(), tmp_path, {"timing_cache": str(cache)})
    assert cache.read_bytes() == (tmp_path / TIMING_CACHE).read_bytes() == b"measured;"
    assert first.manifest.options["_timing_cache_sha256"] == hashlib.sha256(b"measured;").hexdigest()
    TrtTarget().build(network(), tmp_path, {"timing_cache": str(cache)})
    assert cache.read_bytes() == b"measured;measured;"
    TrtTarget().build(network(), tmp_path, {"timing_cache": str(cache), "replay": "true"})
    assert "ERROR_ON_TIMING_CACHE_MISS" in knobs.config._flags
    assert cache.read_bytes() == b"measured;measured;"
    install(reject_cache=True)
    with pytest.raises(InputError, match="does not fit"):
        TrtTarget().build(network(), tmp_path, {"timing_cache": str(cache)})
    with pytest.raises(InputError, match="no timing cache"):
        TrtTarget().build(network(), tmp_path, {"timing_cache": str(tmp_path / "none"), "replay": "true"})


@pytest.mark.parametrize(
    "wrong",
    [{"levle": 3}, {"level": 6}, {"level": "x"}, {"workspace": "2GB"}, {"workspace": "0"}, {"hardware": "all"},
     {"replay": "true"}, {"dla_sram": "1MiB"}, {"weight_budget": "1MiB"}, {"refit": "maybe"}, {"dla": "99"},
     {"dynamic": {"x": 3}}, {"dynamic": {"x": {0: (4, 2, 1)}}}, {"dynamic": [1]}, {"workspace": "inf"}],
    ids=str,
)  # fmt: skip
def test_wrong_options(wrong: dict[str, Any], install: Install, tmp_path: Path):
    install()
    for use in (lambda: TrtTarget().build(network(), tmp_path, wrong), lambda: TrtTarget().check(wrong)):
        with pytest.raises(InputError):
            use()


def test_a_wrong_option_is_told_before_any_pass_runs(tmp_path: Path):
    network().save(tmp_path / "net.onnx")
    told = edgecompile_cli("build", tmp_path / "net.onnx", "--target", "trt", "--prepare", "--option", "levle=3")
    assert told.exit_code == 2 and "did you mean 'level'?" in told.output and "pass clean" not in told.output


def test_what_a_version_lacks(install: Install, tmp_path: Path):
    install("10.3.0")
    with pytest.raises(EnvironmentMissing, match="no hardware=same_compute_capability"):
        TrtTarget().build(network(), tmp_path, {"hardware": "same_compute_capability"})


def test_progress(install: Install, tmp_path: Path):
    install()
    told: list[str] = []
    TrtTarget().build(network(), tmp_path, {}, told.append)
    assert told[:2] == ["Building engine: 0/20", "Building engine: 2/20"] and len(told) == 10


def test_control_c_ends_the_build_after_a_step(install: Install, tmp_path: Path):
    install()
    told: list[str] = []

    def press(line: str) -> None:
        told.append(line)
        if len(told) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        TrtTarget().build(network(), tmp_path, {}, press)
    assert len(told) == 3 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is before


# -- without TensorRT --------------------------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing():
        raise EnvironmentMissing("TensorRT is not installed", "there is no Python module tensorrt", "install it")

    monkeypatch.setattr(trt_probe, "runtime", missing)


def test_prepare(monkeypatch: pytest.MonkeyPatch, install: Install, tmp_path: Path):
    without(monkeypatch)
    with pytest.raises(EnvironmentMissing, match="not installed"):
        TrtTarget().build(network("n"), tmp_path, {})
    options = {"dynamic": "x:0=1:2:4", "workspace": "1GiB"}
    prepared = TrtTarget().prepare(network("n"), options)
    assert prepared.versions == ("10.3", "10.16", "11.4") and prepared.manifest.files == ()
    assert "\n" not in prepared.line(tmp_path)
    assert "not installed" in prepared.line(tmp_path) and f"run edgecompile build {tmp_path}" in prepared.line(tmp_path)
    with pytest.raises(EnvironmentMissing, match="holds no engine yet"):
        TrtTarget().load(tmp_path, prepared.manifest, network("n"))
    for wrong in ("z:0=1:2:4", "x:2=1:2:4", "x:9=1:2:4", "x:0=1:2:4,x:3=1:2:4", ""):
        with pytest.raises(InputError, match=r"dynamic|no input|no range"):
            TrtTarget().prepare(network("n"), {"dynamic": wrong})
    install("10.3.0")
    assert TrtTarget().missing() is None
    assert TrtTarget().prepare(network("n"), options).line(tmp_path).startswith(f"{tmp_path} is prepared")
    engine = TrtTarget().build(network("n"), tmp_path, prepared.manifest.options)
    assert_same(engine.run(feeds(4)), network("n"), feeds(4))
    assert engine.manifest.options["dynamic"] == "x:0=1:2:4"


def test_a_prepared_bundle_is_finished_and_remembers_its_passes(
    monkeypatch: pytest.MonkeyPatch, install: Install, tmp_path: Path
):
    network().save(tmp_path / "net.onnx")
    line = ("build", tmp_path / "net.onnx", "--target", "trt", "--prepare", "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        without(patch)
        assert edgecompile_cli(*line).exit_code == 0
        unfinished = edgecompile_cli("bench", tmp_path / "out")
    prepared = Bundle.open(tmp_path / "out")
    assert prepared.prepared and prepared.manifest["passes"].startswith("clean,fold_norm,reparam")
    assert isinstance(unfinished.exception, EnvironmentMissing) or unfinished.exit_code == 4
    install("10.16.1.11")
    assert edgecompile_cli("build", tmp_path / "out", "--no-bench").exit_code == 0
    finished = Bundle.open(tmp_path / "out")
    assert not finished.prepared and finished.manifest["passes"] == prepared.manifest["passes"]
    assert finished.manifest["versions"]["tensorrt"] == "10.16.1.11"


def test_a_run_of_trtexec_becomes_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from edgecompile import bench

    without(monkeypatch)
    network().save(tmp_path / "net.onnx")
    line = ("build", tmp_path / "net.onnx", "--target", "trt", "--prepare", "-o", tmp_path / "out")
    assert edgecompile_cli(*line).exit_code == 0
    runs = tmp_path / "runs"
    runs.mkdir()
    missing = edgecompile_cli("bench", tmp_path / "out", "--trtexec", runs)
    assert missing.exit_code == 2 and "times.json" in missing.output
    calls = [
        {"startEnqMs": i, "endEnqMs": i + 0.1, "h2dMs": 0.2, "computeMs": 1 + i % 2, "d2hMs": 0.3, "latencyMs": 3}
        for i in range(500)
    ]
    (runs / "times.json").write_text(json.dumps(calls))
    names = [n.name for n in Bundle.open(tmp_path / "out").graph().nodes]
    (runs / "profile.json").write_text(json.dumps([{"count": 9}, *({"name": n, "averageMs": 0.5} for n in names)]))
    shown = edgecompile_cli("bench", tmp_path / "out", "--trtexec", runs, "--json", "-o", tmp_path / "report")
    document = json.loads((tmp_path / "report" / "bench.json").read_text())
    assert shown.exit_code == 0 and json.loads(shown.stdout) == document
    jsonschema.validate(document, bench.schema())
    assert [t["clock"] for t in document["timings"]] == ["cuda_event", "wall"]
    assert document["timings"][0]["percentiles"][-1]["value"] == pytest.approx(2e-3)
    assert document["phases"]["end_to_end"] == pytest.approx(3e-3) and document["phases"]["pinned"]["transfers"] is True
    assert document["phases"]["enqueue"] == pytest.approx(1e-4)
    assert "stem" in {m["path"].partition(".")[0] for m in document["layers"]["modules"]}
    (runs / "times.json").write_text('[{"computeMs": -1, "startEnqMs": 0, "endEnqMs": 0, "latencyMs": 1}]')
    assert edgecompile_cli("bench", tmp_path / "out", "--trtexec", runs).exit_code == 2


def edgecompile_cli(*arguments: object):
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def test_the_options_are_listed():
    shown = edgecompile_cli("build", "net.onnx", "--target", "trt", "--option", "help", "--json")
    assert shown.exit_code == 0
    listed = {row["option"]: row for row in json.loads(shown.stdout)["options"]}
    assert list(listed) == list(TrtTarget.options) and listed["nms_iou"]["default"] == "0.7"
    assert edgecompile_cli("build", "net.onnx", "--target", "tr", "--option", "help").exit_code == 2


def test_prepare_names_the_versions_that_do_not_take_it(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch)
    graph = network()
    graph.import_domains[0].version = 22
    prepared = TrtTarget().prepare(graph, {})
    assert prepared.versions == ("10.16", "11.4")
    assert "opset 22" in str(prepared.problems["10.3"][0])
    graph.nodes[2].attrs["dilations"] = [2, 2]
    graph.nodes[2].attrs["pads"] = [1, 1, 0, 0]
    with pytest.raises(InputError, match="pool"):
        TrtTarget().prepare(graph, {})


def test_the_probe(version: str, install: Install, monkeypatch: pytest.MonkeyPatch):
    install(version, dla_cores=2)
    found, device = TrtTarget().probe()
    assert found.available and found.version == version
    assert ("strongly typed only" in found.detail) == version.startswith("11")
    assert "2 DLA cores" in device.detail
    without(monkeypatch)
    (found,) = TrtTarget().probe()
    assert not found.available and found.fix


def test_facts_come_from_attributes(version: str):
    trt = make(version, Knobs())
    known = trt_probe.facts(trt)
    assert known.precision_flags == hasattr(trt.BuilderFlag, "FP16") == version.startswith("10")
    assert known.typed_by_default == version.startswith("11")
    assert ("same_compute_capability" in known.hardware_levels) == (version != "10.3.0")
    assert known.unused_flags == ()
    trt.__version__ = "99.0"
    assert replace(trt_probe.facts(trt), version=version) == known


# -- the source --------------------------------------------------------------------------------------------------------


def test_the_source_names_nothing_that_a_version_lacks(version: str):
    """Every ``trt.Class.name`` in the source, and every class of ``trt``, is in the signatures."""
    spec = signatures.load(version)
    functions = {"__version__", "init_libnvinfer_plugins"}
    found = 0
    for file in Path(build_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = ast.unparse(node).removeprefix("self._").split(".") if isinstance(node, ast.Attribute) else []
            if names[:1] != ["trt"] or len(names) < 2 or not all(map(str.isidentifier, names)) or names[1] in functions:
                continue
            assert names[1] in spec, f"{file.name}: {'.'.join(names)}"
            kind = {"members": [], "methods": {}, "attributes": {}} | spec[names[1]]
            known = {*kind["members"], *kind["methods"], *kind["attributes"], "Severity", "__init__", "__members__"}
            assert names[2:3] == [] or names[2] in known, f"{file.name}: {'.'.join(names)}"
            found += 1
    assert found > 25


# -- the double itself -------------------------------------------------------------------------------------------------


def test_the_double_refuses_what_the_bindings_refuse(version: str):
    trt = make(version, Knobs())
    builder = trt.Builder(trt.Logger())
    for wrong in (
        lambda: builder.create_network(flag=1),
        lambda: builder.create_network("1"),
        lambda: trt.Builder(),
        lambda: builder.create_builder_config().set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
        lambda: builder.create_builder_config().set_flag("FP16"),
    ):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (
        lambda: builder.build_cuda_engine,
        lambda: setattr(builder, "num_DLA_cores", 3),
        lambda: setattr(builder, "max_workspace_size", 3),
        lambda: trt.BuilderFlag.FP32,
    ):
        with pytest.raises(AttributeError):
            wrong()
    assert hasattr(trt.BuilderFlag, "FP16") == version.startswith("10")
