"""Boards behind TVM's own tracker and servers, which run on the loopback address; some of them are killed."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgecompile import bench, bundle, cli, driver, frontend, measure, oracle, remote
from edgecompile.cli import main
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.graph import Graph
from edgecompile.targets.tvm import ENGINE, TvmTarget, lower, tune
from edgecompile.targets.tvm import options as tvm_options
from edgecompile.targets.tvm.engine import TvmEngine
from edgecompile.targets.tvm.schedules import winograd

tvm = pytest.importorskip("tvm")
pytest.importorskip("tornado", reason="TVM's tracker needs it: pip install 'edgecompile[tvm]'")
from edgecompile.targets.tvm import rpc  # noqa: E402

KEYS = ("desk", "killed", "tuned", "lost")


@dataclass
class Servers:
    """The two servers of a key, at a tracker."""

    address: rpc.Address
    groups: dict[int, int]
    said: list[str] = field(default_factory=list)
    farms: list[rpc.Farm] = field(default_factory=list)

    def farm(self, **given) -> rpc.Farm:
        self.farms.append(rpc.Farm(self.address, self.said.append, **given))
        return self.farms[-1]

    def kill(self, port: int) -> None:
        """End a server and what it runs, as a loss of power does."""
        os.killpg(self.groups.pop(port), signal.SIGKILL)


@pytest.fixture(scope="module")
def by_key() -> Iterator[dict[str, Servers]]:
    program = [sys.executable, str(Path(__file__).with_name("tvm_farm.py")), *KEYS]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None and process.stdout is not None
    told = json.loads(process.stdout.readline())
    made = {
        key: Servers(rpc.Address("127.0.0.1", told["port"], key), {int(port): group for port, group in groups.items()})
        for key, groups in told["servers"].items()
    }
    deadline = time.monotonic() + 30
    while any(one.farm().count() < 2 for one in made.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield made
    process.kill()  # its children end with it
    process.wait()


@pytest.fixture
def servers(by_key) -> Iterator[Servers]:
    """Servers that no test kills; each test gives its boards back."""
    yield by_key["desk"]
    while by_key["desk"].farms:
        by_key["desk"].farms.pop().close()


def convolution(scale: float = 1.0) -> Graph:
    weight = scale * np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["y"], ["z"], name="/relu"),
    ]
    shapes = {"x": [1, 3, 32, 32], "y": [1, 8, 32, 32], "z": [1, 8, 32, 32]}
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()}
    graph = helper.make_graph(
        nodes, "g", [values["x"]], [values["z"], values["y"]], [onnx.numpy_helper.from_array(weight, "w")]
    )
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.fixture(scope="module")
def built(by_key, tmp_path_factory):
    """A graph, its engine on a board, its folder, inputs and what the oracle computes."""
    graph, folder, farm = convolution(), tmp_path_factory.mktemp("rpc"), by_key["desk"].farm()
    engine = rpc.RpcTarget(farm).build(graph, folder, {"threads": 1})
    feeds = oracle.random_feeds(graph.signature().inputs)
    farm.close()
    return graph, engine, folder, feeds, oracle.run(graph, feeds)


def error(reference, outputs) -> float:
    assert list(outputs) == list(reference)
    return max(e.max_rel for e in oracle.compare_all(reference, outputs).values())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rpc://tracker/pi5", ("tracker", 9190, "pi5")),
        ("rpc://10.0.0.2:9191/orin-nano.8gb", ("10.0.0.2", 9191, "orin-nano.8gb")),
        ("rpc://[::1]:9190/pi5", ("::1", 9190, "pi5")),
    ],
)
def test_an_address_names_tracker_and_key(text, expected):
    address = rpc.Address.parse(text)
    assert (address.host, address.port, address.key) == expected
    assert rpc.Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["rpc://tracker", "rpc://tracker:0/k", "rpc://tracker:70000/k", "rpc:///k", "rpc://a b/k", "rpc://t/k/l"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InputError, match="not a device"):
        remote.open_board(text)


def test_a_board_computes_what_the_oracle_does(servers, built):
    graph, engine, folder, feeds, reference = built
    assert error(reference, engine.run(feeds)) < 1e-5
    assert error(reference, engine.run({"x": feeds["x"] + 1})) > 1e-2
    farm = servers.farm()
    again = rpc.RpcTarget(farm).load(folder, engine.manifest, graph)
    assert error(reference, again.run(feeds)) < 1e-5
    here = TvmTarget().load(folder, engine.manifest, graph)  # the board is this machine
    assert error(here.run(feeds), again.run(feeds)) == 0
    with pytest.raises(InputError, match="x"):
        engine.run({"x": feeds["x"][:, :1]})


def test_a_board_tells_the_cpu_that_this_machine_is(servers):
    farm = servers.farm()
    facts, options = farm.facts(), farm.fitted({"threads": "auto"})
    assert (facts.machine, facts.cpu) == (platform.machine(), tvm.target.codegen.llvm_get_system_cpu())
    assert set(facts.features) == set(measure.cpu_features())
    assert facts.cpus == os.cpu_count() and options["threads"] == facts.cores
    assert options["mcpu"] == facts.cpu and "mtriple" not in options


def test_a_library_runs_on_as_many_threads_of_the_board_as_it_was_built_for(servers, tmp_path):
    farm, graph = servers.farm(), convolution()
    if farm.facts().cores < 2:
        pytest.skip("the board has one core")
    engine = rpc.RpcTarget(farm).build(graph, tmp_path, {"threads": 2})

    def threads(link: rpc.Link) -> int:
        link.open(engine._library)
        return link._session.get_function("runtime.NumThreads")()

    assert farm.run(threads) == 2


def test_what_a_board_cannot_run_is_refused_before_it_is_built(servers, built, tmp_path, monkeypatch):
    farm, graph = servers.farm(), built[0]
    other = {"aarch64": "x86_64", "x86_64": "aarch64"}[platform.machine()]
    monkeypatch.setattr("edgecompile.targets.tvm.options.require_linker", lambda _: None)
    with pytest.raises(EnvironmentMissing, match="of another kind") as caught:
        rpc.RpcTarget(farm).build(graph, tmp_path, {"mtriple": f"{other}-linux-gnu"})
    assert other in caught.value.why and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="arch=sm_87"):
        farm.fitted({"arch": "sm_87"})
    # A server without a compiler tells nothing: the CPU must be named, and then it is taken on trust.
    silent = rpc.Facts(cpus=4, cores=4)
    monkeypatch.setattr(farm, "facts", lambda: silent)
    with pytest.raises(EnvironmentMissing, match="do not tell their CPU"):
        farm.fitted({})
    assert farm.fitted({"mcpu": "cortex-a76", "mtriple": "aarch64-linux-gnu"})["threads"] == 4


def test_one_of_two_boards_is_killed_midway(built, by_key):
    """Work under way starts over on the other one; when that is killed too, none is left."""
    _, engine, folder, feeds, reference = built
    servers = by_key["killed"]
    farm = servers.farm()
    first = farm.link().name
    started = []

    def work(link):
        started.append(link.name)
        if len(started) == 1:
            threading.Timer(0.2, lambda: servers.kill(port(link.name))).start()
        return rpc._session(link, {"a": engine._library}, {"a": feeds}, remote.Plan(0.8))["a"].p50

    assert 0 < farm.run(work) < 1e-3
    assert started[0] == first and len(set(started)) == 2
    assert len(servers.said) == 1 and f"{first} was lost" in servers.said[0]
    assert farm.losses == servers.said and servers.said[0] in farm.notes[1]
    # The very same again, of an engine: what it opened on the lost board is opened on the other one.
    again = rpc.RpcEngine(engine.manifest, farm, folder, engine._graph)
    assert error(reference, again.run(feeds)) < 1e-5
    servers.kill(*servers.groups)
    with pytest.raises(EnvironmentMissing, match="is left") as caught:
        again.run(feeds)
    assert "rpc_server --tracker" in caught.value.fix and caught.value.exit_code == 4


def port(name: str) -> int:
    return int(name.rpartition(":")[2])


def test_a_library_that_fails_is_not_a_lost_board(servers, built):
    _, engine, _, feeds, _ = built
    farm, library = servers.farm(), engine._library
    with pytest.raises(InputError, match="cannot do this"):
        farm.run(lambda link: link.run(library, link.open(library), {"x": feeds["x"][:, :1]}))
    assert not farm.losses


def test_layers_are_those_of_this_machine(servers, built, monkeypatch, tmp_path):
    graph, manifest, folder, feeds = built[0], built[1].manifest, built[2], built[3]
    here, engine = (t.load(folder, manifest, graph) for t in (TvmTarget(), rpc.RpcTarget(servers.farm())))
    pairs = list(zip(here.layers(feeds, 20), engine.layers(feeds, 20), strict=True))
    assert len(pairs) >= 2 and {name for one, _ in pairs for name in one.nodes} == {"/conv", "/relu"}
    for one, other in pairs:
        assert (one.name, one.op, one.nodes, one.modules) == (other.name, other.op, other.nodes, other.modules)
        assert 0.1 < one.microseconds / other.microseconds < 10
    with pytest.raises(InputError, match="x"):
        engine.layers({"x": feeds["x"][:, :1]})
    with pytest.raises(ValueError):
        TvmTarget().layers(folder, engine.manifest, graph, {"microseconds": [1.0] * (len(pairs) + 1)})
    # A library that has no such function, as they were before.
    monkeypatch.setattr(lower, "TIMED", "main_of_another_name")
    before = rpc.RpcTarget(servers.farm()).build(graph, tmp_path, {"threads": 1})
    for old in (before, TvmTarget().load(tmp_path, before.manifest, graph)):
        assert error(here.run(feeds), old.run(feeds)) == 0
        with pytest.raises(InputError, match="does not tell the times") as caught:
            old.layers(feeds)
        assert caught.value.fix == "build it again"


# -- tuning ------------------------------------------------------------------------------------------------------------


def network() -> Graph:
    """A convolution that Winograd's algorithm makes much faster."""
    weight = (np.random.default_rng(0).standard_normal((64, 64, 3, 3)) / 8).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="/conv", pads=[1, 1, 1, 1])
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64, 32, 32]) for n in "xy"]
    graph = helper.make_graph([node], "net", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.fixture
def search(monkeypatch, tmp_path):
    """Two choices to try, a cost model that makes neither, a short comparison, and a cache of its own."""
    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SPACE", {"size": (None, 4, 0), "rows_outside": (False,), "steps": (4,), "rank": (0,)})
    monkeypatch.setattr(tune, "SESSIONS", 6)
    monkeypatch.setattr(tune, "COMPARED_SECONDS", 0.3)
    monkeypatch.setattr(tune, "_CONFIRMATIONS", 1)
    monkeypatch.setattr(winograd, "_GAIN", 0.0)
    winograd.choose.cache_clear()
    yield
    winograd.choose.cache_clear()


def records(cache: Path) -> list[str]:
    (folder,) = (cache / "tuning").iterdir()
    return (folder / tune.RECORDS).read_text().splitlines()


def test_a_search_times_on_both_boards_at_once_and_goes_on_without_one(search, by_key, tmp_path, monkeypatch):
    """Two rounds meet, each on a board of its own; then one board is killed, and its round is done on the other."""
    servers, farm, graph = by_key["tuned"], by_key["tuned"].farm(), network()
    meeting, met, done, times = threading.Barrier(2), [], [], rpc.RpcRunner._times

    def watched(runner, link, job):
        if len(job.models) == 2 and len(met) < 2:
            met.append(link.name)
            meeting.wait(60)
            if link.name == max(met):
                servers.kill(port(link.name))
        found = times(runner, link, job)
        done.append((link.name, len(job.models)))
        return found

    monkeypatch.setattr(rpc.RpcRunner, "_times", watched)
    folder = tmp_path / "tuned"
    folder.mkdir()
    engine = rpc.RpcTarget(farm).build(graph, folder, {"threads": 1, "tune": "5m"}, servers.said.append)
    assert len(set(met)) == 2
    assert {name for name, models in done if models == 2} == {min(met)}
    assert sum(f"{max(met)} was lost" in text for text in servers.said) == 1
    assert any(max(met) in note for note in farm.notes)
    assert any("round 2 on 2 boards" in text for text in servers.said)
    assert any("on 1 board," in text for text in servers.said)

    assert len(records(tmp_path / "cache")) == len(set(records(tmp_path / "cache"))) == 3  # as it was, and two trials
    facts = json.loads((folder / tune.FACTS).read_text())
    assert facts["trials"] == 2 and facts["ratio"]["high"] < 1
    assert [kernel["choice"]["size"] for kernel in facts["kernels"]] == [4]
    feeds = oracle.random_feeds(graph.signature().inputs)
    assert error(oracle.run(graph, feeds), engine.run(feeds)) < 1e-5
    assert "winograd" in " ".join(layer.op for layer in engine.layers(feeds))
    farm.close()


def test_a_search_that_no_board_is_left_for_keeps_what_it_learnt(search, by_key, tmp_path):
    servers = by_key["lost"]

    def kill(text: str) -> None:
        if text.startswith("tuning: round 1"):
            for one in list(servers.groups):
                servers.kill(one)

    options = {"threads": 1, "tune": "5m"}
    with pytest.raises(EnvironmentMissing, match=r"no board of .* is left") as caught:
        rpc.RpcTarget(servers.farm()).build(network(), tmp_path, options, kill)
    assert "the same command goes on from there" in caught.value.why and "rpc_server" in caught.value.fix
    assert caught.value.exit_code == 4
    assert len(records(tmp_path / "cache")) == 1  # as it was; that no board was left says nothing of a choice
    assert not (tmp_path / ENGINE).exists()


def test_busy_boards_are_waited_for(servers):
    holders = [servers.farm() for _ in range(2)]
    for holder in holders:
        holder.link()
    servers.said.clear()
    with pytest.raises(EnvironmentMissing, match="no board") as caught:
        servers.farm(wait=0.3).facts()
    assert "none became free" in caught.value.why and any("are busy" in text for text in servers.said)
    threading.Timer(0.3, holders[0].close).start()
    waiting = servers.farm()
    assert waiting.facts().machine == platform.machine()


def test_no_tracker_and_no_board_are_told_apart(servers):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(EnvironmentMissing, match="no tracker answers"):
            rpc.Farm(rpc.Address("127.0.0.1", free.getsockname()[1], "desk")).facts()
    nobody = rpc.Address("127.0.0.1", servers.address.port, "nobody")
    with pytest.raises(EnvironmentMissing, match="there is no board"):
        rpc.Farm(nobody).facts()
    with pytest.raises(EnvironmentMissing, match="there is no board"):
        rpc.RpcRunner(rpc.Farm(nobody), network(), tvm_options.parse({"threads": 1}))


def test_build_and_bench(servers, tmp_path, monkeypatch):
    """The library is built for the board, compared and timed there, and timed again by bench."""
    monkeypatch.setattr(measure, "_WARM_SECONDS", 0.05)
    monkeypatch.setattr(rpc, "_SESSIONS", 2)
    model, made, device = tmp_path / "net.onnx", tmp_path / "bundle", str(servers.address)
    convolution().save(model)
    options = driver.Options("tvm", seconds=0.6, target_options={"threads": "1"}, device=device)
    given = {"source": str(model), "inputs": (), "dynamic": (), "seed": 0}
    with cli.opened(given, servers.said.append) as source:
        driver.build(source, made, options)
    report = json.loads((made / "report.json").read_text())
    assert report["provenance"]["machine"]["cpu"] == tvm.target.codegen.llvm_get_system_cpu()
    assert any("network is in no figure" in text for text in report["warnings"])
    command = ["bench", str(made), "--device", device, "--seconds", "0.1", "--layers", "--json"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    result = bench.BenchResult.from_json(json.loads(shown.output[shown.output.index("{") :]))
    assert result.timing.clock == "wall" and len(result.timing.sessions) >= 6 and result.machine["features"]
    assert 1e-6 < result.timing.p50 < 1e-2
    assert result.layers is not None
    assert any("conv2d" in layer.name and layer.seconds > 0 for layer in result.layers.layers)
    assert report["layers"] and all(one["microseconds"] > 0 for one in report["layers"])
    assert result.memory is None and any("network" in note for note in result.notes)
    with remote.open_board(device) as board:
        opened = bundle.Bundle.open(made)
        assert error(opened.probe()[1], board.outputs(board.add(made))) < 1e-5


@pytest.mark.parametrize(
    "command, said",
    [
        (["build", "{net}", "--target", "ort", "--device", "rpc://127.0.0.1:9/k"], "does not go with target ort"),
        (["build", "{net}", "--target", "tvm", "--device", "ssh://board"], "nothing can be built for ssh://board"),
        (["build", "{net}", "--target", "tvm", "--device", "rpc://k", "--prepare"], "does not go with --prepare"),
        (["bench", "{net}", "--device", "rpc://{tracker}/desk"], "is not a bundle"),
        (["bench", "{ort}", "--device", "rpc://{tracker}/desk"], "it is of the target ort"),
    ],
)
def test_what_does_not_go_with_boards_is_one_message(servers, tmp_path, command, said):
    net, ort = tmp_path / "net.onnx", tmp_path / "ort"
    convolution().save(net)
    if "{ort}" in command:
        pytest.importorskip("onnxruntime")
        CliRunner().invoke(main, ["build", str(net), "--no-bench", "-o", str(ort)])
    filled = [part.format(net=net, ort=ort, tracker=f"127.0.0.1:{servers.address.port}") for part in command]
    result = CliRunner().invoke(main, filled)
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_help_names_the_scheme():
    for command in ("build", "bench"):
        assert "rpc://tracker:9190/pi5" in CliRunner().invoke(main, [command, "--help"]).output


def test_the_network_is_in_no_figure(servers, built, monkeypatch):
    """Each call is made 5 ms later than it could be; the figures are those of calls of some microseconds."""
    _, engine, _, feeds, _ = built
    slow = rpc.Link.timer

    def delayed(*given):
        once = slow(*given)
        return lambda: (time.sleep(0.005), once())[1]

    monkeypatch.setattr(rpc.Link, "timer", delayed)
    farm = servers.farm()
    plan = remote.Plan(0.1)
    found = farm.run(lambda link: rpc._session(link, {"a": engine._library}, {"a": feeds}, plan))["a"]
    assert found.clock == "wall" and 1e-6 < found.p50 < 2e-3
    assert (engine._library.path.name, found.threads) == (ENGINE, 1)


@pytest.mark.slow
def test_both_clocks_agree(tmp_path):
    """TVM's time_evaluator and our clocks, in turns on one virtual machine of a zoo model with one thread.

    The evaluator reads the wall clock. What CPU time passes meanwhile says the same where others use the machine too.
    """
    source = frontend.load("repvgg_a0", folder=tmp_path)
    options = driver.Options("tvm", bench=False, target_options={"threads": 1})
    made = driver.build(source, tmp_path / "made", options)
    engine, feeds = made.engine(), made.probe()[0]
    assert isinstance(engine, TvmEngine)
    found = agreement(engine, feeds)
    engine.close()
    print(f"{found['ms']:.2f} ms by time_evaluator; its part of ours: wall {found['wall']:.3f}, CPU {found['cpu']:.3f}")
    assert abs(found["wall"] - 1) < 0.03 and abs(found["cpu"] - 1) < 0.03


def agreement(engine: TvmEngine, feeds, rounds: int = 40, calls: int = 8) -> dict[str, float]:
    call = engine.call(feeds)
    evaluator = engine._open().time_evaluator("bound_1", tvm.cpu(), number=1, repeat=calls)
    wall, cpu = measure.CLOCKS["wall"], measure.CLOCKS["thread_cpu"]
    theirs, ours, ratios = [], [], []
    call()
    for _ in range(rounds):
        start = cpu()
        theirs += evaluator().results
        middle = cpu()
        call()  # as the evaluator does, untimed
        for _ in range(calls):
            begun = wall()
            call()
            ours.append((wall() - begun) / 1e9)
        ratios.append((middle - start) / (cpu() - middle))
    medians = float(np.median(theirs)), float(np.median(ours))
    return {"ms": medians[0] * 1e3, "wall": medians[0] / medians[1], "cpu": float(np.median(ratios))}
