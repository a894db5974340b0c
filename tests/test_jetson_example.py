"""``examples/jetson``: every command of its README, against a board with the double of TensorRT behind a real sshd."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import loopback
import pytest
import typing_extensions
import yaml
from loopback import NUMPY, RUNTIME, Server, board_python

from edgecompile import bench, verdict
from edgecompile.bundle import Bundle

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parent.parent / "examples" / "jetson"
DOUBLE = Path(__file__).parent / "targets" / "trt"
OWN = ("tensorrt_double", "tensorrt_plugin", "signatures")  # modules of the double
COMMANDS = re.findall(r"^    (\S.*)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Iterator[Server]:
    """A board: TensorRT and CUDA are doubles, python3 has no edgecompile, and a login finds the command edgecompile."""
    folder = tmp_path_factory.mktemp("board")
    with loopback.serve(folder) as server:
        packages = folder / "double"
        shutil.copytree(DOUBLE / "board", packages)
        shutil.copytree(DOUBLE / "signatures", packages / "signatures")
        for file in (*(DOUBLE / f"{n}.py" for n in OWN), typing_extensions.__file__):
            shutil.copy(file, packages)
        # The double itself needs onnx and ONNX Runtime; nothing else of the environment is there.
        double = ("onnx", "ml_dtypes", *NUMPY, *RUNTIME)
        board_python(folder / "bin" / "python3", double, more=[packages])
        for name, line in (
            ("edgecompile", f'PYTHONPATH={packages} exec {sys.executable} -m edgecompile "$@"'),
            ("sudo", 'exec "$@"'),
            ("nvpmodel", f'echo nvpmodel "$@" >> {folder}/set'),
            ("jetson_clocks", f"echo jetson_clocks >> {folder}/set"),
        ):
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / "bin" / name).chmod(0o755)
        yield server


@pytest.fixture(scope="module")
def work(board: Server, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with the files of the example, and an environment in which ssh reaches the board."""
    folder = tmp_path_factory.mktemp("work")
    programs = tmp_path_factory.mktemp("programs")
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {board.folder}/config "$@"\n')
    (programs / "edgecompile").write_text(f'#!/bin/sh\nexec {sys.executable} -m edgecompile "$@"\n')
    for file in programs.iterdir():
        file.chmod(0o755)
    for file in EXAMPLE.iterdir():
        shutil.copy(file, folder)
    for name in ("edgecompile.toml", "dla.toml"):  # the loopback board is no Jetson, and is busy with other tests
        text = (folder / name).read_text()
        assert text.count('match = "jetson-*orin*"') == 1
        text = text.replace('match = "jetson-*orin*"', 'match = "*"').replace('"5%"', '"99%"')
        (folder / name).write_text(text)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return folder, environment


def run(command: str, work: tuple[Path, dict[str, str]]) -> subprocess.CompletedProcess[str]:
    folder, environment = work
    return subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.fixture(scope="module")
