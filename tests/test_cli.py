"""The command line as a person meets it: subprocesses, exit codes, one message on stderr, no traceback."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from edgecompile import cli, driver
from edgecompile.report import schema

NET = """import torch
from torch import nn


def model():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8, 5))
    with torch.no_grad():
        for t in (net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias):
            t.uniform_(0.5, 1.5)
    return net


def small():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())


def example_inputs():
    return torch.randn(2, 3, 16, 16)
"""


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecompile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def complaint(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one message of a failed command."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    messages = [line for line in done.stderr.splitlines() if not line.startswith("... ")]
    assert messages and messages[0].startswith("error: "), done.stderr
    assert all(re.match(r"  (why|fix): ", line) for line in messages[1:]), done.stderr
    return done.stderr


def onnx_net(path: Path) -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[N,3] x) => (float[N,3] y) { t = Identity(x) y = Exp(t) }'
    onnx.save(parser.parse_model(text), path)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model.py").write_text(NET)
    onnx_net(tmp_path / "net.onnx")
    return tmp_path


def test_every_command_has_help_with_an_example():
    for name, command in cli.main.commands.items():
        assert command.help and command.epilog and "edgecompile " + name in command.epilog, name
    assert cli.main.epilog and "edgecompile build" in cli.main.epilog


def test_help_is_fast(tmp_path):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert run("--help", cwd=tmp_path).returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys, edgecompile.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert not {"torch", "onnx", "onnxruntime", "numpy", "rich", "onnx_graphsurgeon"} & set(done.stdout.split())


def test_build_writes_a_complete_bundle(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(driver, "Options", functools.partial(driver.Options, seconds=0.5))
    done = CliRunner().invoke(cli.main, ["build", "model.py", "--target", "ort", "--option", "threads=1"])
    assert done.exit_code == 0, done.stderr
    files = set(os.listdir(folder / "build" / "model"))
    assert {"manifest.json", "model.onnx", "report.json", "report.md", "report.html", "probe.npz"} <= files
    assert os.listdir(folder / "build") == ["model"], "nothing temporary is left"
    report = json.loads((folder / "build" / "model" / "report.json").read_text())
    jsonschema.validate(report, schema())
    assert all(e["max_rel"] <= 1e-5 for e in report["parity"]["outputs"].values())
    assert report["latency"]["ratio"]["rounds"] == 6 and report["layers"] and report["files"]
    ops = {n.op_type for n in onnx.load(folder / "build" / "model" / "model.onnx").graph.node}
    assert "BatchNormalization" not in ops
    again = run("build", "build/model", "--no-bench", "-o", "again", cwd=folder)
    assert again.returncode == 0, again.stderr
    same = run("verify", "build/model", "again", cwd=folder)
    assert same.returncode == 0 and "same function" in same.stdout


def _text(path: str, text: str):
    def write(folder: Path) -> None:
        (folder / path).write_text(text)

    return write


def _nothing(folder: Path) -> None:
    pass


BAD = {
    "no such zoo model": (_nothing, ["build", "shvit_s9"], ["shvit_s9", "shvit_s"]),
    "no such file": (_nothing, ["build", "gone.py", "-o", "new/out"], ["gone.py"]),
    "no such onnx": (_nothing, ["build", "gone.onnx"], ["gone.onnx"]),
    "not an onnx file": (_text("bad.onnx", "hello"), ["build", "bad.onnx"], ["bad.onnx", "not an ONNX model"]),
    "no model()": (_text("model.py", "x = 1\n"), ["build", "model.py"], ["model.py", "model()"]),
    "no factory": (_nothing, ["build", "model.py:gone"], ["model.py", "gone"]),
    "syntax error": (_text("model.py", "def model(:\n"), ["build", "model.py"], ["model.py:1"]),
    "exception": (_text("model.py", "\n\ndef model():\n    raise ValueError('boom')\n"), ["build", "model.py"],
                  ["model.py:4", "boom"]),
    "wrong input shape": (_text("model.py", NET.replace("2, 3, 16, 16", "2, 4, 16, 16")), ["build", "model.py"],
                          ["model.py"]),
    "wrong --input": (_nothing, ["build", "model.py", "--input", "x=3"], ["1x3x224x224"]),
    "wrong --dynamic": (_nothing, ["build", "model.py", "--dynamic", "x:0"], ["x:0=1:4:16"]),
    "wrong target": (_nothing, ["build", "model.py", "--target", "orr"], ["'orr'", "did you mean 'ort'"]),
    "wrong precision": (_nothing, ["build", "model.py", "--precision", "fp17"], ["fp17"]),
    "wrong pass": (_nothing, ["build", "model.py", "--passes", "claen"], ["did you mean 'clean'"]),
    "wrong option": (_nothing, ["build", "net.onnx", "--option", "thread=1"], ["threads"]),
    "option without value": (_nothing, ["build", "model.py", "--option", "threads"], ["threads=1"]),
    "wrong config": (_text("e.toml", "[build]\ntargt = 'ort'\n"), ["build", "model.py", "--config", "e.toml"],
                     ["did you mean 'target'"]),
    "config is no toml": (_text("e.toml", "[build\n"), ["build", "model.py", "--config", "e.toml"], ["not TOML"]),
    "output is a file": (_text("out", "precious"), ["build", "model.py", "-o", "out"], ["a file of that name"]),
    "unknown command": (_nothing, ["bild"], ["Did you mean 'build'"]),
    "unknown option": (_nothing, ["build", "model.py", "--tarkget", "x"], ["--target"]),
    "not a bundle": (_nothing, ["verify", "net.onnx", "nowhere"], ["nowhere"]),
}  # fmt: skip
# These come from the process that runs the user's file, as "no factory" does; the frontend's tests have them all.
IN_THE_CHILD = ("no model()", "syntax error", "exception", "wrong input shape")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in IN_THE_CHILD else ()) for c in BAD])
def test_bad_input_is_one_message_and_exit_2(folder, case):
    prepare, arguments, expected = BAD[case]
    prepare(folder)
    before = sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)
    message = complaint(run(*arguments, cwd=folder), 2)
    for words in expected:
        assert words in message
    after = sorted(p.name for p in folder.rglob("*") if "__pycache__" not in p.parts)
    assert after == before, "nothing is written"


def test_a_folder_that_is_no_bundle_is_never_replaced(folder):
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("precious")
    message = complaint(run("build", "net.onnx", "-o", "thesis", cwd=folder), 2)
    assert "not a bundle" in message and (folder / "thesis" / "chapter.txt").read_text() == "precious"
    assert os.listdir(folder / "thesis") == ["chapter.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passes", "claen"], "did you mean 'clean'"),
        (["--target", "trt", "--option", "levle=3"], "did you mean 'level'"),
        (["--option", "thraeds=1"], "did you mean 'threads'"),
        (["--target", "tvm", "--option", "winogard=no"], "did you mean 'winograd'"),
        (["-o", "taken"], "a file of that name"),
        (["-o", "taken/out"], "cannot write taken/out"),
        (["-o", "full"], "not a bundle"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_source_is_loaded(folder, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    (folder / "model.py").write_text("raise RuntimeError('loaded')\n")
    (folder / "taken").write_text("precious")
    (folder / "full").mkdir()
    (folder / "full" / "chapter.txt").write_text("precious")
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(cli.main, ["build", "model.py", *arguments])
    assert done.exit_code == 2 and words in done.stderr and "loaded" not in done.stderr, done.stderr
    assert sorted(folder.rglob("*")) == before, "what was tried is gone"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(folder):
    folder.chmod(0o500)
    complaint(run("build", "model.py", cwd=folder), 2)


def test_interrupting_a_build_leaves_nothing(folder):
    waiting = "def model():\n    import time; print('waiting', flush=True); time.sleep(30)"
    (folder / "model.py").write_text(NET.replace("def model():", waiting))
    process = subprocess.Popen(
        [sys.executable, "-m", "edgecompile", "build", "model.py"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line == "waiting\n" for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert not (folder / "build").exists()
    listing = subprocess.run(["ps", "-o", "args=", "-g", str(process.pid)], capture_output=True, text=True).stdout
    assert "export_child" not in listing, "the child that ran model.py is gone"


def test_config_gives_defaults_that_the_command_line_overrides(folder):
    (folder / "e.toml").write_text("[build]\noutput = 'from_config'\nno-bench = true\npasses = 'clean'\n")
    done = run("build", "net.onnx", "--config", "e.toml", "--passes", "fold_norm", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "edgecompile.report/1" and report["latency"] is None
    assert (folder / "from_config" / "manifest.json").is_file()
    assert [p["spec"] for p in report["passes"]] == ["fold_norm"]


def test_opt_verify_inspect_bisect(folder):
    done = run("opt", "net.onnx", "-o", "out.onnx", "--passes", "clean", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [n.op_type for n in onnx.load(folder / "out.onnx").graph.node] == ["Exp"]
    assert run("verify", "net.onnx", "out.onnx", cwd=folder).returncode == 0
    none = run("opt", "net.onnx", "-o", "none.onnx", "--passes", "clean", "--limit", "0", cwd=folder)
    assert none.returncode == 0 and len(onnx.load(folder / "none.onnx").graph.node) == 2
    shown = json.loads(run("inspect", "out.onnx", "--json", cwd=folder).stdout)
    assert shown["ops"] == {"Exp": 1} and shown["nodes"] == 1
    right = run("bisect", "net.onnx", "--passes", "clean", cwd=folder)
    assert right.returncode == 0 and "every rewrite keeps" in right.stdout


def test_verify_tells_different_functions_apart_and_shows_the_layer(folder):
    onnx_net(folder / "a.onnx")
    model = onnx.load(folder / "a.onnx")
    model.graph.node[1].op_type = "Sqrt"
    model.graph.node[0].op_type = "Abs"
    onnx.save(model, folder / "b.onnx")
    done = run("verify", "a.onnx", "b.onnx", "--json", cwd=folder)
    assert done.returncode == 1
    verdict = json.loads(done.stdout)
    assert verdict["same"] is False and verdict["layers"][0]["tensor"] == "t"


def test_names_from_a_model_cannot_drive_the_terminal(folder):
    model = onnx.load(folder / "net.onnx")
    evil = "\x1b]0;owned\x07\u202e[red]"
    model.graph.input[0].name = model.graph.node[0].input[0] = evil
    onnx.save(model, folder / "evil.onnx")
    shown = run("inspect", "evil.onnx", cwd=folder)
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout and "\u202e" not in shown.stdout and "[red]" in shown.stdout


def test_a_reader_that_stops_early_is_no_error(folder):
    done = subprocess.run(
        f"{sys.executable} -m edgecompile models --json | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.stderr == ""


def test_a_defect_of_ours_leaves_a_crash_report(folder):
    code = (
        "import sys, edgecompile.cli as c, edgecompile.registry as r\n"
        "def broken(): raise RuntimeError('unforeseen')\n"
        "r.pass_names = broken\n"
        "c.main(['passes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    message = complaint(done, 70)
    path = Path(message.rsplit(" ", 1)[1].strip())
    assert "unforeseen" in path.read_text() and "Traceback" in path.read_text()
    path.unlink()


def test_python_api_is_the_same(folder, monkeypatch):
    import edgecompile

    monkeypatch.chdir(folder)
    bundle = edgecompile.build("model.py:small", target="ort", bench=False, options={"threads": 1})
    assert bundle.path == Path("build/model_small")
    feeds, reference = bundle.probe()
    engine = edgecompile.load(bundle.path)
    for name, value in engine.run(feeds).items():
        np.testing.assert_allclose(value, reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["max_drop", "max-drop"])
@pytest.mark.parametrize("value", ['"0.5%"', "0.005"])
def test_the_configuration_gives_a_drop_under_either_name(tmp_path, key, value, monkeypatch):
    from edgecompile.pipeline import Drop

    class Seen(Exception):
        pass

    def seen(source, out, options):
        raise Seen(options.max_drop)

    monkeypatch.setattr(driver, "check", seen)
    (tmp_path / "e.toml").write_text(f"[build]\n{key} = {value}\n")
    for more, expected in (((), value.strip('"')), (("--max-drop", "2%"), "2%")):
        with pytest.raises(Seen) as caught:
            arguments = ["shvit_s1", "--precision", "int8", "--config", str(tmp_path / "e.toml"), *more]
            cli.build.main(arguments, standalone_mode=False)
        assert caught.value.args == (Drop(expected),)


def test_a_bar_stands_where_a_text_ends_in_a_percentage(monkeypatch):
    import io

    from edgecompile import terminal

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.progress() as say:
        say("calibrating, 50%")
        time.sleep(0.3)
        say("judging int8")
        time.sleep(0.3)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert any("calibrating, 50%" in x and "\u2501" in x for x in lines)
    assert any("judging int8" in x for x in lines) and not any("judging" in x and "\u2501" in x for x in lines)
