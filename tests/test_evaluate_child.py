"""``evaluate(run)`` of a user's file: what run takes and gives, the scores, and the process that it all happens in."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from edgecompile import bundle, driver, evaluate_child, frontend, registry
from edgecompile.blame import User
from edgecompile.errors import InputError
from edgecompile.evaluate_child import Run, constants_of, join, on_engine, on_module, scores, split
from edgecompile.frontend import Source, UserFile
from edgecompile.graph import Graph, Port

torch = pytest.importorskip("torch")
nn = torch.nn
ort = pytest.importorskip("onnxruntime")

from edgecompile.ladder import Call  # noqa: E402 - it imports torch

BATCH = 2


class Net(nn.Module):
    """Two inputs, one of them the same for all samples, and two outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, shift, gain=1.0):
        y = self.linear(x) * gain
        return {"y": y + shift, "sum": y.sum(1)}


@dataclasses.dataclass
class Pair:
    """The same module twice: as an engine for a batch of 2, and as it is."""

    call: Call
    engine: Run
    constants: list

    @property
    def module(self) -> nn.Module:
        return self.call.module

    @property
    def eager(self) -> Run:
        return self.eager_until(math.inf)

    def eager_until(self, until: float) -> Run:
        return Run(self.call, self.constants, on_module, until)


