from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import frontend, oracle
from edgecompile.errors import EdgecompileError, InputError
from edgecompile.frontend import InputSpec, Range, from_module, load, parse_dynamic, parse_dynamics, parse_input
from edgecompile.graph import Graph, provenance

torch = pytest.importorskip("torch")
nn = torch.nn

SOURCES = Path(__file__).parent / "sources"


def line_of(path: Path, text: str) -> str:
    """``file:line`` of the first line that holds ``text``."""
    lines = path.read_text().splitlines()
    return f"{path.name}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def write(folder: Path, text: str, name: str = "model.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def refused(source: object, folder: Path, **options) -> InputError:
    with pytest.raises(InputError) as caught:
        load(str(source), folder=folder, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (folder / "probes.npz").exists()
    return caught.value


def recompute(source: frontend.Source) -> None:
    """The graph gives what eager torch gave, on every probe."""
    assert len(source.feeds) == len(source.reference) >= 2
    for feed, wanted in zip(source.feeds, source.reference, strict=True):
        found = oracle.run(source.graph, feed)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert oracle.compare(value, found[name]).max_rel < 1e-5


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "spec"),
    [
        ("x:1x3x224x224", "x", InputSpec((1, 3, 224, 224))),
        ("ids:7:int64", "ids", InputSpec((7,), "int64")),
        ("serving_default:0:2x4:float16", "serving_default:0", InputSpec((2, 4), "float16")),
    ],
)
def test_parse_input(text, name, spec):
    assert parse_input(text) == (name, spec)


@pytest.mark.parametrize("text", ["x", "x:", ":1x3", "x:1x0", "x:1x-3", "x:1,3", "x:1x3:float31", "x:1x3:", "x:axb"])
def test_parse_input_says_the_form(text):
    with pytest.raises(InputError, match="NAME:SHAPE"):
        parse_input(text)


def test_parse_dynamic():
    assert parse_dynamic("x:0=1:4:16") == ("x", 0, Range(1, 4, 16))
    assert parse_dynamic("in:0:2=32:32:64") == ("in:0", 2, Range(32, 32, 64))
    assert parse_dynamics(["x:0=1:4:16", "x:2=32:64:96", "y:0=1:1:2"]) == {
        "x": {0: Range(1, 4, 16), 2: Range(32, 64, 96)},
        "y": {0: Range(1, 1, 2)},
    }


@pytest.mark.parametrize("text", ["x", "x:0", "x:0=4", "x:0=1:4", "x=1:4:16", "x:-1=1:4:16", "x:0=a:4:16", ":0=1:2:3"])
def test_parse_dynamic_says_the_form(text):
    with pytest.raises(InputError, match="NAME:AXIS=MIN:OPT:MAX"):
        parse_dynamic(text)


@pytest.mark.parametrize("text", ["x:0=0:4:16", "x:0=4:2:16", "x:0=1:17:16", "x:0=4:4:4"])
def test_parse_dynamic_wants_an_ordered_range(text):
    with pytest.raises(InputError, match="MIN <= OPT <= MAX"):
        parse_dynamic(text)


def test_parse_dynamics_refuses_an_axis_given_twice():
    with pytest.raises(InputError, match="axis 0 of 'x' is given twice"):
        parse_dynamics(["x:0=1:4:16", "x:0=1:2:8"])


# -- what SOURCE may be ------------------------------------------------------------------------------------------------


def test_unknown_source_names_close_models(tmp_path):
    error = refused("shvit_s9", tmp_path)
    assert "shvit_s1" in error.why
    assert "model.py:FACTORY" in error.fix
    assert "shvit" not in refused("unheard_of", tmp_path).why


@pytest.mark.parametrize("name", ["model.py", "model.py:small", "net.onnx", "net.pt2"])
def test_missing_file(name, tmp_path):
    error = refused(tmp_path / name, tmp_path)
    assert error.why == "no such file"
    assert name.split(":")[0] in error.what


