"""The gate from the command line, on real engines: verdicts, recordings, files for CI on every way out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from edgecompile import bundle, cli, compare, driver, frontend, gate, judge, measure, remote, verdict
from edgecompile.config import GateConfig, Parity
from edgecompile.errors import InputError

CHANNELS = 16


def network(path: Path, blocks: int, seed: int = 0) -> None:
    """Some convolutions; those after the second change nothing: they feed an output of their own."""
    rng = np.random.default_rng(seed)
    weights, nodes = [], []

    def conv(source: str, to: str, inputs: int) -> None:
        weights.append(
            numpy_helper.from_array((rng.standard_normal((CHANNELS, inputs, 3, 3)) / 9).astype("f4"), f"w{to}")
        )
        nodes.append(helper.make_node("Conv", [source, f"w{to}"], [to], pads=[1, 1, 1, 1]))

    conv("x", "c0", 3)
    for block in range(1, blocks):
        conv(f"c{block - 1}", f"c{block}", CHANNELS)
    outputs = {"y": "c1"} | ({"z": f"c{blocks - 1}"} if blocks > 2 else {})
    nodes += [helper.make_node("GlobalAveragePool", [source], [name]) for name, source in outputs.items()]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 24, 24])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, CHANNELS, 1, 1]) for n in outputs], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    """``base``; ``slow``, the same function and twice the work; ``other``, another function."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, blocks, seed in (("base", 2, 0), ("slow", 5, 0), ("other", 2, 1)):
        network(folder / "net.onnx", blocks, seed)
        source = frontend.load(str(folder / "net.onnx"), folder=folder)
        driver.build(source, folder / name, driver.Options(bench=False, target_options={"threads": 1}))
    (folder / "net.onnx").unlink()
    return folder


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


@pytest.fixture
def brief(monkeypatch) -> None:
    """Pairs of sessions as short as they can be, for what does not depend on how precise they are; in this process."""
    for module in (judge, compare):
        monkeypatch.setattr(module, "PAIR_SECONDS", 0.03)


def result(folder: Path) -> dict:
    """The result in a folder, after the files beside it were checked."""
    document = json.loads((folder / "result.json").read_text())
    jsonschema.validate(document, verdict.schema())
    suites = ET.parse(folder / "junit.xml").getroot()
    assert suites.tag == "testsuites" and len(suites.findall(".//testcase")) == max(len(document["checks"]), 1)
    assert (folder / "summary.md").read_text().strip()
    return document


def check(document: dict, metric: str) -> dict:
    return next(c for c in document["checks"] if c["metric"] == metric)