def pair(module: nn.Module, example: dict, folder: Path) -> Iterator[Pair]:
    source = frontend.from_module(module, example, folder=folder)
    module.eval()
    call, constants = Call.bind(module, (), example, User()), constants_of((), example)
    engine = registry.target("ort").build(source.graph, folder, {"threads": 1})
    ports = source.graph.signature().inputs
    yield Pair(call, Run(call, constants, on_engine(engine.run, ports)), constants)
    engine.close()


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Iterator[Pair]:
    torch.manual_seed(0)
    example = {"x": torch.randn(BATCH, 4), "shift": torch.randn(3), "gain": 0.5}
    yield from pair(Net(), example, tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> Iterator[Pair]:
    torch.manual_seed(0)
    yield from pair(nn.Linear(4, 3), {"input": torch.randn(BATCH, 4)}, tmp_path_factory.mktemp("linear"))


def wanted(net: Pair, x: torch.Tensor, shift: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [v.numpy() for v in net.module(x, shift, 0.5).values()]


# -- what run takes and gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["engine", "eager"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("form", ["tuple", "dict", "other order"])
def test_outputs_come_in_kind_and_in_the_order_of_the_model(net, on, kind, form):
    x, shift = torch.randn(BATCH, 4), torch.randn(3)
    a, b = (x, shift) if kind == "torch" else (x.numpy(), shift.numpy())
    forms = {"tuple": (a, b, 0.5), "dict": {"x": a, "shift": b, "gain": 0.5}}
    given = forms.get(form, {"gain": 0.5, "shift": b, "x": a})
    found = getattr(net, on)(given)
    assert type(found) is tuple and len(found) == 2
    for value, reference in zip(found, wanted(net, x, shift), strict=True):
        assert isinstance(value, torch.Tensor if kind == "torch" else np.ndarray)
        np.testing.assert_allclose(np.asarray(value), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on", ["engine", "eager"])
def test_one_output_comes_alone_and_one_input_may(linear, on):
    x = torch.randn(BATCH, 4)
    reference = linear.module(x).detach().numpy()
    run = getattr(linear, on)
    for given in (x, (x,), [x], {"input": x}):
        assert isinstance(run(given), torch.Tensor)
        np.testing.assert_allclose(run(given).numpy(), reference, rtol=1e-5, atol=1e-6)
    for given in (x.numpy(), (x.numpy(),), {"input": x.numpy()}, x.numpy()[::-1][::-1]):
        assert isinstance(run(given), np.ndarray)
        np.testing.assert_allclose(run(given), reference, rtol=1e-5, atol=1e-6)


def test_a_module_that_writes_to_its_inputs_does_not_reach_the_data():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    x = torch.ones(1, 3)
    run = Run(Call.bind(InPlace(), (x,), {}, User()), [], on_module)
    assert [run(x).tolist() for _ in range(2)] == [[[2.0] * 3]] * 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_cut_for_the_engine_and_joined(net, count):
    x, shift = torch.randn(BATCH * count, 4), torch.randn(3)
    for value, reference in zip(net.engine((x, shift, 0.5)), wanted(net, x, shift), strict=True):
        np.testing.assert_allclose(value.numpy(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_batch_that_is_no_multiple_is_refused_for_the_engine_only(linear, rows):
    x = torch.randn(rows, 4)
    with pytest.raises(InputError) as caught:
        linear.engine(x)
    assert caught.value.what == f"input 'input' of run() has a batch of {rows}"
    assert "2 at a time" in caught.value.why and "--dynamic input:0=1:2:" in caught.value.fix
    assert frontend.parse_dynamic(caught.value.fix.split()[-1])[0] == "input"
    assert linear.eager(x).shape == (rows, 3)


F32 = onnx.TensorProto.FLOAT


def test_an_engine_with_a_dynamic_batch_gets_it_whole():
    feeds = {"x": np.ones((5, 4), np.float32), "s": np.ones((), np.float32)}
    ports = [Port("x", F32, ("n", 4)), Port("s", F32, ())]
    assert split(feeds, ports) == ([feeds], 0)
    fixed = [Port("x", F32, (1, 4)), Port("s", F32, ())]
    parts, size = split(feeds, fixed)
    assert (len(parts), size, parts[0]["x"].shape, parts[0]["s"].shape) == (5, 1, (1, 4), ())


def test_batches_that_do_not_belong_together_are_refused():
    ports = [Port("a", F32, (2, 4)), Port("b", F32, (2, 1))]
    both = {"a": np.ones((8, 4), np.float32), "b": np.ones((8, 1), np.float32)}
    assert len(split(both, ports)[0]) == 4
    with pytest.raises(InputError, match="do not belong together; a 8, b 4"):
        split({**both, "b": both["b"][:4]}, ports)


def test_an_output_that_is_not_per_sample_cannot_be_joined():
    rows = {"y": np.zeros((2, 3)), "mean": np.zeros(())}
    assert join([rows], 0) == rows
    assert join([{"y": rows["y"]}] * 3, 2)["y"].shape == (6, 3)
    with pytest.raises(InputError, match=r"output .mean. cannot be joined.*scalar for a batch of 2"):
        join([rows] * 3, 2)
    with pytest.raises(InputError, match="2x3 for a batch of 1"):
        join([{"y": rows["y"]}] * 3, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x, s: x, "inputs do not fit Net.forward"),
        (lambda x, s: {"x": x, "shift": s, "z": x}, "inputs do not fit Net.forward"),
        (lambda x, s: {"x": x, "shift": s, "gain": x}, "run() was given the inputs x, shift, gain"),
        (lambda x, s: (x, s), "other constants than the model was built with; none, and example_inputs() has 0.5"),
        (lambda x, s: (x, s, 0.7), "0.7, and example_inputs() has 0.5"),
        (lambda x, s: (x, object(), 0.5), "input 'shift' is a object"),
        (lambda x, s: "x", "the inputs given to run are a str"),
        (lambda x, s: (x[:, :3], s, 0.5), "the model wants 2x4"),
        (lambda x, s: (x.double(), s, 0.5), "the model wants float32"),
    ],
)
def test_other_inputs_than_those_of_the_model_are_refused(net, given, message):
    x, shift = torch.randn(BATCH, 4), torch.randn(3)
    net.engine((x, shift, 0.5))
    with pytest.raises(InputError) as caught:
        net.engine(given(x, shift))
    assert message in str(caught.value) and "example input " not in str(caught.value)


# -- scores of graphs --------------------------------------------------------------------------------------------------

SCORED = """import pathlib
import torch

HERE = pathlib.Path(__file__).parent


def model():
    return torch.nn.Linear(4, 3)


def example_inputs():
    return torch.zeros(2, 4)


def evaluate(run):
    with open(HERE / "calls", "a") as file:
        file.write("x")
    print(input_() if (HERE / "input").exists() else "", end="")
    return run(torch.ones(6, 4)).sum() + float((HERE / "data").read_text())


def input_():
    import sys
    return sys.stdin.read()
"""


def test_graphs_are_scored_in_one_process_and_kept_while_evaluate_is_what_it_was(tmp_path):
    path, cache = tmp_path / "scored.py", tmp_path / "cache"
    path.write_text(SCORED)
    (tmp_path / "data").write_text("0")
    request = {"kind": "python", "path": str(path), "factory": "model", "inputs": {}, "dynamic": {}, "seed": 0}
    file = UserFile(request, ("evaluate",))

    def graph(weight: float) -> Graph:
        text = (
            '<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] input) => (float[2,3] y) { y = MatMul (input, w) }'
        )
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((4, 3), weight, np.float32), "w"))
        return Graph.from_proto(model)

    def scored(*weights: float) -> tuple[list[float], int]:
        with frontend.scorer(file, folder=tmp_path / "scratch", cache=cache) as scorer:
            found = [scorer(graph(w), bool(i % 2)) for i, w in enumerate(weights)]
            assert scorer.failure is None
        count = len((tmp_path / "calls").read_text())
        (tmp_path / "calls").unlink()
        return found, count

    assert scored(1, 2, math.nan, 2) == ([72.0, 144.0, -math.inf, 144.0], 3)
    assert scored(1, 2, 3) == ([72.0, 144.0, 216.0], 2)  # the first shows that what was kept still holds
    (tmp_path / "data").write_text("1")
    (tmp_path / "input").touch()  # stdin is empty for the user's code, whose requests come that way
    assert scored(1, 2) == ([73.0, 145.0], 2)


@pytest.mark.slow
def test_a_score_that_fails_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "scored.py"
    request = {"kind": "python", "path": str(path), "factory": "model", "inputs": {}, "dynamic": {}, "seed": 0}
    for line, message in (("return run(torch.ones(6, 5))", r"scored\.py"), ("return float('nan')", "nan")):
        path.write_text(SCORED.replace("return run(torch.ones(6, 4)).sum()", f"{line}; 1"))
        with frontend.scorer(UserFile(request, ("evaluate",)), folder=tmp_path / "scratch") as scorer:
            text = (
                '<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] input) => (float[2,4] y) { y = Relu (input) }'
            )
            with pytest.raises(InputError, match=message) as caught:
                scorer(Graph.from_proto(onnx.parser.parse_model(text)), False)
            assert scorer.failure is caught.value
        assert not list((tmp_path / "scratch").glob("graph*"))


# -- scores ------------------------------------------------------------------------------------------------------------


def both(evaluate, pair: Pair, **options) -> dict:
    return scores(evaluate, User(Path(__file__).parent), pair.engine, pair.eager_until, **options)


@pytest.mark.parametrize(
    "value",
    [0.25, 1, -3, np.float32(0.25), np.int64(2), np.array(0.25), torch.tensor(0.25), torch.tensor(3, dtype=torch.int8)],
)
def test_a_score_is_any_finite_number(linear, value):
    made = both(lambda run: value, linear)
    assert made == {"engine": float(value), "reference": float(value), "note": ""}
    assert type(made["engine"]) is float


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"), (float("inf"), "inf"), (np.float32("-inf"), "-inf"), (torch.tensor(float("nan")), "nan"),
        (None, "a NoneType"), ("0.7", "a str"), (True, "a bool"), (np.bool_(1), "a bool"), ([0.7], "a list"),
        (torch.ones(2), "a Tensor"), (1j, "a complex"),
    ],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused(linear, value, shown):
    def evaluate(run):
        return value

    line = evaluate.__code__.co_firstlineno
    with pytest.raises(InputError) as caught:
        both(evaluate, linear)
    assert caught.value.what.startswith(f"test_evaluate_child.py:{line}: evaluate() returned {shown}")
    assert "finite number" in caught.value.why