def test_folder_checkpoint_and_unknown_file(tmp_path):
    assert refused(tmp_path, tmp_path).why == "it is a folder"
    (tmp_path / "best.pth").write_bytes(b"x")
    assert "model()" in refused(tmp_path / "best.pth", tmp_path).fix
    (tmp_path / "net.txt").write_text("x")
    assert "SOURCE is" in refused(tmp_path / "net.txt", tmp_path).fix


def test_checkpoint_is_for_zoo_models(tmp_path):
    path = write(tmp_path, "")
    assert "zoo" in refused(path, tmp_path, checkpoint="weights.pth").why


def test_torch_is_not_imported_here():
    code = "import sys; import edgecompile.frontend; assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- files, in the child -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_packages(tmp_path_factory):
    steps: list[str] = []
    os.environ.pop("PYTHONPATH", None)
    path = SOURCES / "own_packages" / "model.py"
    return load(str(path), folder=tmp_path_factory.mktemp("own"), progress=steps.append), steps


def test_python_file(own_packages):
    source, steps = own_packages
    recompute(source)
    assert (source.name, source.kind) == ("model.py", "python")
    assert source.versions["torch"] == torch.__version__
    assert [(a.rung, a.ok, a.error, a.where) for a in source.attempts] == [("dynamo", True, "", "")]
    assert 0 < source.attempts[0].errors["output"].max_rel < 1e-5
    assert source.attempts[0].seconds > 0
    assert list(source.feeds[0]) == ["input"]
    assert steps[0] == "importing torch"
    assert "loading model.py" in steps


def test_user_folder_wins_over_our_packages(own_packages):
    source, _ = own_packages
    assert source.reference[0]["output"].shape == (1, 6, 6, 6)  # helper.WIDTH, and a Net from the user's `models`
    assert source.notes == ("model.py defines calibration_data()",)
    assert source.file is not None and source.file.defines == ("calibration_data",)
    assert source.file.request["path"] == str((SOURCES / "own_packages" / "model.py").resolve())
    assert {p for n in source.graph.nodes for p in provenance(n).modules} <= {"0", "1", "2"}
    assert not list((SOURCES / "own_packages").rglob("__pycache__"))


def test_random_variation_differs(own_packages):
    first, second = (next(iter(f.values())) for f in own_packages[0].feeds)
    assert first.shape == second.shape
    assert not np.allclose(first, second)


@pytest.mark.parametrize("progress", [None, lambda text: None])
def test_what_a_failing_file_prints_is_shown_once(progress, tmp_path, capfd):
    path = write(tmp_path, "print('talkative')\nraise ValueError\n")
    assert refused(path, tmp_path, progress=progress).what == "model.py:2: ValueError"
    assert capfd.readouterr().err == "talkative\n"


@pytest.mark.slow
def test_zoo(tmp_path):
    source = load("shvit_s1", folder=tmp_path, inputs={"x": (2, 3, 128, 128)}, seed=3)
    recompute(source)
    assert (source.name, source.kind, source.notes[0]) == ("shvit_s1", "zoo", "random weights (seed 3)")
    assert source.file is None
    assert source.feeds[0]["x"].shape == (2, 3, 128, 128)
    assert any("blocks" in p for n in source.graph.nodes for p in provenance(n).modules)


def test_a_zoo_model_that_comes_with_weights_has_them(tmp_path):
    from edgecompile import models

    source = load("repavit_cifar", folder=tmp_path, inputs={"x": (2, 3, 32, 32)}, seed=3)
    recompute(source)
    assert (source.name, source.kind, source.file) == ("repavit_cifar", "zoo", None)
    assert source.notes[0] == "the weights that come with edgecompile"
    x = source.feeds[0]["x"]
    assert x.shape == (2, 3, 32, 32)
    assert any("blocks" in p for n in source.graph.nodes for p in provenance(n).modules)
    expected = models.create("repavit_cifar", pretrained=True)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(next(iter(source.reference[0].values())), expected, rtol=1e-4, atol=1e-5)


