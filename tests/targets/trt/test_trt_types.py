"""What the target calls exists in each version of TensorRT's bindings, with these arguments: a type checker says so.

The target takes the module ``tensorrt`` and its objects as ``Any``, since three versions must fit. Here each version's
types take the place of ``Any`` in a copy of the sources.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import signatures
import stubs

import edgecompile.targets.trt as target

SOURCES = ("build.py", "engine.py", "probe.py", "session.py", "shift_add.py")
TYPES = {
    "trt": "Module",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "context": "IExecutionContext",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
}
RETURNS = {"_new_context": "IExecutionContext"}
RULES = ("reportAttributeAccessIssue", "reportCallIssue", "reportArgumentType", "reportIndexIssue")
WRONG = """from __future__ import annotations
from .facts import Builder, IBuilderConfig, Module

def flag(trt: Module, config: IBuilderConfig) -> None:
    config.set_flag(trt.BuilderFlag.FP16)

def calibrator(config: IBuilderConfig) -> None:
    config.int8_calibrator = None

def keyword(builder: Builder) -> None:
    builder.create_network(flag=1)

def method(builder: Builder) -> None:
    builder.build_cuda_engine()

def argument(trt: Module, config: IBuilderConfig) -> None:
    config.set_memory_pool_limit("WORKSPACE", 1)

def right(trt: Module, config: IBuilderConfig) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1)
"""


def typed(source: str) -> tuple[str, int]:
    """A source with the types of :data:`TYPES` for ``Any``, and how often."""
    names = "|".join(TYPES)
    source, count = re.subn(rf"\b({names}): Any\b", lambda m: f"{m[1]}: {TYPES[m[1]]}", source)
    returns = rf"(def ({'|'.join(RETURNS)})\([^)]*\)) -> Any"
    source, more = re.subn(returns, lambda m: f"{m[1]} -> {RETURNS[m[2]]}", source)
    imported = ", ".join(sorted({*TYPES.values(), *RETURNS.values()}))
    head = "from __future__ import annotations\n"
    assert source.count(head) == 1
    return source.replace(head, f"{head}from .facts import {imported}\n"), count + more


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What pyright says: version -> file -> a line of source and a message for each finding."""
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    folder = tmp_path_factory.mktemp("types")
    rules = dict.fromkeys(RULES, "error")
    settings = {"typeCheckingMode": "off", "pythonVersion": "3.10", **rules}
    settings |= dict.fromkeys(("reportMissingImports", "reportMissingModuleSource"), "none")
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    places = {}
    for index, version in enumerate(signatures.VERSIONS):
        place = folder / f"version{index}"
        place.mkdir()
        (place / "__init__.py").touch()
        (place / "facts.pyi").write_text(stubs.render(stubs.load(version)))
        (place / "wrong.py").write_text(WRONG)
        for name in SOURCES:
            (place / name).write_text(typed((Path(target.__file__).parent / name).read_text())[0])
        places[place.name] = version
    done = subprocess.run(
        ["pyright", "--outputjson", "-p", str(folder)], capture_output=True, text=True, timeout=300, cwd=folder
    )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright does not run: {(done.stderr or done.stdout).strip()[-200:]}")
    assert report["summary"]["filesAnalyzed"] >= 3 * (len(SOURCES) + 2)
    said: dict[str, dict[str, list[str]]] = {v: {n: [] for n in (*SOURCES, "wrong.py")} for v in places.values()}
    for one in report["generalDiagnostics"]:
        file, line = Path(one["file"]), one["range"]["start"]["line"]
        if file.name in (*SOURCES, "wrong.py"):
            text = file.read_text().splitlines()[line].strip()
            if file.name != "wrong.py" and text.endswith("= None"):  # an object is let go, which is no call
                continue
            said[places[file.parent.name]][file.name].append(f"{text}: {one['message'].splitlines()[0]}")
        else:
            pytest.fail(f"the stubs themselves are wrong: {one['message']}")
    return said


@pytest.mark.parametrize("version", signatures.VERSIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_call_is_right(name: str, version: str, found: dict[str, dict[str, list[str]]]):
    assert found[version][name] == []


@pytest.mark.parametrize("version", signatures.VERSIONS)
def test_a_wrong_call_is_found(version: str, found: dict[str, dict[str, list[str]]]):
    lines = [said.partition(": ")[0] for said in found[version]["wrong.py"]]
    gone = ["config.set_flag(trt.BuilderFlag.FP16)", "config.int8_calibrator = None"] if version > "11" else []
    always = ["builder.create_network(flag=1)", "builder.build_cuda_engine()"]
    assert [line for line in lines if line not in always[:1]] == [*gone, always[1], lines[-1]]
    assert always[0] in lines and lines[-1].startswith('config.set_memory_pool_limit("WORKSPACE", 1)')


def test_the_types_reach_what_is_called():
    """Else the checker would see ``Any`` and find nothing wrong, whatever is called."""
    counts = {name: typed((Path(target.__file__).parent / name).read_text())[1] for name in SOURCES}
    assert sum(counts.values()) >= 15 and counts["build.py"] >= 8 and counts["session.py"] >= 5, counts


@pytest.mark.parametrize("version", signatures.VERSIONS)
def test_stubs_and_signatures_agree(version: str):
    wanted, made = signatures.load(version), stubs.load(version)["classes"]
    ast.parse(stubs.render(stubs.load(version)))
    assert wanted.keys() - {"Severity"} <= made.keys()
    for name, spec in wanted.items():
        if name != "Severity":
            methods = {k: [[p[0] for p in o] for o in v] for k, v in spec.get("methods", {}).items()}
            stubbed = made[name].get("methods", {})
            assert methods == {k: [[p[0] for p in o[0]] for o in stubbed.get(k, ())] for k in methods}, name