def test_both_calls_draw_the_same_numbers(linear):
    seen = []

    def evaluate(run):
        seen.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return sum(seen[-1])

    made = both(evaluate, linear, seed=7)
    assert made["engine"] == made["reference"]
    assert both(evaluate, linear, seed=8)["engine"] != made["engine"]


def test_without_eager_torch_there_is_a_note(linear):
    def evaluate(run):
        if run is not linear.engine:
            raise ValueError("boom")
        return 0.5

    made = both(evaluate, linear)
    assert (made["engine"], made["reference"]) == (0.5, None)
    assert "ValueError: boom" in made["note"] and "test_evaluate_child.py:" in made["note"]
    broken = both(lambda run: 0.5 if run is linear.engine else float("nan"), linear)
    assert broken["reference"] is None and "returned nan with eager torch" in broken["note"]


@pytest.mark.parametrize(("patience", "stopped"), [(0.0, True), (60.0, False)])
def test_eager_torch_is_stopped_when_it_takes_far_longer(linear, patience, stopped):
    linear.engine(torch.ones(BATCH, 4))
    finished = []

    def evaluate(run):
        start = time.perf_counter()
        while run is not linear.engine and time.perf_counter() < start + 0.5:
            try:
                run(torch.ones(BATCH, 4))
            except Exception as error:
                raise AssertionError("user code can catch what stops it") from error
        finished.append(run)
        return 1.0

    made = both(evaluate, linear, patience=patience)
    if stopped:
        assert made["reference"] is None and made["note"].startswith("evaluate() was stopped after ")
        assert finished == [linear.engine]
    else:
        assert made == {"engine": 1.0, "reference": 1.0, "note": ""} and len(finished) == 2


