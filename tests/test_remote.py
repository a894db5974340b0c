"""Measuring over ssh: a real server on the loopback address, and a board that has numpy and ONNX Runtime only."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import loopback
import numpy as np
import pytest
from loopback import NUMPY, Server, board_python
from onnx import TensorProto, helper, numpy_helper

from edgecompile import bench, board_runner, bundle, measure, oracle, remote
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.remote import Board, Device, LocalBoard, open_board
from edgecompile.targets.ort import ENGINE, OrtTarget

pytest.importorskip("onnxruntime")


# -- a bundle ----------------------------------------------------------------------------------------------------------


def make_bundle(folder: Path, width: int = 16, **options) -> Path:
    """A bundle of two convolutions."""
    rng = np.random.default_rng(width)
    weights = [("w1", (width, 3, 3, 3)), ("w2", (width, width, 3, 3))]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], "act"),
        helper.make_node("Conv", ["r", "w2"], ["file/name"], "second", pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("file/name", TensorProto.FLOAT, [1, width, 16, 16])],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 8, name) for name, shape in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return store(Graph.from_proto(model), folder, **options)


def store(model: Graph, folder: Path, **options) -> Path:
    """A bundle of a graph, with reference outputs from the unoptimised graph."""
    folder.mkdir()
    feeds = oracle.random_feeds(model.signature().inputs, seed=1)
    model.save(folder / bundle.MODEL)
    engine = OrtTarget().build(model, folder, {"threads": "1", **options})
    bundle.write_probe(folder, feeds, oracle.run(model, feeds))
    (folder / "report.json").write_text("{}")
    bundle.write_manifest(folder, engine.manifest, name=folder.name, precision="fp32")
    engine.close()
    return folder


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest of a bundle."""
    document = json.loads((folder / bundle.MANIFEST).read_text())
    change(document)
    (folder / bundle.MANIFEST).write_text(json.dumps(document))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return make_bundle(folder / "small"), make_bundle(folder / "large", 64)


# -- an ssh server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    with loopback.serve(folder, "RemoteCommand echo never\n") as server:
        board_python(folder / "bin" / "python3")
        yield server


@pytest.fixture
def fresh(server) -> Server:
    """The server, with nothing in its cache and nothing in its home folder."""
    shutil.rmtree(server.cache.parent, ignore_errors=True)
    shutil.rmtree(server.home)
    server.home.mkdir()
    return server


def connect(server: Server, python: str = "", options: tuple[str, ...] = ()) -> Board:
    return Board(Device.parse(server.url(python)), [*options, *server.options])


# -- both places -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["here", "ssh"])
def place(request) -> Iterator[remote.Place]:
    if request.param == "here":
        with open_board(None) as board:
            assert isinstance(board, LocalBoard)
            yield board
    else:
        with connect(request.getfixturevalue("fresh")) as board:
            yield board


def test_the_outputs_are_those_of_the_engine(place, bundles):
    for path in bundles:
        opened, key = Bundle.open(path), place.add(path)
        feeds, reference = opened.probe()
        np.testing.assert_allclose(place.outputs(key)["file/name"], reference["file/name"], rtol=1e-4, atol=1e-5)
        other = {"x": np.random.default_rng(5).standard_normal((1, 3, 16, 16)).astype(np.float32)}
        engine = opened.engine()
        np.testing.assert_array_equal(place.outputs(key, other)["file/name"], engine.run(other)["file/name"])
        assert not np.array_equal(place.outputs(key, other)["file/name"], reference["file/name"])
        np.testing.assert_array_equal(place.outputs(key, feeds)["file/name"], place.outputs(key)["file/name"])


def test_a_session_tells_a_slow_engine_from_a_fast_one(place, bundles):
    small, large = map(place.add, bundles)
    assert small != large
    arms = {"large": large, "small": small, "again": large}
    samples, disturbed = place.pair(arms, seconds=0.2, seed=3)
    assert not disturbed
    assert list(samples) == list(arms) and [s.label for s in samples.values()] == list(arms)
    assert {(s.clock, s.threads) for s in samples.values()} == {("thread_cpu", 1)}
    assert measure.log_ratio(samples["large"], samples["small"]) > np.log(2)
    assert abs(measure.log_ratio(samples["large"], samples["again"])) < np.log(1.5)


def test_a_session_is_as_long_as_it_is_asked_to_be(place, bundles):
    key = place.add(bundles[1])
    short, long = (place.session({"a": key}, seconds=s, block_ms=5)["a"] for s in (0.05, 0.5))
    assert len(long.seconds) > 4 * len(short.seconds)
    assert np.unique(long.rounds).size > 4 * np.unique(short.rounds).size
    assert place.session({"a": key}, seconds=0.01, clock="wall")["a"].clock == "wall"
    assert len(place.session({"a": key}, seconds=0, block_ms=0.01, min_calls=700)["a"].seconds) >= 700