def test_zoo_with_a_wrong_checkpoint(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    error = refused("efficientvit_m0", tmp_path, checkpoint=tmp_path / "other.pth")
    assert "does not fit" in error.what


@pytest.fixture
def control_flow(monkeypatch) -> Any:
    """The module of that name, in this process."""
    monkeypatch.syspath_prepend(str(SOURCES))
    return importlib.import_module("control_flow")


def test_control_flow_on_the_input_reaches_no_graph(tmp_path):
    path = SOURCES / "control_flow.py"
    error = refused(path, tmp_path)
    place = line_of(path, "if x.sum() > 0:")
    assert error.what.startswith(f"{place}: ")
    assert f"torch.export at {place}: GuardOnDataDependent" in error.why
    assert f"TorchScript at {place}: output 'output' differs from eager torch" in error.why
    assert "inputs other than the example" in error.why
    assert "torch.where" in error.fix


def test_control_flow_on_a_buffer_needs_the_second_rung(control_flow, tmp_path):
    path = SOURCES / "control_flow.py"
    source = from_module(control_flow.on_buffer(), control_flow.example_inputs(), folder=tmp_path)
    recompute(source)
    first, second = source.attempts
    assert (first.rung, first.ok) == ("dynamo", False)
    assert first.where.endswith(line_of(path, "if self.enabled.sum() > 0:"))
    assert "data-dependent" in first.error
    assert (second.rung, second.ok, second.error) == ("torchscript", True, "")
    assert {p for n in source.graph.nodes for p in provenance(n).modules} == {"linear"}


# -- errors in the user's file -----------------------------------------------------------------------------------------

NET = """
    import torch
    from torch import nn

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
"""


@pytest.mark.parametrize(
    ("text", "what", "why"),
    [
        ("def model(:\n    pass\n", "model.py:1: SyntaxError: ", "def model(:"),
        pytest.param(
            "x = 1\n\nimport no_such_package\n",
            "model.py:3: ModuleNotFoundError: No module named",
            "imported",
            marks=pytest.mark.slow,
        ),
        ("def build():\n    pass\n", "model.py has no function model()", "it defines build"),
        ("def model():\n    x = []\n    return x[3]\n", "model.py:3: IndexError: list index", "model() was called"),
        ("\ndef model():\n    return 7\n", "model.py:2: model() returned a int", "torch.nn.Module"),
        pytest.param(
            "import argparse\nargparse.ArgumentParser(exit_on_error=True).parse_args(['x'])\n",
            "model.py:2: SystemExit",
            "",
            marks=pytest.mark.slow,
        ),
        (
            NET + "    def example_inputs():\n        return torch.ones(1, 2, 7)\n",
            "model.py: RuntimeError: ",
            "1x2x7; 1 (Linear) failed",
        ),
        (
            NET + "    def example_inputs():\n        return 'x'\n",
            "model.py:7: example_inputs() returned a str",
            "tuple",
        ),
        (NET, "model.py has no function example_inputs()", "the shape of 'input' is unknown"),
    ],
    ids=["syntax", "import", "no-model", "raises", "not-a-module", "exits", "shape", "inputs-type", "no-inputs"],
)
def test_errors_name_file_and_line(text, what, why, tmp_path):
    path = write(tmp_path, text)
    error = refused(path, tmp_path)
    assert error.what.startswith(what)
    assert why in error.why


def test_shapes_on_the_command_line_stand_in_for_example_inputs(tmp_path, capfd):
    path = write(tmp_path, NET + "    print('talkative')\n")
    source = load(str(path), folder=tmp_path, inputs={"input": (5, 3, 4)})
    recompute(source)
    assert source.feeds[0]["input"].shape == (5, 3, 4)
    assert source.notes == ("random values of the shapes given for input (seed 0)",)
    assert capfd.readouterr() == ("", "")  # neither what the file prints nor what torch logs, for nothing failed
    write(tmp_path, "import os\nos._exit(3)\n")
    with pytest.raises(InputError, match="ended with status 3"):  # and not the earlier result
        load(str(path), folder=tmp_path)


def test_syntax_error_in_an_imported_file(tmp_path):
    write(tmp_path, "def f(:\n", "helper.py")
    path = write(tmp_path, "\nimport helper\n")
    assert refused(path, tmp_path).what.startswith("helper.py:1: SyntaxError")


def test_death_by_signal_is_one_line(tmp_path):
    path = write(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    error = refused(path, tmp_path)
    assert error.what == "model.py: the export process was killed by SIGKILL"
    assert "memory" in error.why


def test_a_crash_names_the_line(tmp_path):
    path = write(tmp_path, "import ctypes\n\ndef model():\n    ctypes.string_at(0)\n")
    assert refused(path, tmp_path).what == "model.py:4: the export process was killed by SIGSEGV"


def test_interrupt_ends_the_child_and_its_children(tmp_path):
    path = write(
        tmp_path,
        """
        import os, subprocess, time
        child = subprocess.Popen(["sleep", "1000"])
        with open("pids.tmp", "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.rename("pids.tmp", "pids")
        time.sleep(1000)
        """,
    )
    code = f"from pathlib import Path; from edgecompile import frontend; frontend.load({str(path)!r}, folder=Path('.'))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pids").exists())
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert all(alive(p) for p in pids)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(20) != 0
    wait_for(lambda: not any(alive(p) for p in pids))


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


