"""Engines below fp32 through the driver and the command line: data, the guard, what is refused, what is prepared."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_qdq import graph_of

from edgecompile import bundle, driver, frontend
from edgecompile.errors import InputError
from edgecompile.frontend import Source, UserFile
from edgecompile.graph import Graph
from edgecompile.measure import Samples
from edgecompile.pipeline import Drop, Step, Trace
from edgecompile.sensitivity import LayerScore, Search
from edgecompile.target import LayerTime

NET = """import torch
from torch import nn


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def example_inputs():
    return torch.randn(1, 3, 24, 24)
"""
DATA = """

def calibration_data():
    torch.manual_seed(2)
    for _ in range(6):
        yield torch.randn(1, 3, 24, 24)
"""


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=dict(os.environ))


def network() -> Graph:
    """The layers of NET as an ONNX file has them, for what does not need the user's file."""
    rng, held = np.random.default_rng(1), {}
    for name, shape in {"0": (32, 3, 3, 3), "1": (32, 32, 3, 3), "2": (32, 32, 3, 3), "3": (5, 32)}.items():
        held[f"w{name}"] = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        held[f"b{name}"] = rng.standard_normal(shape[0]).astype(np.float32)
    text = """(float[1,3,24,24] x) => (float[1,5] y) {
        c0 = Conv <pads=[1,1,1,1]> (x, w0, b0)  r0 = Relu (c0)
        c1 = Conv <pads=[1,1,1,1]> (r0, w1, b1)  r1 = Relu (c1)
        c2 = Conv (r1, w2, b2)  r2 = Relu (c2)
        p = GlobalAveragePool (r2)  f = Flatten (p)  y = Gemm <transB=1> (f, w3, b3)
    }"""
    return graph_of(text, 18, **held)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain.py").write_text(NET)
    (tmp_path / "data.py").write_text(NET + DATA)
    network().save(tmp_path / "net.onnx")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).standard_normal((4, 3, 24, 24)).astype(np.float32))
    return tmp_path


@pytest.fixture
def source(folder) -> Source:
    return frontend.load(str(folder / "net.onnx"), folder=folder / "scratch")


def ops(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node}


# -- data --------------------------------------------------------------------------------------------------------------


