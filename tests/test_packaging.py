"""What is installed: the wheel in a clean environment, and the commands that work there without torch or a runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parent.parent


def _modules(folder: str, package: str) -> set[str]:
    """Module files of a source folder, as paths in the wheel."""
    base = ROOT / folder
    return {f"{package}/{p.relative_to(base).as_posix()}" for p in base.rglob("*.py") if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools would mix in what earlier builds left in the checkout
    for part in ("edgecompile", "passes", "targets", "models"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(tmp_path_factory, wheel) -> Path:
    """The bin folder of a virtual environment with the wheel and its base dependencies only."""
    folder = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    done = subprocess.run([folder / "bin" / "pip", "install", "-q", wheel], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the base dependencies here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin"


def run(light: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(light / "edgecompile"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def _net(path: Path) -> None:
    rng = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array(rng.uniform(0.5, 1.5, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 4, 4])],
        initializer=[weight("w", 3, 2, 3, 3), *(weight(n, 3) for n in "gbmv")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = _modules("edgecompile", "edgecompile")
    for part in ("passes", "targets", "models"):
        expected |= _modules(part, f"edgecompile/{part}")
    assert {n for n in names if n.endswith(".py")} == expected
    data = {f"edgecompile/{p.relative_to(ROOT / 'edgecompile').as_posix()}" for kind in ("schemas/*", "templates/*")
            for p in (ROOT / "edgecompile").glob(kind)}  # fmt: skip
    assert data and data <= names and "edgecompile/py.typed" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"edgecompile"}


def test_nothing_generic_is_importable_at_top_level(light, tmp_path):
    code = (
        "import importlib.util as u, json; "
        "print(json.dumps({n: u.find_spec(n) is not None for n in "
        "('passes', 'targets', 'models', 'edgecompile.passes', 'edgecompile.targets', 'edgecompile.models')}))"
    )
    done = subprocess.run([light / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    found = json.loads(done.stdout)
    assert found == {n: n.startswith("edgecompile.") for n in found}


def test_light_install_has_neither_torch_nor_a_runtime_and_its_commands_work(light, tmp_path):
    done = subprocess.run([light / "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {p["name"].lower() for p in json.loads(done.stdout)}
    assert not installed & {"torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "apache-tvm"}
    _net(tmp_path / "net.onnx")
    opt = run(light, "opt", "net.onnx", "-o", "out.onnx", "--json", cwd=tmp_path)
    assert opt.returncode == 0, opt.stderr
    steps = {s["pass"]: s for s in json.loads(opt.stdout)["steps"]}
    assert steps["fold_norm"]["rewrites"] == 1 and steps["fold_norm"]["result"] == "kept"
    assert steps["fold_norm"]["error"] != "not compared", "onnx.reference verifies where no runtime is installed"
    assert {n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node} == {"Conv", "Relu"}
    verify = run(light, "verify", "net.onnx", "out.onnx", cwd=tmp_path)
    assert verify.returncode == 0 and "same function" in verify.stdout, verify.stderr
    inspect = run(light, "inspect", "out.onnx", "--json", cwd=tmp_path)
    assert json.loads(inspect.stdout)["macs"] == 3 * 4 * 4 * 2 * 9
    for command in ("passes", "models", "doctor"):
        done = run(light, command, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, extra", [(("build", "shvit_s1"), "torch"), (("build", "net.onnx"), "cpu")], ids=["torch", "cpu"]
)
def test_a_command_that_lacks_an_extra_names_it(light, tmp_path, arguments, extra):
    _net(tmp_path / "net.onnx")
    done = run(light, *arguments, cwd=tmp_path)
    assert done.returncode == 4
    assert f"edgecompile[{extra}]" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "build").exists()
