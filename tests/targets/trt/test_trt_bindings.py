"""The real bindings of three versions, over stub libraries: they have what the signatures say and the target uses.

The bindings are small packages without TensorRT itself; they are fetched once, into pytest's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import signatures

PACKAGES = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion"),
)
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
LOOK = """
import json, sys, threading
import tensorrt_bindings as trt
from edgecompile.targets.trt import build, probe, session

wanted = json.load(open(sys.argv[1]))
found = {}
for name, spec in wanted.items():
    kind = trt.ILogger.Severity if name == "Severity" else getattr(trt, name)
    names = [*spec.get("methods", {}), *spec.get("attributes", {}), *spec.get("members", [])]
    found[name] = {n: str(getattr(kind, n).__doc__ or "") for n in names if hasattr(kind, n)}
    found[name]["__init__"] = str(kind.__init__.__doc__)
log = session.logger(trt)
log.log(trt.ILogger.Severity.ERROR, "two\\n lines")
log.log(trt.ILogger.Severity.INFO, "not kept")
plugins = trt.init_libnvinfer_plugins(log, "")
told = []
monitor = build._monitor(trt, told.append, threading.Event())
monitor.phase_start("p", "", 3)
goes_on = monitor.step_complete("p", 1)
monitor.phase_finish("p")
facts = probe.facts(trt)
strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
print(json.dumps([found, log.messages, told, goes_on, facts.__dict__, strong, plugins]))
"""


def unpacked(version: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bindings of a version and stub libraries, to be on the paths of Python and of the linker."""
    cache = getattr(request.config, "cache", None)  # a run without pytest's cache fetches them again
    folder = (cache.mkdir("tensorrt-bindings") if cache else tmp_path_factory.mktemp("wheels")) / version
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        command += [f"{PACKAGES[version]}=={version}", "-d", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("the package registry does not answer")
        if done.returncode:
            pytest.skip(f"{PACKAGES[version]} {version} cannot be fetched: {done.stderr.strip()[-200:]}")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    place = tmp_path_factory.mktemp("bindings")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    (place / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in LIBRARIES:
        target = place / f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(place / "stub.c")], check=True)
    return place


@pytest.fixture(scope="module", params=PACKAGES)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """A version, and what a process that imports its bindings sees."""
    version = request.param
    place = unpacked(version, request, tmp_path_factory)
    environment = os.environ | {"LD_LIBRARY_PATH": str(place), "PYTHONPATH": str(place)}
    command = [sys.executable, "-c", LOOK, str(signatures.FOLDER / f"{version}.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "ImportError" in done.stderr and "tensorrt" in done.stderr.splitlines()[-1]:
        pytest.skip(f"the bindings do not load here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return version, json.loads(done.stdout)


def test_every_name_is_there(bindings: tuple[str, list[Any]]):
    version, (found, *_) = bindings
    wanted = signatures.load(version)
    assert wanted.keys() == found.keys() and len(wanted) >= 28
    for name, spec in wanted.items():
        names = {*spec.get("methods", {}), *spec.get("attributes", {}), *spec.get("members", [])}
        assert names <= found[name].keys(), f"{name} lacks {names - found[name].keys()}"


def test_every_keyword_is_there(bindings: tuple[str, list[Any]]):
    """pybind11 writes the parameters into the documentation of a method."""
    version, (found, *_) = bindings
    checked = 0
    for name, spec in signatures.load(version).items():
        for method, overloads in (spec.get("methods", {}) | {"__init__": spec.get("init", [])}).items():
            text = found[name][method]
            if f"{method}(" not in text:
                continue
            for parameter, _, _ in (p for overload in overloads for p in overload):
                assert f"{parameter}:" in text, f"{name}.{method} has no {parameter}: {text}"
                checked += 1
    assert checked > 60


def test_what_derives_from_the_bindings_works(bindings: tuple[str, list[Any]]):
    version, (_, messages, told, goes_on, facts, strong, plugins) = bindings
    assert messages == ["two lines"]
    assert told == ["p: 1/3"] and goes_on is True
    assert plugins is False  # the stub answers so
    assert facts["version"] == version and facts["unused_flags"] == []
    assert facts["typed_by_default"] == version.startswith("11") == (not facts["precision_flags"])
    assert strong == (2 if version.startswith("10") else 1)  # the flag has moved