def test_twice_the_work_fails_and_its_replay_is_the_same_bit_for_bit(bundles, tmp_path):
    """The baselines are given by name, one for the model and one for all."""
    assert run("baseline", "save", "main-net.onnx", bundles / "base", cwd=tmp_path).returncode == 0
    listed = json.loads(run("baseline", "list", "--json", cwd=tmp_path).stdout)
    assert [b["name"] for b in listed["baselines"]] == ["main-net.onnx"]
    fetched = Path(run("baseline", "fetch", "main-net.onnx", cwd=tmp_path).stdout.strip())
    assert bundle.is_bundle(tmp_path / fetched)

    line = ("gate", bundles / "slow", "--baseline", "main-{name}", "--anchor", "main-net.onnx")
    done = run(*line, "-o", "out", "--annotations", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0].startswith("::error") and "FAIL" in done.stdout
    found = result(tmp_path / "out")
    assert {c["metric"]: c["verdict"] for c in found["checks"]} == {
        "parity": "PASS", "latency": "FAIL", "latency_anchor": "FAIL",
    }  # fmt: skip
    latency = check(found, "latency")
    assert (found["verdict"], latency["reason_code"], latency["pairs"]) == ("FAIL", "regression", 10)
    assert latency["clock"] == "thread_cpu" and latency["low"] > 1.05
    again = run("gate", "--replay", "out", "--json", cwd=tmp_path)
    assert again.returncode == 1
    assert json.loads(again.stdout) == found
    run("gate", "--replay", "out/samples.npz", "-o", "again", cwd=tmp_path)
    for name in ("result.json", "junit.xml", "summary.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_same_engine_passes_and_is_remembered(bundles, tmp_path, brief, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = str(bundles / "base")
    line = ["--baseline", base, "--max-regression", "100%", "--history", "history.jsonl"]
    done = CliRunner().invoke(cli.main, ["gate", base, *line, "--junit", "j.xml", "--summary", "s.md"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("PASS") and ET.parse(tmp_path / "j.xml") and "PASS" in (tmp_path / "s.md").read_text()
    shown = run("history", "history.jsonl", "--json", "--html", "h.html", cwd=tmp_path)
    assert shown.returncode == 0 and "latency" in shown.stdout and (tmp_path / "h.html").stat().st_size > 1000


def test_another_function_fails_without_being_timed(bundles, tmp_path):
    done = run("gate", bundles / "other", "--baseline", bundles / "base", "-o", "out", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = result(tmp_path / "out")
    assert [c["reason_code"] for c in found["checks"]] == ["other_function"]
    assert measure.load(tmp_path / "out" / "samples.npz")[0] == {}


def test_weights_that_changed_on_purpose(bundles, tmp_path):
    settings = '[gate]\ntime_limit = "0.1s"\non_inconclusive = "warn"\n[gate.parity]\nagainst = "source"\n'
    (tmp_path / "edgecompile.toml").write_text(settings)
    line = ("--baseline", bundles / "base", "--config", "edgecompile.toml", "-o", "out")
    done = run("gate", bundles / "other", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "out")
    parity = check(found, "parity")
    assert parity["verdict"] == "PASS" and "its own source" in parity["reason"]
    assert check(found, "latency")["reason_code"] == "time_limit", "and so it is timed"


def test_time_that_is_too_short_is_inconclusive(bundles, tmp_path):
    line = ("gate", bundles / "base", "--baseline", bundles / "base", "--time-limit", "0.1s")
    assert run(*line, "-o", "out", cwd=tmp_path).returncode == 3
    found = result(tmp_path / "out")
    assert (found["verdict"], check(found, "latency")["reason_code"]) == ("INCONCLUSIVE", "time_limit")
    skipped = ET.parse(tmp_path / "out" / "junit.xml").getroot().findall(".//skipped")
    assert len(skipped) == 1 and skipped[0].get("message")
    assert run(*line, "-o", "warned", "--on-inconclusive", "warn", cwd=tmp_path).returncode == 0
    assert result(tmp_path / "warned")["verdict"] == "INCONCLUSIVE"
    again = run("gate", "--replay", "warned", "--json", cwd=tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout) == result(tmp_path / "warned")


def test_a_retry_measures_again_at_a_stricter_level(bundles, brief):
    contest = gate.Contest("net", *(bundle.Bundle.open(bundles / n) for n in ("base", "base")))
    limits = GateConfig(time_limit=0.1, on_inconclusive="retry", retries=2)
    said: list[str] = []
    kept: list[gate.Recording] = []
    with remote.open_board(None) as board:
        found = gate.run([contest], limits, board, progress=said.append, keep=kept.append)
    assert found.exit_code == 3
    assert sum(line.endswith("0 pairs, 0 s") for line in said) == 3
    assert kept[0].settings.plan.alpha == pytest.approx(0.01 / 3)


BUDGETS = """
[gate.budgets]
latency_p50 = "1us"
latency_p99 = "1s"
engine_size = "1kB"
peak_memory = "4GB"
build_time = "1h"
parity = 1e-4
"""


def test_budgets_need_no_baseline(bundles, tmp_path):
    path = tmp_path / "edgecompile.toml"
    path.write_text(BUDGETS)
    done = run("gate", bundles / "base", "--config", path, "-o", "out", "--annotations", cwd=tmp_path)
    assert done.returncode == 1, done.stderr + done.stdout
    assert {c["metric"]: c["verdict"] for c in result(tmp_path / "out")["checks"]} == {
        "parity": "PASS", "parity_budget": "PASS", "latency_p50": "FAIL", "latency_p99": "PASS", "engine_size": "FAIL",
        "peak_memory": "PASS", "build_time": "PASS",
    }  # fmt: skip
    assert re.search(r"::error file=[^,]*edgecompile.toml,line=3,", done.stdout)
    path.write_text('[gate.budgets]\nengine_size = "10MB"\nparity = 1e-4\n')
    done = run("gate", bundles / "base", "--config", path, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    found = result(tmp_path / "out")
    assert found["verdict"] == "PASS" and {c["metric"] for c in found["checks"]} == {
        "parity", "parity_budget", "engine_size",
    }  # fmt: skip


def test_accuracy_is_what_the_report_of_the_candidate_says(bundles, tmp_path):
    base = bundle.Bundle.open(bundles / "base")
    assert gate._measured(base).keys() == {"engine_size", "build_time", "parity"}
    document = json.loads((base.path / "report.json").read_text())
    document["accuracy"] = {"engine": 0.71, "reference": 0.72, "note": ""}
    document["provenance"]["seconds"] = {"passes": 1.0, "build": 2.0, "measure": 40.0, "evaluate": 80.0}
    (tmp_path / "report.json").write_text(json.dumps(document))
    measured = gate._measured(bundle.Bundle(tmp_path, base.manifest))
    assert (measured["accuracy"], measured["build_time"]) == (0.71, 3.0)


def test_a_budget_for_accuracy_needs_evaluate(bundles, tmp_path):
    (tmp_path / "edgecompile.toml").write_text("[gate.budgets]\naccuracy = 0.5\n")
    done = run("gate", bundles / "base", "--config", "edgecompile.toml", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "define evaluate(run) in model.py" in done.stderr


def test_stored_numbers_count_only_where_they_were_made(bundles, tmp_path):
    (tmp_path / "edgecompile.toml").write_text(
        '[gate.device.orin]\nmatch = "nvidia-jetson-*"\nbudgets.latency_p50 = "1ms"\n'
    )
    done = run("gate", bundles / "base", "--config", "edgecompile.toml", "-o", "out", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "orin" in done.stderr and result(tmp_path / "out")["exit_code"] == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("nothing", "--baseline", "main"), 2),
        (("BASE", "--baseline", "main"), 4),
        ((), 2),
        (("BASE", "--baseline", "BASE", "--max-regression", "five"), 2),
        (("BASE", "--config", "missing.toml"), 2),
        (("--replay", "nowhere"), 2),
        (("BASE", "BASE", "--baseline", "BASE"), 2),
        (("BASE", "--device", "ssh://-oProxyCommand=x"), 2),
    ],
)
def test_every_wrong_use_is_one_message_and_leaves_valid_files(bundles, tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    given = [str(bundles / "base") if a == "BASE" else a for a in arguments]
    done = CliRunner().invoke(cli.main, ["gate", *given, "-o", "out"])
    assert done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    found = result(tmp_path / "out")
    assert (found["verdict"], found["exit_code"]) == ("ERROR", code)
    assert found["error"]["what"] in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_leave_valid_files_and_what_was_measured(bundles, tmp_path, sent):
    line = ["gate", bundles / "base", "--baseline", bundles / "base", "--max-regression", "0.01%", "-o", "out"]
    command = [sys.executable, "-m", "edgecompile", *map(str, line)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for text in process.stderr:
        if "0 pairs" in text:
            break
    time.sleep(2)
    process.send_signal(sent)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 130, rest
    found = result(tmp_path / "out")
    assert (found["verdict"], found["exit_code"], found["error"]["what"]) == ("ERROR", 130, "interrupted")
    samples, _ = measure.load(tmp_path / "out" / "samples.npz")
    assert len(samples["0/pairs/candidate"].seconds) > 10
    assert {a["role"] for a in found["artefacts"]} == {"candidate", "baseline"}


def test_a_recording_of_something_else_is_refused(tmp_path):
    measure.save(tmp_path / "samples.npz", {}, other=1)
    with pytest.raises(InputError, match="no recording of a gate"):
        gate.replay(tmp_path)


def test_precisions_have_their_own_tolerance(bundles):
    contest = gate.Contest("net", bundle.Bundle.open(bundles / "base"))
    with remote.open_board(None) as board:
        strict = gate.run([contest], GateConfig(parity=Parity(tolerance=0.0)), board)
        usual = gate.run([contest], GateConfig(), board)
    assert usual.verdict == "PASS" and usual.checks[0].budget == driver.TOLERANCE["fp32"]
    assert strict.checks[0].budget == 0.0


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_shows_both_clocks(bundles, tmp_path):
    line = ("compare", bundles / "base", bundles / "slow", "--precision", "20%", "--json")
    found = json.loads(run(*line, cwd=tmp_path).stdout)
    assert [c["clock"] for c in found["changes"]] == ["thread_cpu", "wall"]
    assert all(c["low"] > 1.2 for c in found["changes"]) and found["pairs"] == 8


def test_compare_builds_what_is_not_built(bundles, tmp_path, brief, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "net.onnx", 2)
    line = ["compare", "net.onnx", str(bundles / "base"), "--option", "threads=1", "--precision", "50%"]
    done = CliRunner().invoke(cli.main, line)
    assert done.exit_code == 0 and "B / A" in done.stdout, done.stderr
    interval = re.search(r"([0-9.]+) to ([0-9.]+)", done.stdout)
    assert interval is not None and float(interval[1]) < 1.2 and float(interval[2]) > 0.8
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx"}
    assert CliRunner().invoke(cli.main, ["compare", "net.onnx", "nothing.onnx"]).exit_code == 2
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx"}