def test_engines_that_need_different_clocks_are_timed_with_one(place, bundles, tmp_path):
    two = place.add(make_bundle(tmp_path / "two", threads="2"))
    samples = place.session({"one": place.add(bundles[0]), "two": two}, seconds=0.02)
    assert [(s.clock, s.threads) for s in samples.values()] == [("wall", 1), ("wall", 2)]


def test_memory_grows_with_the_engine(place, bundles, tmp_path):
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((4096, 2048)).astype(np.float32), "w")]  # 32 MiB
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4096])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2048])],
        weights,
    )
    heavy = store(
        Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)),
        tmp_path / "heavy",
    )
    small, heavy = (place.footprint(place.add(p)) for p in (bundles[0], heavy))
    assert 32 << 20 <= heavy.peak - small.peak <= 160 << 20
    assert small.imports > 0 and small.opening > 0 and small.first_call > 0
    assert 10 << 20 < small.baseline < 200 << 20


def test_facts_and_fingerprint(place):
    told = place.facts()
    assert told["device"] == place.device
    assert told["versions"]["numpy"] == np.__version__
    assert told["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert told["machine"]["cpu"] == measure.machine()["cpu"]
    assert place.fingerprint({"onnxruntime": "1"}, {"threads": 1}).hard["versions.onnxruntime"] == "1"
    with open_board(None) as here:
        assert here.fingerprint({"a": "1"}, {"t": 2}).key == place.fingerprint({"a": "1"}, {"t": 2}).key
        assert here.fingerprint({"a": "1"}, {"t": 2}).key != place.fingerprint({"a": "1"}, {"t": 3}).key
        assert here.fingerprint({"a": "1"}, {"t": 2, "_remark": 1}).key == place.fingerprint({"a": "1"}, {"t": 2}).key
    assert place.require_locked("MAXN") == (), "this is no Jetson"


def test_what_is_there_is_told(place):
    found = {c.name: c for c in place.probe()}
    assert found["onnxruntime cpu provider"].available
    assert found["onnxruntime"].version == importlib.metadata.version("onnxruntime")


def test_layers(place, bundles):
    opened = Bundle.open(bundles[1])
    table = bench.layers(opened, opened.probe()[0], repeats=3, board=place)
    local = bench.layers(opened, opened.probe()[0], repeats=3)
    assert {c.name for c in table.layers} == {c.name for c in local.layers}
    assert {c.name: c.macs for c in table.layers} == {c.name: c.macs for c in local.layers}
    assert all(c.seconds >= 0 for c in table.layers) and table.seconds > 0
    assert (table.roofline is None) == bool(place.device), "the roofline of a board is not known"
    assert place.phases(place.add(bundles[1])) is None, "ONNX Runtime on the CPU has no such phases"


def test_inputs_that_do_not_fit_are_refused_and_the_next_request_works(place, bundles):
    key = place.add(bundles[0])
    with pytest.raises(InputError, match="ONNX Runtime rejects"):
        place.outputs(key, {"x": np.zeros((1, 4, 16, 16), np.float32)})
    assert place.outputs(key)


def test_an_engine_for_another_runtime_is_refused(place, bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "old")
    rewrite(tmp_path / "old", lambda d: d["engine"]["versions"].update(onnxruntime="1.9.0"))
    key = place.add(tmp_path / "old")
    for attempt in (place.outputs, lambda k: place.session({"a": k}), place.footprint):
        with pytest.raises(EnvironmentMissing, match=r"built with ONNX Runtime 1\.9\.0") as caught:
            attempt(key)
        assert "onnxruntime==1.9.0" in caught.value.fix and caught.value.exit_code == 4


def test_an_engine_for_another_cpu_is_refused(place, bundles, tmp_path):
    if not any(n.domain == "com.microsoft.nchwc" for n in Graph.load(bundles[0] / ENGINE).nodes):
        pytest.skip("this CPU has no blocked layout")
    shutil.copytree(bundles[0], tmp_path / "other")
    rewrite(tmp_path / "other", lambda d: d["engine"].update(device="aarch64 asimd"))
    with pytest.raises(EnvironmentMissing, match="built for another CPU"):
        place.session({"a": place.add(tmp_path / "other")})


def test_a_bundle_that_is_damaged_here_is_not_used(place, bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "bad")
    (tmp_path / "bad" / ENGINE).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        place.add(tmp_path / "bad")


# -- copies ------------------------------------------------------------------------------------------------------------


def pieces(board: Board, path: Path) -> tuple[str, list[int]]:
    """Add a bundle; its key, and how many bytes were there after each piece that was sent."""
    sent: list[int] = []
    return board.add(path, lambda done, total: sent.append(done)), sent


def test_only_what_the_engine_needs_is_copied_and_only_once(fresh, bundles, tmp_path):
    with connect(fresh) as board:
        key, sent = pieces(board, bundles[0])
        copy = fresh.cache / "bundles" / key
        assert {f.name for f in copy.iterdir()} == {ENGINE, bundle.PROBE, bundle.MANIFEST}
        assert sent[-1] == sum((bundles[0] / n).stat().st_size for n in (ENGINE, bundle.PROBE))
        before = (copy / ENGINE).stat()
        assert pieces(board, bundles[0]) == (key, [])
    with connect(fresh) as board:
        assert pieces(board, bundles[0]) == (key, [])
        shutil.copytree(bundles[0], tmp_path / "again")
        (tmp_path / "again" / "report.json").write_text('{"later": true}')
        digest = hashlib.sha256(b'{"later": true}').hexdigest()
        rewrite(tmp_path / "again", lambda d: d["files"]["report.json"].update(sha256=digest))
        assert pieces(board, tmp_path / "again") == (key, []), "a report that is written again is no other engine"
        other, sent = pieces(board, bundles[1])
        assert other != key and sent
    assert (copy / ENGINE).stat()[:4] == before[:4] and (copy / ENGINE).stat().st_mtime_ns == before.st_mtime_ns
    assert not list((fresh.cache / "bundles").glob(".*.part"))


def test_an_engine_without_files_takes_its_model_along(fresh, bundles, tmp_path):
    def bare(document: dict) -> None:
        document["engine"]["files"] = []

    shutil.copytree(bundles[0], tmp_path / "bare")
    rewrite(tmp_path / "bare", bare)
    with connect(fresh) as board:
        key = board.add(tmp_path / "bare")
        assert {f.name for f in (fresh.cache / "bundles" / key).iterdir()} == {
            "model.onnx",
            "probe.npz",
            "manifest.json",
        }
        reference = Bundle.open(bundles[0]).probe()[1]["file/name"]
        np.testing.assert_allclose(board.outputs(key)["file/name"], reference, rtol=1e-4, atol=1e-5)


def test_a_copy_goes_on_where_the_connection_was_lost(fresh, bundles, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 8192)
    total = sum((bundles[1] / n).stat().st_size for n in (ENGINE, bundle.PROBE))
    sent: list[int] = []

    def progress(done: int, expected: int) -> None:
        assert expected == total
        sent.append(done)
        if len(sent) == 5:
            assert fresh.drop_connections()

    with connect(fresh) as board:
        key = board.add(bundles[1], progress)
        assert sent[-1] == total and sent == sorted(set(sent)), "no piece was sent twice"
        assert len(sent) > 8
        assert board.outputs(key)


def test_a_copy_goes_on_in_another_process(fresh, bundles, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 8192)

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Enough

    with connect(fresh) as board, pytest.raises(Enough):
        board.add(bundles[1], stop)
    with connect(fresh) as board:
        key, sent = pieces(board, bundles[1])
        total = sum((bundles[1] / n).stat().st_size for n in (ENGINE, bundle.PROBE))
        assert total // 2 < sent[0] and sent[-1] == total
        assert board.outputs(key)


def test_a_spoiled_piece_is_sent_again(fresh, bundles):
    with connect(fresh) as board:
        key, _ = pieces(board, bundles[1])
        whole = fresh.cache / "bundles" / key
        (whole / bundle.MANIFEST).unlink()
        whole.rename(whole.with_name(f".{key}.part"))  # as after a power cut, which may leave anything in a file
        engine = whole.with_name(f".{key}.part") / ENGINE
        engine.write_bytes(engine.read_bytes()[:-5000] + bytes(3000))
        again, sent = pieces(board, bundles[1])
        assert again == key and sent and board.outputs(key)


def test_a_bundle_that_changes_while_it_is_copied_is_refused(fresh, bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "moving")
    engine = tmp_path / "moving" / ENGINE

    def change(done: int, total: int) -> None:
        (tmp_path / "moving" / bundle.PROBE).write_bytes(bytes((bundles[0] / bundle.PROBE).stat().st_size))
        engine.write_bytes(bytes(engine.stat().st_size))

    with connect(fresh) as board:
        with pytest.raises((EnvironmentMissing, InputError), match="damaged"):
            board.add(tmp_path / "moving", change)
        assert not [f for f in (fresh.cache / "bundles").iterdir() if not f.name.startswith(".")]
        assert board.add(bundles[0])


def test_a_file_that_was_tampered_with_is_noticed(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        board.outputs(key)
        copy = fresh.cache / "bundles" / key / ENGINE
        os.utime(copy)
        assert board.outputs(key), "touched, but the same"
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 1
        copy.write_bytes(content)
        for attempt in (lambda: board.outputs(key), lambda: board.session({"a": key}), lambda: board.footprint(key)):
            with pytest.raises(EnvironmentMissing, match="copy of the bundle is damaged") as caught:
                attempt()
            assert "another digest" in caught.value.why
        assert board.add(bundles[0]) == key
        assert board.outputs(key)
        shutil.rmtree(copy.parent)
        with pytest.raises(EnvironmentMissing, match="not there any more"):
            board.outputs(key)


def test_two_copies_at_once(fresh, bundles, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 4096)
    with connect(fresh) as one, connect(fresh) as two:
        found: dict[int, str] = {}

        def add(number: int, board: Board) -> None:
            found[number] = board.add(bundles[1])

        threads = [threading.Thread(target=add, args=item) for item in enumerate((one, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found[0] == found[1]
        assert one.outputs(found[0]) and two.outputs(found[0])


def test_what_nobody_has_used_for_long_is_forgotten(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        old = fresh.cache / "bundles" / key
        stale = fresh.cache / "runner" / "stale.pyz"
        stale.touch()
        month = time.time() - (board_runner.KEPT_DAYS + 1) * 86400
        recent = time.time() - (board_runner.KEPT_DAYS - 1) * 86400
        os.utime(old, (month, month))
        os.utime(stale, (recent, recent))
        board.add(bundles[1])
        assert not old.exists() and stale.exists()


# -- the runner --------------------------------------------------------------------------------------------------------


def test_the_runner_is_sent_once_and_again_when_it_was_changed(fresh):
    with connect(fresh):
        pass
    (archive,) = (fresh.cache / "runner").iterdir()
    assert archive.name == f"{hashlib.sha256(remote.runner()).hexdigest()}.pyz"
    before = archive.stat().st_ino
    with connect(fresh):
        assert archive.stat().st_ino == before
    archive.write_bytes(b"print('something else')")
    with connect(fresh) as board:
        assert board.facts()
    assert archive.read_bytes() == remote.runner()


def test_the_runner_is_the_same_file_every_time():
    first = remote.runner()
    remote.runner.cache_clear()
    assert remote.runner() == first
    assert len(first) < 300_000
    names = zipfile.ZipFile(io.BytesIO(first)).namelist()
    assert "__main__.py" in names and len(set(names)) == len(names)


def started_by(server: Server) -> list[Path]:
    """Processes that run in the server's connections, as folders of /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"XDG_CACHE_HOME={server.folder}".encode() in file.read_bytes():
                found.append(file.parent)
    return found


def test_it_ends_with_its_connection(fresh, bundles, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", ())

    def gone() -> bool:
        deadline = time.monotonic() + 10
        while started_by(fresh) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not started_by(fresh)

    with connect(fresh) as board:
        key = board.add(bundles[0])
        assert started_by(fresh)
    assert gone()
    with connect(fresh) as board:
        with pytest.raises(EnvironmentMissing, match="lost"), after(1.0, lambda: end_client(board)):
            board.session({"a": key}, seconds=60)
        assert gone()


# -- lost connections --------------------------------------------------------------------------------------------------


def end_client(board: Board) -> None:
    assert board._channel is not None
    board._channel._process.kill()


@contextlib.contextmanager
def after(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Do something while the block runs."""
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def test_a_session_whose_connection_is_lost_starts_over(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        dropped: list[int] = []
        start = time.monotonic()
        with after(1.0, lambda: dropped.append(fresh.drop_connections())):
            samples = board.session({"a": key, "b": key}, seconds=0.8)
        assert dropped and dropped[0] > 0 and time.monotonic() - start > 2.5, "one and a half sessions, and a pause"
        assert np.unique(samples["a"].rounds).size > 20
        assert board.outputs(key)


def test_a_board_that_stays_away_is_a_clear_error(fresh, bundles, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", (0.1, 0.1))
    with connect(fresh) as board:
        key = board.add(bundles[0])
        fresh.stop()
        fresh.drop_connections()
        board._channel._process.kill()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            with pytest.raises(EnvironmentMissing, match="lost 3 times during 'session'") as caught:
                board.session({"a": key})
        finally:
            fresh.start()
        assert caught.value.exit_code == 4 and "Connection refused" in caught.value.why
        assert board.session({"a": key}), "it is back, and goes on"


def test_a_runtime_that_crashes_is_not_tried_again(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        (runner,) = (int(p.name) for p in started_by(fresh) if "python" in os.readlink(p / "exe"))
        start = time.monotonic()
        with (
            pytest.raises(EnvironmentMissing, match="ended in the middle of its work") as caught,
            after(0.8, lambda: os.kill(runner, signal.SIGSEGV)),
        ):
            board.session({"a": key}, seconds=30)
        assert "Segmentation fault" in caught.value.why and time.monotonic() - start < 10
        assert board.outputs(key)


def test_an_interrupted_session_leaves_a_board_that_can_be_used(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        with pytest.raises(KeyboardInterrupt), after(0.7, lambda: os.kill(os.getpid(), signal.SIGINT)):
            board.session({"a": key}, seconds=30)
        assert list(board.session({"b": key}, seconds=0.01)) == ["b"]


# -- what may be missing -----------------------------------------------------------------------------------------------


def refusal(server: Server, python: str = "", options: tuple[str, ...] = ()) -> EnvironmentMissing:
    with pytest.raises(EnvironmentMissing) as caught:
        connect(server, python, options)
    assert caught.value.exit_code == 4 and caught.value.fix
    assert "ssh://board" in caught.value.what or not shutil.which("ssh")
    return caught.value


def test_without_numpy(fresh, tmp_path):
    error = refusal(fresh, str(board_python(tmp_path / "python3", ())))
    assert error.what.startswith("there is no numpy") and "-m pip install numpy" in error.fix


def test_without_the_runtime(fresh, bundles, tmp_path):
    with connect(fresh, str(board_python(tmp_path / "python3", NUMPY))) as board:
        key = board.add(bundles[0])
        for attempt in (board.outputs, lambda k: board.session({"a": k}), board.footprint):
            with pytest.raises(EnvironmentMissing, match="there is no onnxruntime") as caught:
                attempt(key)
            version = importlib.metadata.version("onnxruntime")
            assert f"-m pip install 'onnxruntime=={version}'" in caught.value.fix
        assert not {c.name: c for c in board.probe()}["onnxruntime"].available
        assert "onnxruntime" not in board.facts()["versions"]


def test_without_python(fresh):
    error = refusal(fresh, "/nowhere/python3")
    assert error.what == "there is no /nowhere/python3 on ssh://board/nowhere/python3"
    assert "3.10" in error.fix


def test_an_old_python(fresh, tmp_path):
    old = tmp_path / "python3"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8, 10)\n$2"\n')
    old.chmod(0o755)
    error = refusal(fresh, str(old))
    assert "too old" in error.what and "3.8" in error.why


def test_a_python_that_fails(fresh, tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\necho 'no disk today' >&2\nexit 3\n")
    broken.chmod(0o755)
    error = refusal(fresh, str(broken))
    assert "does not start" in error.what and error.why == "no disk today"


def test_a_python_of_the_home_folder(fresh):
    (fresh.home / "venv").mkdir()
    board_python(fresh.home / "venv" / "python3")
    with connect(fresh, "/~/venv/python3") as board:
        assert board.device == "ssh://board/~/venv/python3"


def test_without_an_ssh_client(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no ssh client" in refusal(fresh).what


def test_with_a_key_that_is_not_known_there(fresh, tmp_path):
    config = (fresh.folder / "config").read_text().replace(f"{fresh.folder}/user", f"{fresh.folder}/stranger")
    (tmp_path / "config").write_text(config)
    with pytest.raises(EnvironmentMissing, match="cannot connect to ssh://board") as caught:
        Board(Device.parse("ssh://board"), ["-F", str(tmp_path / "config")])
    error = caught.value
    assert "Permission denied" in error.why and "ssh-copy-id board" in error.fix


def test_with_another_host_key(fresh, tmp_path):
    known = tmp_path / "known_hosts"
    kind, key, *_ = (fresh.folder / "other_host.pub").read_text().split()
    known.write_text(f"[127.0.0.1]:{fresh.port} {kind} {key}\n")
    error = refusal(fresh, options=("-o", f"UserKnownHostsFile={known}"))
    assert "Host key verification failed" in error.why and "ssh-keygen -R" in error.fix
    known.write_text("")
    error = refusal(fresh, options=("-o", f"UserKnownHostsFile={known}"))
    assert "Host key verification failed" in error.why and error.fix.endswith("ssh board")


def test_at_a_port_where_nobody_listens(fresh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(EnvironmentMissing, match="cannot connect") as caught:
            Board(Device.parse(f"ssh://board:{free.getsockname()[1]}"), fresh.options)
    assert "Connection refused" in caught.value.why and "port" in caught.value.fix


def test_user_and_port_of_the_url_win(fresh):
    import getpass

    config = (fresh.folder / "config").read_text().replace(f"Port {fresh.port}", "Port 1\nUser nobody")
    (fresh.folder / "config_elsewhere").write_text(config)
    options = ["-F", str(fresh.folder / "config_elsewhere")]
    with Board(Device.parse(f"ssh://{getpass.getuser()}@board:{fresh.port}"), options) as board:
        assert board.facts()
    with pytest.raises(EnvironmentMissing):
        Board(Device.parse("ssh://board"), options)


def test_options_of_the_environment(fresh, monkeypatch):
    monkeypatch.setenv(remote.SSH_OPTIONS, f"-F '{fresh.folder}/config'")
    with open_board("ssh://board") as board:
        assert board.facts()["device"] == "ssh://board"


def test_a_target_that_needs_more_than_numpy(fresh, bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "tvm")
    rewrite(tmp_path / "tvm", lambda d: d.update(target="tvm"))
    with connect(fresh) as board, pytest.raises(EnvironmentMissing, match="target tvm cannot be measured over ssh"):
        board.outputs(board.add(tmp_path / "tvm"))


def test_a_board_without_tensorrt(fresh, bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "trt")
    rewrite(tmp_path / "trt", lambda d: d.update(target="trt"))
    with connect(fresh) as board, pytest.raises(EnvironmentMissing, match="there is no tensorrt") as caught:
        board.outputs(board.add(tmp_path / "trt"))
    assert "python3-libnvinfer" in caught.value.fix


# -- noise and nonsense ------------------------------------------------------------------------------------------------


def test_what_a_login_shell_or_a_runtime_prints_is_no_answer(fresh, bundles, tmp_path):
    python = board_python(tmp_path / "python3", before="printf 'Welcome\\n\\001\\377 no line end'; echo oops >&2")
    packages = tmp_path / "python3-packages"
    real = (packages / "onnxruntime").resolve().parent
    (packages / "onnxruntime").unlink()
    (packages / "onnxruntime").mkdir()
    (packages / "onnxruntime" / "__init__.py").write_text(
        "import os, sys\nos.write(1, b'noise of a library\\n')\nprint('noise of Python', flush=True)\n"
        f"os.system('echo noise of a program')\nsys.path.insert(0, {str(real)!r})\n"
        "del sys.modules['onnxruntime']\nimport onnxruntime\n"
    )
    with connect(fresh, str(python)) as board:
        key = board.add(bundles[0])
        reference = Bundle.open(bundles[0]).probe()[1]["file/name"]
        np.testing.assert_allclose(board.outputs(key)["file/name"], reference, rtol=1e-4, atol=1e-5)
        assert board.session({"a": key}, seconds=0.01)["a"].seconds.size
        assert board._channel is not None
        said = bytes(board._channel._said).decode()
        assert all(f"noise of {who}" in said for who in ("a library", "Python", "a program"))


def test_a_login_shell_that_never_stops_printing(fresh, tmp_path):
    python = board_python(tmp_path / "python3", before="head -c 300000 /dev/zero")
    start = time.monotonic()
    assert "without an end" in refusal(fresh, str(python)).why and time.monotonic() - start < 10
    lines = board_python(tmp_path / "python3_lines", before="yes welcome | head -n 50000")
    assert "prints too much" in refusal(fresh, str(lines)).why


FAKE = """
import json, sys
sys.stdin.buffer.read(BOOT)
out, read = sys.stdout.buffer, sys.stdin.buffer
def say(data):
    out.write(data)
    out.flush()
say(MARK + b"python 3.11\\n")
read.read(80)
say(MARK + b"run\\n")
for answer in ANSWERS:
    request = json.loads(read.readline())
    read.read(request["bytes"])
    header, content = answer
    if isinstance(header, dict):
        header = json.dumps({"id": request["id"], "bytes": len(content), **header}).encode() + b"\\n"
    say(header + content)
read.read()
"""
FINE = ({"ok": {"python": "3.11"}}, b"")


def impostor(folder: Path, *answers: tuple[object, bytes]) -> str:
    """Path of a program that greets like the runner and then gives these answers."""
    parts = {"BOOT": len(remote._BOOT.encode()), "MARK": remote._MARK, "ANSWERS": answers}
    text = FAKE.replace("\\\\n", "\\n")
    for name, value in parts.items():
        text = text.replace(name, repr(value))
    (folder / "fake.py").write_text(text)
    program = folder / "python3"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {folder}/fake.py\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    "answer",
    [
        (b"garbage\n", b""),
        (b"[1, 2]\n", b""),
        (b"[" * 100_000 + b"\n", b""),
        (b'{"id": 7, "bytes": 0, "ok": {}}\n', b""),
        (b'{"id": 1, "bytes": 99999999999, "ok": {}}\n', b""),
        (b'{"id": 1, "bytes": -1, "ok": {}}\n', b""),
        (b'{"id": 1, "bytes": "0", "ok": {}}\n', b""),
        ({"ok": 3}, b""),
        ({"error": 3}, b""),
        ({}, b""),
    ],
)
def test_an_answer_that_is_none(fresh, tmp_path, answer):
    error = refusal(fresh, impostor(tmp_path, answer))
    assert "not an answer" in error.what


def test_a_defect_of_the_runner_is_told_as_one(fresh, tmp_path):
    with (
        connect(fresh, impostor(tmp_path, FINE, ({"crash": "Traceback\nNameError: x"}, b""))) as board,
        pytest.raises(RuntimeError, match=r"runner on ssh://board/\S+ failed:\nTraceback\nNameError: x"),
    ):
        board.facts()


def test_texts_of_a_board_cannot_steer_a_terminal(fresh, tmp_path):
    facts = {"python": "\x1b[2J\x9b3.11", "list": [{"\x07": "\u202e"}]}
    told = {"type": "EnvironmentMissing", "what": "\x1b]0;owned\x07", "why": "x" * 10**5, "fix": "\x00"}
    with connect(fresh, impostor(tmp_path, FINE, ({"ok": facts}, b""), ({"error": told}, b""))) as board:
        found = board.facts()
        assert found["python"] == "?[2J?3.11" and found["list"] == [{"?": "?"}]
        with pytest.raises(EnvironmentMissing) as caught:
            board.facts()
    assert caught.value.what.startswith("?]0;owned? (on ssh://board/") and caught.value.fix == "?"
    assert len(caught.value.why) < 10_000


def samples_file(folder: Path, change: Callable[[measure.Samples], measure.Samples], name: str = "a") -> bytes:
    seconds, rounds = np.full(30, 0.001), np.repeat(np.arange(3), 10)
    measure.save(folder / "s.npz", {name: change(measure.Samples("a", "wall", seconds, 1, rounds))})
    return (folder / "s.npz").read_bytes()


SPOILED: dict[str, Callable[[measure.Samples], measure.Samples]] = {
    "infinite": lambda s: dataclasses.replace(s, seconds=s.seconds * np.inf),
    "negative": lambda s: dataclasses.replace(s, seconds=-s.seconds),
    "empty": lambda s: dataclasses.replace(s, seconds=s.seconds[:0], rounds=s.rounds[:0]),
    "another length": lambda s: dataclasses.replace(s, seconds=s.seconds[1:]),
    "another shape": lambda s: dataclasses.replace(s, seconds=s.seconds[:, None]),
    "another type": lambda s: dataclasses.replace(s, seconds=s.seconds.astype(complex)),
    "rounds out of order": lambda s: dataclasses.replace(s, rounds=s.rounds[::-1].copy()),
    "another label": lambda s: dataclasses.replace(s, label="b"),
    "another clock": lambda s: dataclasses.replace(s, clock="sundial"),
    "text": lambda s: dataclasses.replace(s, overhead="long"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("what", SPOILED)
def test_samples_are_checked(fresh, tmp_path, what):
    content = samples_file(tmp_path, SPOILED[what])
    with (
        connect(fresh, impostor(tmp_path, FINE, ({"ok": {"disturbed": ""}}, content))) as board,
        pytest.raises(EnvironmentMissing, match="did not send samples"),
    ):
        board.session({"a": "0" * 64})


class Evil:
    """What a pickle of this does must never happen."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("header.npy", "w") as entry:
        entry.write(bytes(2 << 20))
    return buffer.getvalue()


def test_archives_are_checked(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "PAYLOAD_LIMIT", 1 << 20)
    buffer = io.BytesIO()
    np.savez(
        buffer, header=np.array([Evil()], dtype=object), names=np.array(["y"]), **cast(Any, {"0": np.array([Evil()])})
    )
    for number, (content, name) in enumerate(
        [
            (buffer.getvalue(), "a"),
            (b"PK nothing", "a"),
            (b"", "a"),
            (bomb(), "a"),
            (samples_file(tmp_path, lambda s: s, "other"), "a"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        answers = (FINE, ({"ok": {"disturbed": ""}}, content), ({"ok": {}}, content))
        with connect(fresh, impostor(folder, *answers)) as board:
            with pytest.raises(EnvironmentMissing, match="did not send samples"):
                board.session({name: "0" * 64})
            with pytest.raises(EnvironmentMissing, match="did not send outputs"):
                board.outputs("0" * 64)
    assert not (tmp_path / "evil").exists()
    fine = (
        FINE,
        ({"ok": {"disturbed": "hot"}}, samples_file(tmp_path, lambda s: s)),
        ({"ok": {}}, board_runner.pack({"y": np.ones(2)})),
    )
    with connect(fresh, impostor(tmp_path, *fine)) as board:
        samples, disturbed = board.pair({"a": "0" * 64})
        assert samples["a"].p50 == 0.001 and disturbed == "hot"
        np.testing.assert_array_equal(board.outputs("0" * 64)["y"], [1, 1])


EVENT = '{"cat": "Node", "name": "NODE_kernel_time", "dur": NaN, "args": {}}'


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5, "{}", '{"events": 3}', '{"events": [{}]', EVENT])
def test_a_profile_is_checked(fresh, bundles, tmp_path, content):
    opened = Bundle.open(bundles[0])
    if content == EVENT:
        event = EVENT.replace("NODE", Graph.load(bundles[0] / ENGINE).nodes[0].name)
        content = f'{{"repeats": 1, "plain": 1, "events": [{event}]}}'
    answers = (FINE, ({"ok": {"complete": True}}, b""), ({"ok": {}}, content.encode()))
    with (
        connect(fresh, impostor(tmp_path, *answers)) as board,
        pytest.raises(EnvironmentMissing, match="did not send a profile"),
    ):
        bench.layers(opened, opened.probe()[0], board=board)


@pytest.mark.parametrize("wrong", [3, {}, {"compute": "x"}, {"compute": "nan"}, {"calls": None}, {"pinned": 1}])
def test_the_phases_of_a_call_are_checked(fresh, tmp_path, wrong):
    fine = {"compute": 1e-3, "enqueue": 1e-4, "end_to_end": 2e-3, "calls": 10, "pinned": {"cuda_graph": True}}
    told = {**fine, **wrong} if isinstance(wrong, dict) and wrong else wrong
    answers = (FINE, ({"ok": {"found": fine}}, b""), ({"ok": {"found": told}}, b""))
    with connect(fresh, impostor(tmp_path, *answers)) as board:
        assert board.phases("0" * 64) == fine
        with pytest.raises(EnvironmentMissing, match="did not send the times of an engine"):
            board.phases("0" * 64)


@pytest.mark.parametrize("state", [{}, {"complete": False}, {"complete": False, "sizes": {ENGINE: -1}}])
def test_the_state_of_a_copy_is_checked(fresh, bundles, tmp_path, state):
    impostors = [[({"ok": state}, b"")]]
    begun = ({"ok": {"complete": False, "sizes": {ENGINE: 0, bundle.PROBE: 0}}}, b"")
    impostors += [[begun, *[({"ok": {"size": size}}, b"")] * 9] for size in (10**9, 0, None)]
    for number, answers in enumerate(impostors):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (
            connect(fresh, impostor(folder, FINE, *answers)) as board,
            pytest.raises(EnvironmentMissing, match="did not send the state of a copy"),
        ):
            board.add(bundles[0])


@pytest.mark.parametrize("key", ["", "../../etc", "0" * 63, "G" * 64, "0" * 64 + "/.."])
def test_a_key_is_a_digest(fresh, key):
    with connect(fresh) as board, pytest.raises((EnvironmentMissing, InputError)):
        board.outputs(key)


def test_names_of_files_stay_in_their_folder(fresh, bundles):
    with connect(fresh) as board:
        key = board.add(bundles[0])
        for name in ("../evil", "/tmp/evil", "a/b", ".."):
            with pytest.raises(InputError, match="not the name of a file"):
                board._ask("put", payload=b"x", key=key, name=name, offset=0)
    assert not (fresh.cache / "evil").exists()


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b", "names", "0", "ü"])
def test_tensors_of_any_name_travel(name):
    arrays = {name: np.arange(3.0), "other": np.array(True)}
    found = board_runner.unpack(board_runner.pack(arrays))
    assert list(found) == [name, "other"]
    np.testing.assert_array_equal(found[name], arrays[name])
    assert found["other"].dtype == bool and found["other"].shape == ()


def test_tensors_of_objects_do_not():
    with pytest.raises(InputError, match="cannot be sent"):
        board_runner.pack({"x": np.array(["a", None], dtype=object)})


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://orin", Device("orin")),
        ("ssh://orin/", Device("orin")),
        ("ssh://jetson@10.0.0.7:2222", Device("10.0.0.7", "jetson", 2222)),
        ("ssh://my_board.local", Device("my_board.local")),
        ("ssh://u@[fe80::1%eth0]:22", Device("fe80::1%eth0", "u", 22)),
        ("ssh://h/opt/venv/bin/python3.11", Device("h", python="/opt/venv/bin/python3.11")),
        ("ssh://h:1/~/venv/bin/python", Device("h", port=1, python="~/venv/bin/python")),
    ],
)
def test_devices(text, expected):
    assert Device.parse(text) == expected
    assert Device.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "orin",
            "ssh:",
            "ssh://",
            "http://orin",
            "SSH://orin",
            "ssh:orin",
            "ssh://@orin",
            "ssh://orin:",
            " ssh://orin",
        ),
        *("ssh://-oProxyCommand=id", "ssh://-F", "ssh://-u@orin", "ssh://u@-orin", "ssh://-oProxyCommand=id@orin"),
        *("ssh://orin:0", "ssh://orin:65536", "ssh://orin:22:22", "ssh://orin:-1", "ssh://orin:２２", "ssh://orin:x"),
        *("ssh://or in", "ssh://orin\n", "ssh://orin;id", "ssh://$(id)", "ssh://`id`", "ssh://u'@orin", "ssh://a@b@c"),
        *(
            "ssh://orin?x=1",
            "ssh://orin#x",
            "ssh://u:password@orin",
            "ssh://[::1",
            "ssh://[-x]",
            "ssh://%h",
            "ssh://оrin",
        ),
        *(
            "ssh://orin/bin/python;id",
            "ssh://orin/bin/py thon",
            "ssh://orin/$(id)/x",
            "ssh://orin/~root/python",
            "ssh://orin/a",
        ),
    ],
)
def test_what_is_no_device(text):
    with pytest.raises(InputError, match="is not a device"):
        Device.parse(text)
    with pytest.raises(InputError, match="is not a device"):
        open_board(text)


# -- the commands ------------------------------------------------------------------------------------------------------


def command(server: Server, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, remote.SSH_OPTIONS: " ".join(server.options)}
    line = [sys.executable, "-m", "edgecompile", *map(str, arguments), "--device", server.url("")]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment)


def test_bench_compare_and_gate_on_a_board(fresh, bundles, tmp_path):
    small, large = bundles
    done = command(fresh, "bench", small, "--seconds", "1", "--precision", "50%", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["timings"][0]["clock"] == "thread_cpu" and measured["memory"]["peak"] > 0
    assert (small / "samples.npz").is_file(), "the raw samples were brought back"
    done = command(fresh, "compare", small, large, "--precision", "50%", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changes"][0]["low"] > 1
    line = ("gate", small, "--baseline", small, "--max-regression", "99%", "-o", "out")
    done = command(fresh, *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["verdict"] == "PASS" and result["fingerprint"]["class"]
    fresh_key = {p.name for p in fresh.cache.rglob("*") if p.is_dir()}
    assert fresh_key, "the bundles were copied there"


def test_a_board_that_is_not_there_is_one_message(fresh, bundles, tmp_path):
    line = [sys.executable, "-m", "edgecompile", "gate", bundles[0], "--device", "ssh://127.0.0.1:1", "-o", "out"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 4 and done.stderr.count("error: ") == 1, done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["exit_code"] == 4