def test_a_module_that_is_not_the_exported_one_is_refused(linear):
    example, x = linear.call, np.ones((BATCH, 4), np.float32)
    right = linear.module(torch.from_numpy(x)).detach().numpy()
    evaluate_child._same_module(example, {"input": x}, {"output": right})
    with pytest.raises(InputError, match="another module than the one that was exported"):
        evaluate_child._same_module(example, {"input": x}, {"output": right + 1})


# -- in a process of its own -------------------------------------------------------------------------------------------

NET = """\
import numpy as np
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4, bias=False))


def example_inputs():
    return torch.randn(2, 3, 8, 8)


"""
# The labels are those that the eager model gives, so it scores 1, and whoever guesses scores 1/4.
AGREEMENT = """\
def evaluate(run):
    print("scoring", sorted(labels.unique().tolist()))
    return (run(images).argmax(1) == labels).float().mean()


torch.manual_seed(0)
teacher = model().eval()
images = torch.randn(64, 3, 8, 8)
labels = teacher(images).argmax(1)


def model():
    return teacher
"""


def write(folder: Path, text: str, name: str = "model.py") -> Path:
    (folder / name).write_text(textwrap.dedent(text))
    return folder / name


@pytest.fixture(scope="module")
def agreement(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("agreement")
    path = write(folder, NET + AGREEMENT)
    return frontend.load(str(path), folder=folder / "scratch")


QUICK = driver.Options(seconds=0.1, target_options={"threads": 1})


@pytest.fixture(scope="module")
def built(agreement, tmp_path_factory) -> tuple[bundle.Bundle, str]:
    """The bundle, and what was said while it was built."""
    said: list[str] = []
    return driver.build(agreement, tmp_path_factory.mktemp("built") / "out", QUICK, said.append), "\n".join(said)


def accuracy_of(made: bundle.Bundle) -> dict | None:
    return json.loads((made.path / "report.json").read_text())["accuracy"]


def other_file(source: Source, path: Path) -> Source:
    assert source.file is not None
    return dataclasses.replace(source, file=UserFile({**source.file.request, "path": str(path)}, ("evaluate",)))


def test_the_engine_agrees_with_the_model_that_made_the_labels(agreement, built):
    made, said = built
    assert agreement.file is not None and agreement.file.defines == ("evaluate",)
    assert accuracy_of(made) == {"engine": 1.0, "reference": 1.0, "note": ""}
    assert said.index("evaluating the engine") < said.index("evaluating eager torch")
    assert {"request.json", "result.json", "crash.txt"}.isdisjoint(made.manifest["files"])
    bundle.Bundle.open(made.path)


def test_an_engine_of_another_function_scores_lower(agreement, built, tmp_path, capfd):
    graph = agreement.graph.copy()
    (weight,) = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.values.size == 4 * 144]
    weight.values = -weight.values
    engine = registry.target("ort").build(graph, tmp_path, {"threads": 1})
    graph.save(tmp_path / bundle.MODEL)
    bundle.write_probe(tmp_path, agreement.feeds[0], agreement.reference[0])
    found = frontend.evaluate(
        agreement.file, tmp_path, engine.manifest, folder=tmp_path / "scratch", progress=lambda _: None
    )
    assert found.engine < 0.5 and found.reference == 1.0 and found.note == ""
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == "scoring [0, 1, 2, 3]\n" * 2  # every label occurs, and guessing does not do


