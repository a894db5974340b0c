"""The C++ program of examples/tvm_cpp runs the library of a bundle as the Python engine does."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import driver, frontend
from edgecompile.bundle import Bundle

pytest.importorskip("tvm")
EXAMPLE = Path(__file__).parents[2] / "examples" / "tvm_cpp"
FFI = importlib.util.find_spec("tvm_ffi")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The program, built as its README says."""
    if missing := [tool for tool in ("g++", "make") if shutil.which(tool) is None]:
        pytest.skip(f"no {' and '.join(missing)}")
    folder = Path(next(iter((FFI and FFI.submodule_search_locations) or ["none"])))
    if not (folder / "include/tvm/ffi/extra/module.h").exists():
        pytest.skip("apache-tvm-ffi has no headers here")
    place = tmp_path_factory.mktemp("cpp")
    for name in ("run.cpp", "Makefile"):
        shutil.copy(EXAMPLE / name, place)
    flags = [f"PYTHON={sys.executable}", "CXXFLAGS=-O0 -Wall -Wextra"]
    done = subprocess.run(["make", "-C", str(place), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return place / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Bundle:
    """A bundle with two inputs and two outputs."""
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["y", "s"], ["z"], name="/scale"),
    ]
    value = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"x": [1, 3, 16, 16], "s": [1], "y": [1, 8, 16, 16], "z": [1, 8, 16, 16]}.items()
    }
    graph = helper.make_graph(
        nodes, "g", [value["x"], value["s"]], [value["z"], value["y"]], [onnx.numpy_helper.from_array(weight, "w")]
    )
    place = tmp_path_factory.mktemp("bundle")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), place / "net.onnx")
    source = frontend.load(str(place / "net.onnx"), folder=place / "scratch")
    options = driver.Options("tvm", bench=False, target_options={"threads": 1})
    return driver.build(source, place / "made", options)


def run(program: Path, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd)


def test_the_program_computes_what_the_engine_does(program, made, tmp_path):
    feeds, _ = made.probe()
    engine = made.engine()
    expected = engine.run(feeds)
    engine.close()
    for name, value in feeds.items():
        np.save(tmp_path / f"{name}.npy", value)
    feeds["x"].tofile(tmp_path / "x.bin")
    library = made.path / "model.so"
    for x in (tmp_path / "x.npy", f"{tmp_path / 'x.bin'}:float32:1x3x16x16"):
        done = run(program, library, tmp_path / "out", x, tmp_path / "s.npy")
        assert done.returncode == 0, done.stderr
        assert re.match(r"2 outputs, [0-9.e-]+ ms a call", done.stdout)
        for number, value in enumerate(expected.values()):
            found = np.load(tmp_path / f"out{number}.npy")
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)
    beside = run(program, "model.so", tmp_path / "out", tmp_path / "x.npy", tmp_path / "s.npy", cwd=made.path)
    assert beside.returncode == 0, beside.stderr
    for calls, said in (("3", r"2 outputs, .* mean of 3\)\n"), ("0", r"2 outputs\n")):
        done = run(program, "-n", calls, library, tmp_path / "out", tmp_path / "x.npy", tmp_path / "s.npy")
        assert re.fullmatch(said, done.stdout)
    np.save(tmp_path / "s.npy", feeds["s"] + 1)
    run(program, library, tmp_path / "out", tmp_path / "x.npy", tmp_path / "s.npy")
    assert not np.array_equal(np.load(tmp_path / "out0.npy"), expected["z"])


def test_what_cannot_be_run_is_one_message(program, made, tmp_path):
    feeds, _ = made.probe()
    library = made.path / "model.so"
    np.save(tmp_path / "s.npy", feeds["s"])
    np.save(tmp_path / "x.npy", feeds["x"])
    np.save(tmp_path / "small.npy", feeds["x"][:, :2])
    np.save(tmp_path / "turned.npy", np.asfortranarray(feeds["x"]))
    (tmp_path / "x.bin").write_bytes(b"1234")
    (tmp_path / "text.npy").write_text("hello")
    for x, said in {
        "missing.npy": "cannot be read",
        "text.npy": "not an .npy file",
        "turned.npy": "not in C order",
        "x.bin:float32:1x3x16x16": "size of its shape",
        "small.npy": "hape",
    }.items():
        done = run(program, library, tmp_path / "out", f"{tmp_path}/{x}", tmp_path / "s.npy")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr, (x, done.stderr)
    assert run(program, tmp_path / "none.so", tmp_path / "out", tmp_path / "x.npy").returncode == 1
    assert run(program, library).returncode == 2
    assert run(program, "-n", "-1", library, tmp_path / "out", tmp_path / "x.npy").returncode == 2


def test_the_readme_names_what_the_manifest_holds(made):
    text = (EXAMPLE / "README.md").read_text()
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["engine"]["device"] and "`engine.device`" in text
    assert "make" in text and "./run" in text