def test_int8_without_data_stops_and_says_how_to_give_some(folder):
    done = run("build", "net.onnx", "--precision", "int8", "-o", "out", "--no-bench", cwd=folder)
    assert done.returncode == 2 and "--calib" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_int8_from_the_data_of_the_users_file(folder):
    done = run("build", "data.py", "--precision", "int8", "-o", "out", "--no-bench", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "QuantizeLinear" in ops(folder / "out") and report["provenance"]["precision"] == "int8"
    assert not report["warnings"]
    snr = min(e["snr_db"] for e in report["parity"]["outputs"].values())
    assert 15 < snr < 80, "int8, and still the same model"


def test_data_from_a_file_and_random_data_only_when_asked_for(folder):
    line = ("build", "net.onnx", "--precision", "int8", "--no-bench", "--json", "--calib-memory", "64MiB")
    done = run(*line, "--calib", "images.npy", "-o", "a", cwd=folder)
    assert done.returncode == 0 and not json.loads(done.stdout)["warnings"], done.stderr
    done = run(*line, "--calib", "random:2", "-o", "b", cwd=folder)
    assert "random numbers" in json.loads(done.stdout)["warnings"][0]
    done = run(*line, "--calib", "nothing", "-o", "c", cwd=folder)
    assert done.returncode == 2 and not (folder / "c").exists()


def test_an_error_in_calibration_data_names_the_line(folder, source):
    path = folder / "wrong.py"
    file = UserFile({"kind": "python", "path": str(path), "factory": "model", "seed": 0}, ("calibration_data",))
    source = dataclasses.replace(source, file=file)
    for value, message in (("torch.zeros(1, 3, 5, 5)[9]", r"wrong\.py:16"), ("torch.zeros(1, 3, 5, 5)", "1x3x24x24")):
        path.write_text(NET + f"\n\ndef calibration_data():\n    yield {value}\n")
        with pytest.raises(InputError, match=message):
            driver.build(source, folder / "out", driver.Options(precision="int8", bench=False))
        assert not (folder / "out").exists()


def test_images_are_read_as_the_configuration_says(folder):
    image = pytest.importorskip("PIL.Image")
    (folder / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), np.uint8)
        image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "edgecompile.toml").write_text("[preprocess]\nsize = [24, 24]\nmean = [0.5, 0.5, 0.5]\nstd = 0.25\n")
    line = ("build", "net.onnx", "--precision", "int8", "--no-bench", "--calib", "images", "-o", "out")
    done = run(*line, "--config", "edgecompile.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "edgecompile.toml").write_text("[preprocess]\nsize = [24, 24]\nmeen = [0.5, 0.5, 0.5]\n")
    done = run(*line, "--config", "edgecompile.toml", cwd=folder)
    assert done.returncode == 2 and "mean" in done.stderr


# -- the guard ---------------------------------------------------------------------------------------------------------


def arm(seconds: float) -> Samples:
    calls = seconds * (1 + 0.01 * np.random.default_rng(int(seconds * 1e6)).random(120))
    return Samples("x", "thread_cpu", calls, 1, np.arange(120) // 2, sessions=np.arange(120) // 20)


@pytest.mark.parametrize(("engine", "slower"), [(0.5e-3, False), (0.99e-3, False), (1.1e-3, True)])
def test_an_engine_must_be_faster_than_what_it_was_made_from(engine, slower):
    def step(exact: bool) -> Step:
        return Step("p", exact, (), (), None, None, None, 0.0)  # type: ignore[arg-type]

    arms = {"plain export": arm(3e-3), "reparam": arm(1e-3), "engine": arm(engine)}
    stages = [(step(True), None), (step(False), None)]
    layers = [
        LayerTime("a", "Conv", 900.0, ("a",), ("stem",)),
        LayerTime("q", "QuantizeLinear", 90.0, ("q",), ("stem",)),
    ]
    found = driver._slower(arms, stages, layers, driver.Options(precision="int8"))  # type: ignore[arg-type]
    assert bool(found) == slower
    if slower:
        assert "1.1" in found and "1 conversions" in found and "stem" in found
    exact = [(step(True), None), (step(True), None)]
    assert not driver._slower(arms, exact, layers, driver.Options())  # type: ignore[arg-type]
    assert not driver._slower({}, stages, layers, driver.Options(precision="int8"))  # type: ignore[arg-type]


@pytest.mark.parametrize("force", [False, True])
def test_the_faster_engine_is_the_result_unless_forced(folder, source, monkeypatch, force):
    real, said = driver._slower, []
    monkeypatch.setattr(
        driver, "_slower", lambda arms, stages, layers, options: "" if real({}, stages, layers, options) else
        "int8 is not faster" if options.precision == "int8" else "",
    )  # fmt: skip
    calib = str(folder / "images.npy")
    options = driver.Options(precision="int8", seconds=0.1, force=force, target_options={"threads": 1}, calib=calib)
    made = driver.build(source, folder / "out", options, said.append)
    assert made.manifest["precision"] == ("int8" if force else "fp32")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["warnings"][0].startswith("int8 is not faster")
    assert report["verdict"][0]["text"].startswith("The build says") or "int8 is not faster" in str(
        report["verdict"][0]
    )
    assert (folder / "out" / "rejected-int8.json").is_file() != force
    assert ("QuantizeLinear" in ops(folder / "out")) == force
    bundle.Bundle.open(folder / "out").engine().close()


@pytest.mark.parametrize(
    ("passes", "why"),
    [("clean,quantize{min_snr=90,seconds=20}", "keep the budget"), ("clean,quantize{skip=*}", "no layer of the model")],
)
def test_int8_without_a_layer_in_int8_says_that_it_is_fp32(folder, passes, why):
    line = ("build", "net.onnx", "--precision", "int8", "--calib", "images.npy", "--no-bench", "-o", "out", "--json")
    done = run(*line, "--passes", passes, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert why in report["warnings"][0] and report["warnings"][0].endswith("this is fp32")
    assert report["provenance"]["precision"] == "fp32" and "this is fp32" in str(report["verdict"][0])
    assert bundle.Bundle.open(folder / "out").manifest["precision"] == "fp32"
    assert "QuantizeLinear" not in ops(folder / "out")


def test_fp16_keeps_its_budget(folder, source):
    made = driver.build(source, folder / "out", driver.Options(precision="fp16", bench=False, min_snr=45.0))
    assert "Cast" in ops(made.path) and made.manifest["passes"].endswith("cast{min_snr=45.0}")
    stored = onnx.load(made.path / "model.onnx").graph.initializer
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in stored)
    feeds, reference = made.probe()
    found = made.engine().run(feeds)
    for name, wanted in reference.items():
        noise = np.square(found[name] - wanted).sum()
        assert 10 * np.log10(np.square(wanted).sum() / noise) > 45


# -- a score to keep ---------------------------------------------------------------------------------------------------

# How far the outputs are from those in floating point, in per cent of the largest; each call is counted in a file.
SCORE = """

def evaluate(run):
    with open(__file__ + ".calls", "a") as file:
        file.write("x")
    torch.manual_seed(3)
    x, net = torch.randn(16, 3, 24, 24), model().eval()
    with torch.no_grad():
        wanted = net(x)
        return 100 - 100 * (run(x) - wanted).abs().max() / wanted.abs().max()
"""


def calls(path: Path) -> int:
    counter = Path(f"{path}.calls")
    found = len(counter.read_text()) if counter.exists() else 0
    counter.unlink(missing_ok=True)
    return found


def table(path: Path) -> dict:
    return json.loads((path / "report.json").read_text())["sensitivity"]


@pytest.mark.slow
def test_a_score_is_kept_and_found_out_once(folder):
    path = folder / "scored.py"
    path.write_text(NET + DATA + SCORE)
    source = frontend.load(str(path), folder=folder / "scratch")

    def build(max_drop: str | None) -> dict:
        drop = None if max_drop is None else Drop(max_drop)
        options = driver.Options(precision="int8", bench=False, max_drop=drop)
        driver.build(source, folder / "out", options)
        return table(folder / "out")

    free = build(None)
    assert free["score"] is None and not calls(path), "without a budget nobody is asked"
    assert not any(row["reverted"] for row in free["layers"])
    loose = build("50%")
    assert loose["base"] == pytest.approx(100, abs=1e-3) and loose["holds"] and loose["finished"]
    assert not any(row["reverted"] for row in loose["layers"]) and all(row["score"] for row in loose["layers"])
    assert calls(path) == 2 + len(loose["layers"])  # in floating point, with all layers, and without each
    missed = (100 - loose["score"]) / 2
    tight = build(f"{missed}")
    assert tight["score"] >= tight["base"] - missed and tight["layers"][0]["reverted"]
    assert any(not row["reverted"] for row in tight["layers"]) and 0 < calls(path) < 4  # what is new, and the first
    assert build(f"{missed}") == tight and calls(path) == 1, "one call shows that evaluate is what it was"
    path.write_text(path.read_text().replace("100 - 100", "200 - 100"))
    assert build("50%")["base"] == pytest.approx(200, abs=1e-3) and calls(path) > 2, "another file, another score"


@pytest.mark.slow
def test_an_error_in_the_score_stops_the_build(folder):
    path = folder / "scored.py"
    path.write_text(NET + DATA + "\n\ndef evaluate(run):\n    return run(torch.zeros(1, 3, 5, 5)).max()\n")
    source = frontend.load(str(path), folder=folder / "scratch")
    options = driver.Options(precision="int8", bench=False, max_drop=Drop("1%"))
    with pytest.raises(InputError, match=r"scored\.py:22"):
        driver.build(source, folder / "out", options)
    assert not (folder / "out").exists()
    path.write_text(NET + DATA + "\n\ndef evaluate(run):\n    return float('nan')\n")
    with pytest.raises(InputError, match="nan"):
        driver.build(source, folder / "out", options)


@pytest.mark.parametrize("name", ["plain.py", "shvit_s1", "plain.py:model"])
def test_a_score_needs_evaluate_and_that_is_said_before_anything_is_done(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="needs a score") as caught:
        driver.check(name, folder / "out", driver.Options(precision="int8", max_drop=Drop("0.5%")))
    assert "def evaluate(run)" in caught.value.fix
    driver.check(name, folder / "out", driver.Options(precision="int8"))
    driver.check(name, folder / "out", driver.Options(max_drop=Drop("0.5%")))  # in fp32 there is nothing to lose
    (folder / "scored.py").write_text(NET + SCORE)
    driver.check("scored.py:model", folder / "out", driver.Options(precision="int8", max_drop=Drop("0.5%")))
    assert not (folder / "out").exists()


def test_time_saved_is_that_of_the_kernels_that_hold_a_layer():
    class Opened:
        layers = staticmethod(lambda feeds: [
            LayerTime("k0", "Conv", 50.0, ("a", "relu")), LayerTime("k1", "Conv", 30.0, ("b",)),
            LayerTime("k2", "Gemm", 9.0, ("c", "d")), LayerTime("k3", "Conv", 7.0, ("e",)),
        ])  # fmt: skip
        close = staticmethod(lambda: None)

    class Opener:
        load = staticmethod(lambda place, manifest, graph: Opened)

    rows = [LayerScore(i, name, name, 8, reverted=name == "e") for i, name in enumerate("abcde")]
    trace = Trace((), Search({}, tuple(rows), 1.0, 1.0, None, None, True, True))
    now = [LayerTime("q", "QLinearConv", 20.0, ("a",)), LayerTime("r", "QLinearConv", 31.0, ("b", "relu")),
           LayerTime("s", "QGemm", 1.0, ("c",)), LayerTime("t", "Conv", 7.0, ("e",))]  # fmt: skip
    arms = {"plain export": (None, None, None), "engine": (None, None, None)}
    stages = [(Step("quantize", False, (), (), None, None, None, 0.0), None)]  # type: ignore[arg-type]
    found = driver._saved(Opener, arms, stages, trace, now, {})  # type: ignore[arg-type]
    assert found == {0: 30.0, 1: -1.0}  # c shares a kernel with d, e was reverted
    assert not driver._saved(Opener, arms, [], trace, now, {})  # type: ignore[arg-type]


def test_a_precision_that_a_target_lacks(folder, source):
    with pytest.raises(InputError, match="cannot build bf16"):
        driver.build(source, folder / "out", driver.Options(precision="bf16"))


# -- prepared for another machine --------------------------------------------------------------------------------------


def test_trt_is_prepared_where_it_cannot_be_built(folder):
    pytest.importorskip("edgecompile.targets.trt")
    line = ("build", "net.onnx", "--target", "trt", "-o", "out")
    done = run(*line, cwd=folder)
    if done.returncode == 0:
        pytest.skip("TensorRT is here")
    assert done.returncode == 4 and "edgecompile build out" in done.stderr, done.stderr
    made = bundle.Bundle.open(folder / "out")
    assert made.prepared and made.manifest["state"] == "prepared" and not any(made.manifest["problems"].values())
    done = run(*line, "--prepare", "--precision", "fp16", cwd=folder)
    assert done.returncode == 0 and "prepared for TensorRT" in done.stdout
    done = run("build", "out", "--prepare", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert bundle.Bundle.open(folder / "out").manifest["precision"] == "fp16", "a bundle remembers what it is"
    done = run("bench", "out", cwd=folder)
    assert done.returncode == 4 and "edgecompile build out" in done.stderr
    done = run("build", "net.onnx", "--target", "ort", "--prepare", "-o", "other", cwd=folder)
    assert done.returncode == 2 and not (folder / "other").exists()