def test_without_benchmarks_nothing_is_evaluated(agreement, tmp_path):
    broken = write(tmp_path, "raise RuntimeError\n")
    source = other_file(agreement, broken)
    made = driver.build(source, tmp_path / "out", dataclasses.replace(QUICK, bench=False))
    assert accuracy_of(made) is None


def test_a_file_that_fails_is_one_error_with_its_line_and_nothing_is_written(agreement, tmp_path, capfd):
    text = NET + "def evaluate(run):\n    print('talkative')\n    run(torch.ones(3, 3, 8, 8))\n"
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        driver.build(other_file(agreement, path), tmp_path / "out", QUICK, lambda _: None)
    line = 1 + text.splitlines().index("    run(torch.ones(3, 3, 8, 8))")
    assert caught.value.what == f"model.py:{line}: input 'input' of run() has a batch of 3"
    assert capfd.readouterr().err == "talkative\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model.py"]


def test_other_weights_are_no_reference(agreement, built, tmp_path):
    """The file draws its weights from a generator that nothing seeds."""
    made, _ = built
    text = NET + AGREEMENT.replace("torch.manual_seed(0)", "torch.manual_seed(np.random.default_rng().integers(2**31))")
    file = other_file(agreement, write(tmp_path, text)).file
    assert file is not None
    found = frontend.evaluate(file, made.path, made.engine_manifest, folder=tmp_path / "scratch")
    assert found.reference is None and found.engine < 0.9
    assert "model() made another module than the one that was exported" in found.note


def test_death_by_signal_is_one_line(agreement, built, tmp_path):
    made, _ = built
    path = write(tmp_path, NET + "import os\n\ndef evaluate(run):\n    os.kill(os.getpid(), 9)\n")
    file = other_file(agreement, path).file
    assert file is not None
    with pytest.raises(InputError) as caught:
        frontend.evaluate(file, made.path, made.engine_manifest, folder=tmp_path / "scratch")
    assert caught.value.what == "model.py: the evaluation process was killed by SIGKILL"
    assert "memory" in caught.value.why and "--input" not in caught.value.fix


def test_interrupt_ends_the_child(agreement, built, tmp_path):
    made, _ = built
    path = write(
        tmp_path,
        NET + "import os, time\n\ndef evaluate(run):\n    print(os.getpid(), flush=True)\n    time.sleep(1000)\n",
    )
    file = other_file(agreement, path).file
    assert file is not None
    code = (
        "from pathlib import Path; from edgecompile import bundle, frontend; "
        f"made = bundle.Bundle.open({str(made.path)!r}); file = frontend.UserFile({dict(file.request)!r}, ()); "
        "frontend.evaluate(file, made.path, made.engine_manifest, folder=Path('scratch'), progress=lambda _: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    child = int(parent.stderr.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(20) != 0
    end = time.monotonic() + 20
    while Path(f"/proc/{child}/status").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.05)
    parent.stderr.close()
