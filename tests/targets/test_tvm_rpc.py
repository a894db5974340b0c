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
from edgecompile.targets.tvm import ENGINE, TvmTarget
from edgecompile.targets.tvm.engine import TvmEngine

tvm = pytest.importorskip("tvm")
pytest.importorskip("tornado", reason="TVM's tracker needs it: pip install 'edgecompile[tvm]'")
from edgecompile.targets.tvm import rpc  # noqa: E402

KEYS = ("desk", "killed", "tuned")


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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """One kernel, y = x + 1, as a tuner compiles it."""
    from tvm import te

    x = te.placeholder((64, 64), name="x")
    y = te.compute((64, 64), lambda i, j: x[i, j] + 1.0, name="y")
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    function = te.create_prim_func([x, y]).with_attr("global_symbol", "main")
    tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))
    return path


ARGUMENTS = [((64, 64), "float32")] * 2


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


def test_what_a_board_cannot_run_is_refused_before_it_is_built(servers, built, tmp_path, monkeypatch):
    farm, graph = servers.farm(), built[0]
    other = {"aarch64": "x86_64", "x86_64": "aarch64"}[platform.machine()]
    monkeypatch.setattr("edgecompile.targets.tvm.options.require_linker", lambda _: None)
    with pytest.raises(EnvironmentMissing, match="of another kind") as caught:
        rpc.RpcTarget(farm).build(graph, tmp_path, {"mtriple": f"{other}-linux-gnu"})
    assert other in caught.value.why and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="arch=sm_87"):
        farm.fitted({"arch": "sm_87"})
    with pytest.raises(InputError, match="--tune does not go with"):
        farm.fitted({"tune": "10m"})
    # A server without a compiler tells nothing: the CPU must be named, and then it is taken on trust.
    silent = rpc.Facts(cpus=4, cores=4)
    monkeypatch.setattr(farm, "facts", lambda: silent)
    with pytest.raises(EnvironmentMissing, match="do not tell their CPU"):
        farm.fitted({})
    assert farm.fitted({"mcpu": "cortex-a76", "mtriple": "aarch64-linux-gnu"})["threads"] == 4


def test_one_of_two_boards_is_killed_midway(library, built, by_key):
    """Work under way starts over on the other one; when that is killed too, none is left."""
    _, engine, _, feeds, reference = built
    servers = by_key["killed"]
    farm = servers.farm()
    first = farm.link().name
    started = []

    def work(link):
        started.append(link.name)
        if len(started) == 1:
            threading.Timer(0.2, lambda: servers.kill(port(link.name))).start()
        return link.seconds(library, ARGUMENTS, 2, 400)  # 0.8 s or more

    assert 0 < farm.run(work) < 1e-3
    assert started[0] == first and len(set(started)) == 2
    assert len(servers.said) == 1 and f"{first} was lost" in servers.said[0]
    assert farm.losses == servers.said and servers.said[0] in farm.notes[1]
    # The very same again, of an engine: what it opened on the lost board is opened on the other one.
    again = rpc.RpcEngine(engine.manifest, farm, engine._library, engine._graph)
    assert error(reference, again.run(feeds)) < 1e-5
    servers.kill(*servers.groups)
    with pytest.raises(EnvironmentMissing, match="is left") as caught:
        again.run(feeds)
    assert "rpc_server --tracker" in caught.value.fix and caught.value.exit_code == 4


def port(name: str) -> int:
    return int(name.rpartition(":")[2])


def test_tuning_goes_on_when_a_board_is_killed(library, by_key, tmp_path):
    servers = by_key["tuned"]
    with rpc.RpcRunner(servers.address, repeats=2, least_ms=60, say=servers.said.append) as runner:
        assert runner.boards == 2
        given = [runner.submit(library, ARGUMENTS) for _ in range(6)]
        bad = runner.submit(tmp_path / "none.so", ARGUMENTS)
        given[0].result(20)
        servers.kill(next(iter(servers.groups)))
        assert all(0 < future.result(30) < 1e-3 for future in given)
        with pytest.raises(InputError, match=r"none\.so"):
            bad.result(20)
        assert sum("was lost" in text for text in servers.said) == 1
        servers.kill(*servers.groups)
        with pytest.raises(EnvironmentMissing, match="no board"):
            runner.submit(library, ARGUMENTS).result(20)


def test_a_kernel_that_fails_is_not_a_lost_board(servers, library):
    farm = servers.farm()
    with pytest.raises(InputError, match="cannot do this"):
        farm.run(lambda link: link.seconds(library, [((3, 3), "float32")] * 2, 1, 0))
    assert not farm.losses


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
        rpc.RpcRunner(nobody)


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
    shown = CliRunner().invoke(main, ["bench", str(made), "--device", device, "--seconds", "0.1", "--json"])
    assert shown.exit_code == 0, shown.output
    result = bench.BenchResult.from_json(json.loads(shown.output[shown.output.index("{") :]))
    assert result.timing.clock == "wall" and len(result.timing.sessions) >= 6 and result.machine["features"]
    assert 1e-6 < result.timing.p50 < 1e-2
    assert result.memory is None and any("network" in note for note in result.notes)
    with remote.open_board(device) as board:
        opened = bundle.Bundle.open(made)
        assert error(opened.probe()[1], board.outputs(board.add(made))) < 1e-5
        with pytest.raises(InputError, match="layers"):
            bench.layers(opened, opened.probe()[0], board=board)


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