def done(work) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every command of the README, in order; each works."""
    found = {}
    for command in COMMANDS:
        if "finish.sh orin build/model" in command:
            shutil.copytree(work[0] / "build" / "model", work[0] / "build" / "prepared")
        found[command] = run(command, work)
        assert found[command].returncode == 0, f"{command}\n{found[command].stdout}\n{found[command].stderr}"
    return found


def test_the_readme_has_commands_for_each_step():
    assert len(COMMANDS) >= 9
    for word in ("--prepare", "./finish.sh", "bench", "gate", "baseline save", "nvpmodel"):
        assert any(word in command for command in COMMANDS), word


def test_every_command_of_the_readme_works(done, work, board):
    folder, _ = work
    finished = Bundle.open(folder / "build" / "model")
    assert not finished.prepared and finished.manifest["engine"]["files"][0] == "engine.plan"
    assert finished.manifest["versions"]["tensorrt"] == "10.3.0"
    assert finished.manifest["passes"].startswith("clean,fold_norm,reparam,cast"), "those of the prepared one"
    assert (board.folder / "set").read_text() == "nvpmodel -m 0\njetson_clocks\n"
    assert not list(board.home.iterdir()), "nothing is left on the board"


def test_what_was_measured(done, work):
    document = json.loads((work[0] / "build" / "bench" / "bench.json").read_text())
    jsonschema.validate(document, bench.schema())
    assert [t["clock"] for t in document["timings"]] == ["cuda_event", "wall"]
    phases = document["phases"]
    assert phases["compute"] > 0 and phases["enqueue"] > 0 and phases["end_to_end"] > 0
    pinned = {"cuda_graph": True, "transfers": False, "in_flight": 1, "wait": "stream synchronize"}
    assert phases["pinned"] == pinned
    modules = {m["path"].partition(".")[0] for m in document["layers"]["modules"]}
    assert {"stem", "body", "head"} <= modules, modules
    assert document["layers"]["roofline"] is None
    gate = json.loads((work[0] / "build" / "gate" / "result.json").read_text())
    jsonschema.validate(gate, verdict.schema())
    assert {c["metric"]: c["clock"] for c in gate["checks"]}["latency"] == "cuda_event"


def test_the_dla(done, work):
    dla = Bundle.open(work[0] / "build" / "dla").manifest["engine"]["options"]["_dla"]
    assert (
        f"DLA: {dla['taken']} of {dla['layers']} layers, {dla['islands']} islands"
        in done["./finish.sh orin build/dla --option dla=0"].stderr
    )
    gate = json.loads((work[0] / "build" / "dla-gate" / "result.json").read_text())
    (check,) = (c for c in gate["checks"] if c["metric"] == "dla_fallback")
    assert (check["verdict"], check["candidate"]) == ("PASS", dla["layers"] - dla["taken"])


def test_too_many_layers_left_to_the_gpu_fail(done, work):
    folder, _ = work
    text = (folder / "dla.toml").read_text()
    (folder / "strict.toml").write_text(re.sub(r"dla_fallback_max = \d+", "dla_fallback_max = 0", text))
    failed = run("edgecompile gate build/dla --config strict.toml --device orin", work)
    assert failed.returncode == 1 and re.search(r"GPU \d+, 0 is allowed", failed.stdout)
    unknown = run("edgecompile gate build/model --config strict.toml --device orin", work)
    assert unknown.returncode == 2 and "dla_fallback cannot be checked" in unknown.stderr
    assert "--option dla=0" in unknown.stderr


def test_a_prepared_bundle_is_not_measured(done, work):
    early = run("edgecompile bench build/prepared --device ssh://orin", work)
    assert early.returncode == 4 and "holds no engine yet" in early.stderr
    before, finished = (Bundle.open(work[0] / "build" / name) for name in ("prepared", "model"))
    assert before.prepared and before.manifest["passes"] == finished.manifest["passes"]


def test_a_build_that_fails_on_the_board_leaves_the_bundle_as_it_was(done, work):
    before = Bundle.open(work[0] / "build" / "prepared").manifest
    failed = run("./finish.sh orin build/prepared --option levle=3", work)
    assert failed.returncode == 2 and "did you mean 'level'?" in failed.stderr
    assert Bundle.open(work[0] / "build" / "prepared").manifest == before
    assert run("./finish.sh orin build/nothing", work).returncode != 0


def test_an_engine_of_another_tensorrt_is_refused_on_the_board(done, work, board):
    wrapper = board.folder / "bin" / "python3"
    before = wrapper.read_text()
    wrapper.write_text(before.replace("export PYTHONPATH", "export TENSORRT=10.16.1.11\nexport PYTHONPATH"))
    try:
        refused = run("edgecompile bench build/model --device ssh://orin --seconds 1", work)
    finally:
        wrapper.write_text(before)
    assert refused.returncode == 4
    assert "built for sm_87 / TensorRT 10.3.0, here sm_87 / 10.16.1.11: run edgecompile build build/model" in (
        " ".join(refused.stderr.split())
    )


def test_the_workflow_runs_what_the_readme_says():
    steps = yaml.safe_load((EXAMPLE / "github.yml").read_text())["jobs"]["gate"]["steps"]
    lines = [step["run"].strip() for step in steps if "run" in step and step["name"] != "Install"]
    assert len(lines) == 4 and set(lines) <= set(COMMANDS)