# -- modules of this process -------------------------------------------------------------------------------------------


def test_module_is_left_as_it_was(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    module[1].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    recompute(from_module(module, torch.randn(3, 4), folder=tmp_path))
    assert [m.training for m in module.modules()] == [True, True, False, True]
    assert "forward" not in vars(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


Pair = namedtuple("Pair", "low high")


@dataclasses.dataclass
class Result:
    scores: torch.Tensor
    aux: object = None


class Nested(nn.Module):
    """Arguments by position and keyword, nested; outputs of every supported kind; one input is not used."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x, extra, *, gain=1.0, unused=None):
        y = self.scale(x) * gain
        return {
            "x": y,
            "pair": Pair(y + extra["bias"], (y - extra["bias"],)),
            "result": Result(y.softmax(-1), [y.argmax(-1), None]),
            "count": 3,
        }


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    example = {"x": torch.randn(2, 4), "extra": {"bias": torch.randn(4)}, "gain": 0.5, "unused": torch.ones(1)}
    return from_module(Nested(), example, folder=tmp_path_factory.mktemp("nested"))


def test_nested_inputs_and_outputs(nested):
    recompute(nested)
    assert [t.name for t in nested.graph.inputs][:2] == ["x", "extra.bias"]
    assert [t.name for t in nested.graph.outputs] == [
        "x_out",
        "pair.low",
        "pair.high.0",
        "result.scores",
        "result.aux.0",
    ]
    assert nested.reference[0]["result.aux.0"].dtype == np.int64
    bias = nested.feeds[0]["extra.bias"]
    np.testing.assert_allclose(
        nested.reference[0]["pair.low"] - nested.reference[0]["pair.high.0"], 2 * bias[None].repeat(2, 0), rtol=1e-4
    )
    assert "outputs that are no tensors are left out: count (int)" in nested.notes
    assert "output 'x' is named 'x_out': another tensor has its name" in nested.notes
    assert provenance(nested.graph.nodes[0]).modules == ("scale",)


def test_an_unused_input_that_the_exporter_drops(tmp_path):
    class Ignores(nn.Module):
        def forward(self, x, mask):
            return x * 2 if self.on > 0 else x  # torch.export refuses to branch on a buffer

    module = Ignores()
    module.register_buffer("on", torch.ones(()))
    source = from_module(module, (torch.randn(2, 3), torch.ones(2)), folder=tmp_path)
    assert [a.rung for a in source.attempts if a.ok] == ["torchscript"]
    assert [list(f) for f in source.feeds] == [["x"], ["x"]]
    assert source.notes == ("input 'mask' is not used and not part of the graph",)
    recompute(source)


def test_sequences_are_numbered(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b, [a - b, a]

    source = from_module(Two(), [torch.randn(2, 3), torch.randn(2, 3)], folder=tmp_path)
    recompute(source)
    assert [t.name for t in source.graph.inputs] == ["a", "b"]
    assert [t.name for t in source.graph.outputs] == ["output_0", "output_1.0", "output_1.1"]


def test_half_precision(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).half()
    source = from_module(module, torch.randn(2, 3, 8, 8).half(), folder=tmp_path)
    assert {f["input"].dtype for f in source.feeds} == {np.dtype("float16")}
    assert source.reference[0]["output"].dtype == np.float16
    assert 1e-6 < source.attempts[-1].errors["output"].max_rel < 1e-2
    assert all(w.dtype != np.float32 for w in source.graph.constants().values())


def test_half_precision_refuses_bfloat16_and_mixed_types(tmp_path):
    module = nn.Linear(4, 4)
    with pytest.raises(InputError, match="bfloat16"):
        from_module(module.bfloat16(), torch.randn(2, 4).bfloat16(), folder=tmp_path)
    with pytest.raises(InputError, match="dtype"):
        from_module(module.float(), torch.randn(2, 4).half(), folder=tmp_path)


def test_dynamic_axes_of_two_inputs(tmp_path):
    class Sum(nn.Module):
        def forward(self, a, b, c):
            return a + b.mean((2, 3))[:, :1] + c.sum(1), c

    example = (torch.randn(1, 3), torch.randn(1, 2, 8, 8), torch.randn(1, 5, 3))
    dynamic = {
        "a": {0: (1, 4, 16)}, "b": {0: (1, 4, 16), 2: (4, 8, 12), 3: (4, 6, 12)},
        "c": {0: (1, 4, 16), 1: (2, 5, 9)},
    }  # fmt: skip
    source = from_module(Sum(), example, dynamic=dynamic, folder=tmp_path)
    shapes = {p.name: p.shape for p in (*source.graph.signature().inputs, *source.graph.signature().outputs)}
    assert shapes == {
        "a": ("batch", 3), "b": ("batch", 2, "height", "width"), "c": ("batch", "c_1", 3),
        "output_0": ("batch", 3), "output_1": ("batch", "c_1", 3),
    }  # fmt: skip
    assert [{n: x.shape for n, x in f.items()} for f in source.feeds] == [
        {"a": (4, 3), "b": (4, 2, 8, 6), "c": (4, 5, 3)},
        {"a": (4, 3), "b": (4, 2, 8, 6), "c": (4, 5, 3)},
        {"a": (1, 3), "b": (1, 2, 4, 4), "c": (1, 2, 3)},
    ]
    recompute(source)


def test_dynamic_axes_by_torchscript(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("on", torch.ones(()))

        def forward(self, x):
            return x.flatten(1) if self.on > 0 else x

    source = from_module(Branch(), torch.randn(1, 2, 3), dynamic={"x": {0: (1, 1, 8)}}, folder=tmp_path)
    assert source.attempts[-1].rung == "torchscript"
    assert source.graph.signature().inputs[0].shape == ("batch", 2, 3)
    assert source.graph.signature().outputs[0].shape == ("batch", 6)
    assert [f["x"].shape[0] for f in source.feeds] == [1, 1, 8]
    recompute(source)


def test_an_extent_that_the_module_fixes(tmp_path):
    class Follows(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 6)

    class Fixes(nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]), 6)

    options = {"dynamic": {"x": {0: (2, 4, 8)}}, "folder": tmp_path}
    recompute(from_module(Follows(), torch.randn(4, 2, 3), **options))
    with pytest.raises(InputError) as caught:
        from_module(Fixes(), torch.randn(4, 2, 3), **options)
    assert line_of(Path(__file__), "x.reshape(int(x.shape[0]), 6)") in caught.value.what
    assert "axis 0 of 'x' (batch) became fixed at 4" in caught.value.why
    assert "leave the axis static" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": {"y": {0: (1, 2, 4)}}}, "no input 'y'; its inputs are 'input'"),
        ({"dynamic": {"input": {2: (1, 2, 4)}}}, "'input' has no axis 2; its shape is 2x4"),
        ({"dynamic": {"input": {0: (4, 2, 4)}}}, "not in order"),
        ({"inputs": {"y": (2, 4)}}, "no input 'y'"),
        ({"inputs": {"input": (2, 5)}}, "mat1 and mat2 shapes"),
        ({"dynamic": {"input": {1: (4, 4, 8)}}}, "was run on input 2x8"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(InputError) as caught:
        from_module(nn.Linear(4, 4), torch.randn(2, 4), folder=tmp_path, **options)
    assert message in str(caught.value)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, y=None):
        return self.value


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (
            nn.Linear(4, 4),
            (torch.ones(1, 4), torch.ones(1)),
            "example inputs do not fit Linear.forward; too many positional",
        ),
        (nn.Linear(4, 4), {"x": torch.ones(1, 4)}, "its parameters are input"),
        (nn.Linear(4, 4), np.ones((1, 4), np.float32), "are a numpy.ndarray"),
        (nn.Linear(4, 4), (np.ones((1, 4), np.float32),), "example input 'input' is a numpy.ndarray"),
        (nn.Linear(4, 4), (3,), "hold no tensor"),
        (nn.Linear(4, 4), torch.ones(1, 4).to_sparse(), "input 'input' is sparse_coo"),
        (nn.Linear(4, 4), torch.ones(1, 4, dtype=torch.complex64), "input 'input' is complex64"),
        (Returns(7), torch.ones(1), "forward returns no tensor; it returns output (int)"),
        (Returns({"a": {1, 2}}), torch.ones(1), "output 'a' is a set"),
    ],
)
def test_inputs_and_outputs_of_wrong_types(module, example, message, tmp_path):
    with pytest.raises(InputError) as caught:
        from_module(module, example, folder=tmp_path)
    assert message in str(caught.value)


def test_nan_is_noted(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return x.log(), x.exp()

    source = from_module(Log(), torch.tensor([[-1.0, 2.0]]), folder=tmp_path)
    assert source.notes == ("output 'output_0' holds NaN or infinity, in eager torch too",)


def test_a_module_that_rejects_random_inputs(tmp_path):
    class Careful(nn.Module):
        def forward(self, x):
            if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
                assert x[0, :2].tolist() == [1.0, 2.0], "x must begin with 1, 2"
            return x * 2

    source = from_module(Careful(), torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), folder=tmp_path)
    assert len(source.feeds) == 1
    assert "the module rejects random ones" in source.notes[0]
    assert "test_frontend.py" in source.notes[0]


def test_a_random_module_is_named_as_such(tmp_path):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(InputError, match="not deterministic"):
        from_module(Noise(), torch.randn(2, 3), folder=tmp_path)


def test_an_operator_without_onnx(control_flow, tmp_path):
    path = SOURCES / "control_flow.py"
    with pytest.raises(InputError) as caught:
        from_module(control_flow.unsupported(), control_flow.example_inputs(), folder=tmp_path)
    place = line_of(path, "svdvals")
    assert f"{place}: the module cannot be exported" in caught.value.what
    assert caught.value.why.count(place) == 2
    assert "replace the operator" in caught.value.fix
    recompute(from_module(control_flow.chosen(), control_flow.example_inputs(), folder=tmp_path))


def test_inputs_changed_in_place(tmp_path):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    example = torch.ones(2, 3)
    source = from_module(InPlace(), example, folder=tmp_path)
    recompute(source)
    assert torch.equal(example, torch.ones(2, 3))
    np.testing.assert_array_equal(source.feeds[0]["x"], np.ones((2, 3), np.float32))


def test_compiled_modules_and_own_eval(tmp_path):
    class Merging(nn.Linear):
        """Doubles its output in eval mode, by a train() of its own."""

        factor = 1

        def train(self, mode=True):
            self.factor = 1 if mode else 2
            return super().train(mode)

        def forward(self, x):
            return super().forward(x) * self.factor

    x, module = torch.randn(2, 4), Merging(4, 4, bias=False)
    source = from_module(torch.compile(module), x, folder=tmp_path)
    recompute(source)
    assert list(source.feeds[0]) == ["x"]
    wanted = 2 * (x @ module.weight.T).detach().numpy()
    np.testing.assert_allclose(source.reference[0]["output"], wanted, rtol=1e-5, atol=1e-6)


def test_hooks_and_scripted_modules(tmp_path):
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked.register_forward_hook(lambda module, args, output: output * 3)
    source = from_module(hooked, torch.randn(2, 4), folder=tmp_path / "hooked")
    recompute(source)
    plain = from_module(nn.Sequential(hooked[0]), torch.from_numpy(source.feeds[0]["input"]), folder=tmp_path / "plain")
    np.testing.assert_allclose(source.reference[0]["output"], 3 * plain.reference[0]["output"], rtol=1e-6)
    scripted = from_module(torch.jit.script(nn.Linear(4, 4)), torch.randn(2, 4), folder=tmp_path / "scripted")
    recompute(scripted)


# -- .pt2 --------------------------------------------------------------------------------------------------------------


def test_pt2(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, image, *, scale):
            y = self.body(image) * scale
            return {"y": y, "rest": (y.sum(1), None)}

    module = Net().eval()
    batch = torch.export.Dim("n", min=1, max=8)
    program = torch.export.export(
        module, (torch.randn(2, 3, 8, 8),), {"scale": torch.randn(2, 1, 1, 1)},
        dynamic_shapes={"image": {0: batch}, "scale": {0: batch}},
    )  # fmt: skip
    torch.export.save(program, tmp_path / "net.pt2")
    (tmp_path / "out").mkdir()
    source = load(str(tmp_path / "net.pt2"), folder=tmp_path / "out")
    recompute(source)
    assert (source.name, source.kind) == ("net.pt2", "pt2")
    assert {p.name: p.shape for p in source.graph.signature().inputs} == {
        "image": ("batch", 3, 8, 8), "scale": ("batch", 1, 1, 1)
    }  # fmt: skip
    assert list(source.reference[0]) == ["y", "rest.0"]
    assert [f["image"].shape[0] for f in source.feeds] == [2, 2, 1]
    assert any(m.startswith("body") for n in source.graph.nodes for m in provenance(n).modules)
    with torch.no_grad():
        wanted = module(torch.from_numpy(source.feeds[2]["image"]), scale=torch.from_numpy(source.feeds[2]["scale"]))
    np.testing.assert_allclose(source.reference[2]["y"], wanted["y"].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rungs", [("dynamo",), ("torchscript",)])
def test_pt2_without_bounds(rungs, tmp_path, monkeypatch):
    from edgecompile import ladder
    from edgecompile.blame import User

    monkeypatch.setattr(ladder, "RUNGS", rungs)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    program = torch.export.export(module, (torch.randn(4, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    args, kwargs = program.example_inputs

    def export(dynamic: dict[str, dict[int, Range]]) -> Any:
        return ladder.export(
            program.module(), args, kwargs, folder=tmp_path, user=User(), inputs={}, dynamic=dynamic, program=program
        )  # fmt: skip

    with pytest.raises(InputError, match="axis 1 of 'input' cannot be dynamic"):
        export({"input": {1: Range(4, 4, 8)}})
    made = export({})
    assert [f["input"].shape for f in made.feeds] == [(4, 4), (4, 4), (1, 4)]
    assert made.graph.signature().inputs[0].shape == ("batch", 4)
    for feed, wanted in zip(made.feeds, made.reference, strict=True):
        np.testing.assert_allclose(oracle.run(made.graph, feed)["output"], wanted["output"], rtol=1e-5, atol=1e-6)


def test_pt2_that_is_none(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"nothing of the kind")
    assert "cannot read" in refused(tmp_path / "net.pt2", tmp_path).what


# -- .onnx -------------------------------------------------------------------------------------------------------------


def affine(path: Path, rows: int = 4, columns: int = 3) -> Path:
    """``y = x @ w`` with a symbolic batch and ``w`` as external data; a large ``w`` is a sparse file of zeros."""
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(rows, columns))
    weight.data_location = TensorProto.EXTERNAL
    size = 4 * rows * columns
    data = path.with_name(path.name + ".data")
    for key, value in (("location", data.name), ("offset", "0"), ("length", str(size))):
        weight.external_data.add(key=key, value=value)
    with open(data, "wb") as file:
        file.write(np.arange(min(size // 4, 1000), dtype=np.float32).tobytes())
        file.truncate(size)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", columns])], [weight],
    )  # fmt: skip
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_onnx_with_external_data(tmp_path):
    source = load(str(affine(tmp_path / "net.onnx")), folder=tmp_path, dynamic={"x": {0: (1, 5, 8)}})
    assert (source.name, source.kind, source.reference, source.attempts) == ("net.onnx", "onnx", (), ())
    assert [f["x"].shape for f in source.feeds] == [(5, 4), (1, 4)]
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_allclose(oracle.run(source.graph, source.feeds[0])["y"], source.feeds[0]["x"] @ weight, rtol=1e-5)
    assert [f["x"].shape for f in load(str(tmp_path / "net.onnx"), folder=tmp_path).feeds] == [(1, 4), (2, 4)]


def test_onnx_options_that_do_not_fit(tmp_path):
    path = affine(tmp_path / "net.onnx")
    assert refused(path, tmp_path, inputs={"z": InputSpec((1, 4))}).what == "the model has no input 'z'"
    assert "has shape 1x5" in refused(path, tmp_path, inputs={"x": InputSpec((1, 5))}).what
    assert "is float16" in refused(path, tmp_path, inputs={"x": InputSpec((1, 4), "float16")}).what
    assert "axis 1 of 'x' cannot be dynamic" in refused(path, tmp_path, dynamic={"x": {1: (1, 4, 8)}}).what
    path.with_name("net.onnx.data").unlink()
    assert "net.onnx.data" in refused(path, tmp_path).why


def test_feeds_share_named_dimensions(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])], "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", "T"]) for n in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "T"])],
    )  # fmt: skip
    model = Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    feeds = frontend.feeds_for(model, {"a": InputSpec((3, 7))})
    assert [{n: x.shape for n, x in f.items()} for f in feeds] == [{"a": (3, 7), "b": (3, 7)}] * 2
    assert not np.array_equal(feeds[0]["a"], feeds[1]["a"])


@pytest.mark.slow
def test_onnx_beyond_two_gib(tmp_path):
    source = load(str(affine(tmp_path / "large.onnx", 1 << 15, 17000)), folder=tmp_path)
    assert source.graph.weight_bytes() > 1 << 31
    assert oracle.run(source.graph, source.feeds[0])["y"].shape == (1, 17000)


def test_errors_cross_the_process_as_what_they_are(tmp_path):
    """An error of ours keeps its class, and so its exit code."""
    path = write(
        tmp_path,
        """
        from edgecompile.errors import InputError
        def model():
            raise InputError("no weights here", "they were never trained", "train it")
        """,
    )
    error = refused(path, tmp_path)
    assert isinstance(error, EdgecompileError)
    assert (error.what, error.why, error.fix) == ("model.py:4: no weights here", "they were never trained", "train it")
