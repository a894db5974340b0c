"""The ONNX Runtime target on a GPU: options, refusals, CUDA graphs, clocks, and what the manifest says.

Without a GPU, a double takes the place of ONNX Runtime's CUDA provider: the real package with sessions that compute on
the CPU, but only when the stream they were given is waited for, and that refuse what the CUDA provider refuses. What
it cannot show is shown on a GPU by the tests marked ``gpu``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import bench, oracle
from edgecompile import device as device_module
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.targets import ort_session
from edgecompile.targets.ort import OrtTarget

ort = pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent / "trt"))
from tensorrt_double import STREAMS, HostDevice, Knobs  # noqa: E402

CUDA = ort_session.PROVIDERS["cuda"]


def net() -> Graph:
    """Two convolutions of a torch module ``stem``; the batch is free."""

    def value(name: str, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    rng = np.random.default_rng(0)
    weights = [("w1", (8, 3, 3, 3)), ("w2", (8, 8, 3, 3))]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Conv", ["a", "w2"], ["y"], "second", pads=[1] * 4),
    ]
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'stem', 'stem.{node.name}', 'conv2d']")
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 8, n) for n, s in weights]
    graph = helper.make_graph(nodes, "g", [value("x", "n", 3, 8, 8)], [value("y", "n", 8, 8, 8)], tensors)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def feeds(seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)}


def agrees(outputs: Any, graph: Graph, given: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(outputs["y"], oracle.run(graph, given)["y"], rtol=1e-4, atol=1e-5)


# -- the double --------------------------------------------------------------------------------------------------------


class Binding(ort.IOBinding):
    """Buffers of the GPU lie on the host, and are told apart by what they were asked to be."""

    def __init__(self, session):
        super().__init__(session)
        self.places: list[str] = []

    def bind_ortvalue_input(self, name, ortvalue):
        self.places.append(getattr(ortvalue, "place", "cpu"))
        super().bind_ortvalue_input(name, ortvalue)

    def bind_output(self, name, device_type="cpu", device_id=0, element_type=None, shape=None, buffer_ptr=None):
        self.places.append(device_type)
        super().bind_output(name, "cpu", 0, element_type, shape, buffer_ptr)


class Double(types.ModuleType):
    """The module ``onnxruntime`` with a CUDA provider.

    Attributes:
        broken: sessions are made without the provider, as when a library of CUDA is missing.
        left: names of nodes that the provider does not take.
        capture_error: CUDA graphs fail while they are captured.
        sessions, bindings: that were made.
    """

    def __init__(self):
        super().__init__("onnxruntime")
        self.__dict__.update({k: v for k, v in vars(ort).items() if k != "__name__"})
        self.broken, self.left, self.capture_error = False, frozenset(), False
        self.sessions: list[Any] = []
        self.bindings: list[Binding] = []
        double = self

        class OrtValue(ort.OrtValue):
            @classmethod
            def ortvalue_from_numpy(cls, numpy_obj, device_type="cpu", device_id=0, vendor_id=-1):
                made = super().ortvalue_from_numpy(numpy_obj)
                made.place = device_type
                return made

        class InferenceSession(ort.InferenceSession):
            def __init__(self, path_or_bytes, sess_options=None, providers=None, provider_options=None, **kwargs):
                asked = dict(providers)
                self.asked, self.graphs = asked, {}
                self.options = asked.get(CUDA, {})
                assert kwargs == {"enable_fallback": 0}
                assert set(self.options) <= {*ort_session.PROVIDER_OPTIONS["cuda"], "user_compute_stream"}
                if self.captures and double.left:
                    raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
                super().__init__(path_or_bytes, sess_options, [ort_session.PROVIDERS["cpu"]], **kwargs)
                double.sessions.append(self)

            @property
            def captures(self) -> bool:
                return self.options.get("enable_cuda_graph") == "1"

            def get_providers(self):
                return super().get_providers() if double.broken else list(self.asked)

            def get_provider_graph_assignment_info(self):
                parts = super().get_provider_graph_assignment_info()
                return [
                    types.SimpleNamespace(
                        ep_name=ort_session.PROVIDERS["cpu"] if n.name in double.left else CUDA,
                        get_nodes=lambda n=n: [n],
                    )
                    for part in parts
                    for n in part.get_nodes()
                ]

            def io_binding(self):
                double.bindings.append(Binding(self))
                return double.bindings[-1]

            def run(self, output_names, input_feed, run_options=None):
                if CUDA in self.asked and self.captures:
                    assert run_options.get_run_config_entry("gpu_graph_id") == "-1", "a copy would be replayed"
                return super().run(output_names, input_feed)

            def run_with_iobinding(self, iobinding, run_options=None):
                def entry(key: str) -> str:
                    try:
                        return run_options.get_run_config_entry(key)
                    except RuntimeError:
                        return ""

                number = entry("gpu_graph_id") or "0"
                if self.captures and number != "-1":
                    if double.capture_error:
                        raise RuntimeError("operation not permitted when stream is capturing")
                    assert set(iobinding.places) == {"cuda"}, "a CUDA graph replays copies of old inputs"
                    assert self.graphs.setdefault(number, iobinding) is iobinding, "replays another set of inputs"
                stream = STREAMS.get(int(self.options.get("user_compute_stream", 0)))
                if entry("disable_synchronize_execution_providers") == "1":
                    assert stream is not None, "nobody can wait for a stream of ONNX Runtime's own"
                    stream.enqueue(lambda: super(InferenceSession, self).run_with_iobinding(iobinding))
                else:
                    super().run_with_iobinding(iobinding)

        self.OrtValue, self.InferenceSession = OrtValue, InferenceSession
        self.get_available_providers = lambda: [ort_session.PROVIDERS[p] for p in ("tensorrt", "cuda", "cpu")]


@pytest.fixture
def double(monkeypatch) -> Double:
    made = Double()
    monkeypatch.setattr(ort_session, "runtime", lambda: made)
    monkeypatch.setattr(device_module, "open_device", lambda: HostDevice(Knobs()))
    return made


@pytest.fixture
def no_events(monkeypatch) -> None:
    def nothing():
        raise EnvironmentMissing("no torch with CUDA, no cuda-python")

    monkeypatch.setattr(device_module, "open_device", nothing)


def build(folder: Path, graph: Graph | None = None, **options: Any) -> Any:
    return OrtTarget().build(graph or net(), folder, {"providers": "cuda"} | options)


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_runs_on_a_stream_of_ours_with_buffers_on_the_device(double, tmp_path):
    graph = net()
    engine = build(tmp_path, graph)
    options = dict(double.sessions[-1].asked)[CUDA]
    assert int(options["user_compute_stream"]) in STREAMS
    assert (options["use_tf32"], options["device_id"], options["enable_cuda_graph"]) == ("0", "0", "1")
    agrees(engine.run(feeds()), graph, feeds())
    call = engine.call(feeds())
    assert set(double.bindings[-1].places) == {"cuda"}
    call()
    agrees({"y": double.bindings[-1].copy_outputs_to_cpu()[0]}, graph, feeds())
    assert (engine.clock, engine.threads) == ("cuda_event", 0)


def test_every_set_of_inputs_is_a_cuda_graph_of_its_own(double, tmp_path):
    graph = net()
    engine = build(tmp_path, graph)
    given = [feeds(1), feeds(2), feeds(3, batch=4)]
    calls = [engine.call(one) for one in given]
    bindings = double.bindings[-3:]
    for call in [*calls, *reversed(calls)]:
        call()
    for one, binding in zip(given, bindings, strict=True):
        agrees({"y": binding.copy_outputs_to_cpu()[0]}, graph, one)
    assert sorted(double.sessions[-1].graphs) == ["1", "2", "3"]


def test_a_timer_waits_for_the_events(double, tmp_path):
    engine = build(tmp_path)
    timer = engine.timer(feeds())
    stream = STREAMS[engine._stream]
    recorded, waited = [], []
    record, synchronize = stream.record, stream.synchronize
    stream.record = lambda event: (recorded.append(len(stream._queue)), record(event))
    stream.synchronize = lambda: (waited.append(len(stream._queue)), synchronize())
    assert timer() > 0
    assert recorded == [0, 2] and waited == [3], "an event, the model, an event"


def test_bench_reads_the_cuda_clock(double, tmp_path):
    engine = build(tmp_path)
    samples = bench._session(engine, feeds(), "net", 0.05)
    assert list(samples) == ["cuda_event", "wall"]
    assert (samples["cuda_event"].seconds <= samples["wall"].seconds).all()


def test_nodes_left_to_the_cpu_are_named_and_rule_out_a_graph(double, tmp_path):
    double.left = frozenset({"second"})
    graph = net()
    engine = build(tmp_path, graph)
    assert engine.manifest.options["_on_cpu"] == ["stem.second (Conv)"]
    assert "1 of 2 nodes run on the CPU: stem.second (Conv)" in engine.manifest.options["_notes"]
    assert any(
        note.startswith("without CUDA graph; timed with CUDA events") for note in engine.manifest.options["_notes"]
    )
    engine.call(feeds())()
    assert not double.sessions[-1].captures
    with pytest.raises(InputError, match="graph capture"):
        build(tmp_path, graph, **{"cuda.enable_cuda_graph": "true"})


def test_a_graph_without_cpu_nodes_says_so(double, tmp_path):
    options = build(tmp_path).manifest.options
    assert options["_on_cpu"] == []
    assert options["_notes"] == ["each set of inputs is replayed as a CUDA graph; timed with CUDA events"]


def test_a_graph_that_cannot_be_captured_runs_without(double, tmp_path):
    double.capture_error = True
    graph = net()
    engine = build(tmp_path, graph)
    engine.call(feeds())()
    agrees({"y": double.bindings[-1].copy_outputs_to_cpu()[0]}, graph, feeds())
    assert not double.sessions[-1].captures
    strict = build(tmp_path, graph, **{"cuda.enable_cuda_graph": "1"})
    with pytest.raises(InputError, match="stream is capturing"):
        strict.call(feeds())


def test_without_events_the_wall_clock_waits_for_onnx_runtime(double, no_events, tmp_path):
    graph = net()
    engine = build(tmp_path, graph)
    assert engine.clock == "wall"
    assert "user_compute_stream" not in double.sessions[-1].options
    engine.call(feeds())()
    agrees({"y": double.bindings[-1].copy_outputs_to_cpu()[0]}, graph, feeds())
    with pytest.raises(EnvironmentMissing, match="no CUDA event"):
        engine.timer(feeds())
    assert "timed with the wall clock" in engine.manifest.options["_notes"][0]


def test_transfers_are_part_of_the_call(double, tmp_path):
    graph = net()
    engine = build(tmp_path, graph, transfers="true")
    engine.call(feeds())()
    assert set(double.bindings[-1].places) == {"cpu"}
    assert not double.sessions[-1].captures
    agrees({"y": double.bindings[-1].copy_outputs_to_cpu()[0]}, graph, feeds())
    assert engine.manifest.options["transfers"] is True


def test_another_gpu_is_timed_by_the_wall(double, tmp_path):
    engine = build(tmp_path, **{"cuda.device_id": "1"})
    assert engine.clock == "wall"
    assert double.sessions[-1].options["device_id"] == "1"


def test_opens_again_from_its_manifest(double, tmp_path):
    graph = net()
    engine = build(tmp_path, graph, **{"cuda.gpu_mem_limit": "2GiB"})
    graph.save(tmp_path / "model.onnx")
    assert engine.manifest.options["cuda.gpu_mem_limit"] == str(2 << 30)
    for again in (OrtTarget().load(tmp_path, engine.manifest, graph), ort_session.load(tmp_path, engine.manifest)):
        agrees(again.run(feeds()), graph, feeds())
        assert double.sessions[-1].options["gpu_mem_limit"] == str(2 << 30)


def test_layers(double, tmp_path):
    layers = build(tmp_path, level="basic").layers(feeds(), repeats=1)
    assert {m for layer in layers for m in layer.modules} >= {"stem.first", "stem.second"}


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_provider_that_does_not_load_is_refused(double, tmp_path, monkeypatch):
    double.broken = True
    monkeypatch.setattr(ort_session, "unloadable", lambda folder, provider: "libcudnn.so.9: cannot open")
    with pytest.raises(EnvironmentMissing, match="cannot use its cuda provider") as caught:
        build(tmp_path)
    assert (caught.value.exit_code, caught.value.why) == (4, "libcudnn.so.9: cannot open")
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.fix
    with pytest.raises(EnvironmentMissing, match=r"libnvinfer\.so\.10.*cannot use 11.*--target trt"):
        build(tmp_path, providers="tensorrt")


def test_an_error_of_the_device_is_not_one_of_the_model():
    text = "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"
    error = ort_session.rejected(RuntimeError(text), lambda text: "")
    assert isinstance(error, EnvironmentMissing) and "smaller batch" in error.fix
    assert isinstance(ort_session.rejected(RuntimeError("Invalid argument"), lambda text: ""), InputError)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_missing_library_is_named(tmp_path):
    def library(name: str, *needs: str) -> None:
        command = ["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(tmp_path / f"lib{name}.so"), f"-L{tmp_path}"]
        subprocess.run([*command, "-Wl,--no-as-needed", *(f"-l{n}" for n in needs)], check=True)

    library("onnxruntime_providers_shared")
    library("ec_missing")
    library("onnxruntime_providers_cuda", "ec_missing")
    (tmp_path / "libec_missing.so").unlink()
    assert ort_session.unloadable(tmp_path, "cuda").startswith("libec_missing.so: cannot open shared object file")
    library("onnxruntime_providers_cuda")
    assert ort_session.unloadable(tmp_path, "cuda") == ""


@pytest.mark.parametrize(
    ("installed", "why", "fix"),
    [
        ([], "comes with the package onnxruntime-gpu", "pip install 'edgecompile[gpu]'"),
        (["onnxruntime"], "overwrite each other", "pip uninstall -y onnxruntime, then pip install 'edgecompile[gpu]'"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "onnxruntime has overwritten files of onnxruntime-gpu",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'edgecompile[gpu]'",
        ),
    ],
)
def test_what_gets_a_provider_depends_on_what_is_installed(monkeypatch, installed, why, fix):
    monkeypatch.setattr(ort_session, "_installed", lambda: installed)
    told, command = ort_session._absent("cuda")
    assert why in told
    assert command == fix


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="the CUDA provider is here")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_package_for_the_cpu_is_refused(tmp_path, provider):
    with pytest.raises(EnvironmentMissing, match=f"no {provider} provider") as caught:
        build(tmp_path, providers=provider)
    assert caught.value.exit_code == 4
    assert caught.value.fix == "pip uninstall -y onnxruntime, then pip install 'edgecompile[gpu]'"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda.device": "0"}, "did you mean 'device_id'"),
        ({"cuda.device_id": "-1"}, "whole number from 0"),
        ({"cuda.gpu_mem_limit": "lots"}, "is not a size"),
        ({"cuda.gpu_mem_limit": "0"}, "is not a size"),
        ({"cuda.cudnn_conv_algo_search": "best"}, "there are EXHAUSTIVE, HEURISTIC, DEFAULT"),
        ({"cuda.use_tf32": "maybe"}, "neither true nor false"),
        ({"cuda.user_compute_stream": "1"}, "a stream of its own"),
        ({"cuda.enable_cuda_graph": "1", "transfers": "1"}, "cannot be part of a CUDA graph"),
        ({"tensorrt.trt_auxiliary_streams": "0"}, "add providers=tensorrt"),
        ({"providers": "tensorrt", "tensorrt.trt_dla_enable": "1"}, "use --target trt --option dla=0"),
        ({"providers": "tensorrt", "tensorrt.trt_fp16_enable": "1"}, "precision belongs to the graph"),
        ({"providers": "tensorrt", "tensorrt.trt_int8_enable": "0"}, "precision belongs to the graph"),
        ({"providers": "tensorrt", "tensorrt.trt_builder_optimization_level": "9"}, "from 0 to 5"),
        ({"providers": "cpu", "cpu.use_arena": "0"}, "it has none"),
    ],
)
def test_wrong_provider_options(double, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path, **options)
    assert not double.sessions and not list(tmp_path.iterdir())


def test_provider_options_as_onnx_runtime_takes_them():
    given = {
        "providers": "tensorrt",
        "tensorrt.trt_max_workspace_size": "1.5GiB",
        "tensorrt.trt_engine_cache_enable": "yes",
        "tensorrt.trt_engine_cache_path": "engines",
        "tensorrt.device_id": "1",
        "cuda.cudnn_conv_algo_search": "heuristic",
    }
    chosen = ort_session.parse(Double(), given)
    (first, tensorrt), (second, cuda), (third, cpu) = ort_session._arguments(chosen, 77, False)
    assert [first, second, third] == [ort_session.PROVIDERS[p] for p in ("tensorrt", "cuda", "cpu")]
    assert tensorrt == {
        "device_id": "1",
        "trt_max_workspace_size": str(3 << 29),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "engines",
        "trt_cuda_graph_enable": "0",
        "user_compute_stream": "77",
    }
    assert cuda["device_id"] == "1" and cuda["cudnn_conv_algo_search"] == "HEURISTIC"
    assert cpu == {}


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu() -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    if why := ort_session._defect(ort, "cuda"):
        pytest.skip(f"the CUDA provider cannot be used: {why}")


@pytest.fixture(scope="module")
def zoo(gpu) -> tuple[Graph, dict[str, np.ndarray]]:
    pytest.importorskip("torch")
    import tempfile

    from edgecompile import frontend
    from edgecompile.pipeline import Pipeline

    with tempfile.TemporaryDirectory() as folder:
        source = frontend.load("shvit_s1", folder=Path(folder))
        Pipeline.parse("clean,fold_norm,reparam").run(source.graph, source.feeds, verify=False)
        return source.graph, dict(source.feeds[0])


def close(found: Any, wanted: Any, tolerance: float) -> None:
    for name, value in wanted.items():
        error = np.abs(found[name].astype(np.float64) - value).max()
        assert error <= tolerance * np.abs(value).max(), name


@pytest.mark.gpu
@pytest.mark.parametrize("graph_option", [{}, {"cuda.enable_cuda_graph": "0"}], ids=["default", "no graph"])
def test_cuda_agrees_with_the_cpu(gpu, zoo, tmp_path, graph_option):
    graph, given = zoo
    engine = build(tmp_path, graph, **graph_option)
    wanted = oracle.run(graph, given)
    close(engine.run(given), wanted, 1e-3)
    other = {name: value[::-1, ..., ::-1].copy() for name, value in given.items()}
    calls = [(engine.call(one), one) for one in (given, other)]
    for call, _ in calls * 3:
        call()
    for call, one in calls:
        found = dict(zip(engine._outputs, _binding(call).copy_outputs_to_cpu(), strict=True))
        close(found, oracle.run(graph, one), 1e-3)


def _binding(call: Any) -> Any:
    """The binding that a call executes."""
    cells = [c.cell_contents for c in call.__closure__ or ()] or [call]
    execute = next(c for c in cells if hasattr(c, "args"))
    return execute.args[0]


@pytest.mark.gpu
def test_events_are_within_the_wall_clock(gpu, zoo, tmp_path):
    graph, given = zoo
    engine = build(tmp_path, graph)
    if engine.clock != "cuda_event":
        pytest.skip("neither torch with CUDA nor cuda-python")
    samples = bench._session(engine, given, "shvit_s1", 1.0)
    event, wall = samples["cuda_event"].p50, samples["wall"].p50
    assert 0 < event <= wall
    slower = bench._session(build(tmp_path, graph, transfers="1"), given, "shvit_s1", 1.0)["wall"].p50
    assert slower > wall * 0.9


@pytest.mark.gpu
def test_float16_on_cuda(gpu, zoo, tmp_path):
    from edgecompile.pipeline import Pipeline

    graph, given = zoo
    half = graph.copy()
    Pipeline.parse("cast").run(half, [given], verify=False)
    close(build(tmp_path, half).run(given), oracle.run(graph, given), 2e-2)


@pytest.mark.gpu
def test_what_is_left_to_the_cpu_is_known(gpu, zoo, tmp_path):
    options = build(tmp_path, zoo[0]).manifest.options
    assert options["_on_cpu"] is not None
    assert len(options["_on_cpu"]) < len(zoo[0].nodes) / 2
