"""Tuning: what it finds is faster and the same function, nothing is measured twice, and nothing gets slower."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle, registry
from edgecompile.errors import InputError
from edgecompile.graph import Graph, named
from edgecompile.target import EngineManifest
from edgecompile.targets.tvm import ENGINE, TvmTarget, lower, options, tune
from edgecompile.targets.tvm.engine import TvmEngine, stamps
from edgecompile.targets.tvm.schedules import conv, dense, tile, transposed, winograd
from edgecompile.targets.tvm.schedules.tile import Choice

tvm = pytest.importorskip("tvm")
SMALL = {"size": (None, 4, 0), "rows_outside": (False,), "steps": (4,), "rank": (0,)}


def network(channels: int = 64) -> Graph:
    """A convolution that Winograd's algorithm makes much faster."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((channels, channels, 3, 3)) / 8).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="/relu"),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, channels, 32, 32]) for n in "xy"]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A cache of its own, few choices, and a short comparison."""
    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SPACE", SMALL)
    monkeypatch.setattr(tune, "SESSIONS", 6)
    monkeypatch.setattr(tune, "COMPARED_SECONDS", 0.3)
    monkeypatch.setattr(tune, "_CONFIRMATIONS", 1)


@pytest.fixture
def timid(monkeypatch):
    """A cost model that never takes Winograd's algorithm, which leaves tuning something to find."""
    monkeypatch.setattr(winograd, "_GAIN", 0.0)
    winograd.choose.cache_clear()
    yield
    winograd.choose.cache_clear()


def build(folder: Path, say=lambda _: None, **given):
    folder.mkdir()
    return TvmTarget().build(network(), folder, {"threads": 1, **given}, say)


def recorded(folder: Path) -> Counter:
    """How often each workload and trace was recorded."""
    rows = map(json.loads, (folder / tune.RECORDS).read_text().splitlines())
    return Counter(json.dumps([row[0], row[1][0][1]]) for row in rows)


def cache(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache" / "tuning").iterdir()
    return folder


def test_finds_what_is_faster_and_keeps_it(timid, tmp_path, monkeypatch):
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):

        def interrupt(text: str) -> None:
            if text.startswith("tuning: round 2"):
                raise KeyboardInterrupt

        build(tmp_path / "interrupted", interrupt, tune="5m")
    assert len(recorded(cache(tmp_path))) == 2  # as it was, and one trial

    engine = build(tmp_path / "tuned", said.append, tune="5m")
    assert set(recorded(cache(tmp_path)).values()) == {1}  # nothing is measured twice
    assert len(recorded(cache(tmp_path))) > 2
    facts = json.loads((tmp_path / "tuned" / tune.FACTS).read_text())
    assert facts["ratio"]["high"] < 1
    (kernel,) = facts["kernels"]
    assert kernel["choice"]["size"] == 4 and kernel["tuned_us"] < kernel["untuned_us"]
    assert set(tune.FILES) < set(engine.manifest.files)
    assert any(text.endswith("100%") for text in said) and any("kernels take" in text for text in said)
    assert engine.manifest.options["tune"] == "5m"

    feeds = oracle.random_feeds(network().signature().inputs)
    wanted = oracle.run(network(), feeds)
    assert max(e.max_rel for e in oracle.compare_all(wanted, engine.run(feeds)).values()) < 1e-5

    def never(*_, **__):
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(tune, "spent", never)
    again = TvmTarget().load(tmp_path / "tuned", engine.manifest, network())
    np.testing.assert_array_equal(again.run(feeds)["y"], engine.run(feeds)["y"])
    monkeypatch.setattr(tune.Here, "compare", never)
    made = build(tmp_path / "made", tuning=str(tmp_path / "tuned"))
    np.testing.assert_array_equal(made.run(feeds)["y"], engine.run(feeds)["y"])
    assert "winograd" in symbols(tmp_path / "made") and set(tune.FILES) < set(made.manifest.files)
    plain = build(tmp_path / "plain")  # a build that does not ask for tuning knows nothing of it
    assert "winograd" not in symbols(tmp_path / "plain") and not set(tune.FILES) & set(plain.manifest.files)


def symbols(folder: Path) -> str:
    return str([row["symbol"] for row in json.loads((folder / "kernels.json").read_text())])


def test_a_runner_that_lies_makes_nothing_slower(monkeypatch, tmp_path):
    monkeypatch.setitem(SMALL, "size", (None, 0))

    class Lying(tune.Here):
        def run(self, made: tune.Compiled) -> list[tuple[str, float]]:
            return [(k["symbol"], 1e-3 if "winograd" in k["symbol"] else 0.5e-3) for k in made.kernels]

    chosen = options.parse({"threads": 1, "tune": "5m"})
    said: list[str] = []
    graph, path = named(network()), tmp_path / ENGINE

    def opened(library, kernels) -> TvmEngine:
        manifest = EngineManifest("tvm", (ENGINE,), {}, options.device(chosen))
        return TvmEngine(manifest, chosen, library, graph, kernels)

    tuned = tune.build(graph, chosen, path, lambda: Lying(graph, chosen, opened), said.append)
    kernels, files = tuned.kernels, tuned.files
    assert tuned.note == "tuning found nothing that is faster for certain"
    assert "winograd" in str(kernels) and files == ()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [ENGINE]
    assert "untuned engine is kept" in said[-1]
    assert any("kernels take 0.5" in text for text in said)  # it was believed until the model itself was timed


def one_of_each() -> Graph:
    """A kernel of every family that leaves a choice, none of whose extents a tile divides."""
    rng = np.random.default_rng(0)
    shapes = {"a": (20, 5, 3, 3), "b": (20, 1, 5, 5), "c": (36, 20, 1, 1), "d": (36, 7, 4, 4), "e": (11, 13)}
    weights = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["v0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["v0"], ["v1"]),
        helper.make_node("Conv", ["v1", "b"], ["v2"], pads=[2, 2, 2, 2], group=20),
        helper.make_node("Conv", ["v2", "c"], ["v3"]),
        helper.make_node("Relu", ["v3"], ["v4"]),
        helper.make_node("ConvTranspose", ["v4", "d"], ["v5"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["v5", "e"], ["y"]),
    ]
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 11, 11]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 7, 22, 13]),
    ]
    weights["e"] = np.concatenate([weights["e"]] * 2)
    made = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return named(Graph.from_proto(model))


@pytest.mark.parametrize(
    "choice",
    [
        Choice(rank=2, size=2, steps=1, rows_outside=True),
        pytest.param(Choice(rank=11, size=4, steps=16), marks=pytest.mark.slow),
    ],
)
def test_every_choice_computes_the_same_and_only_what_changed_is_compiled(choice, monkeypatch):
    chosen, graph = options.parse({"threads": 1}), one_of_each()
    feeds, forms = oracle.random_feeds(graph.signature().inputs), {}
    wanted, module = oracle.run(graph, feeds), lower.folded(graph, chosen)
    asked: list[str] = []

    def plainly(kernel) -> Choice:
        asked.append(kernel.call.op.name)
        return Choice()

    def made_of(pick) -> set[str]:
        made = lower.varied(plain, module, chosen, pick, forms)
        machine = tvm.relax.VirtualMachine(made.linked, tvm.cpu())
        arguments = [tvm.runtime.tensor(value) for value in (*feeds.values(), stamps(len(made.kernels)))]
        times, y = machine[lower.TIMED](*arguments)
        assert max(e.max_rel for e in oracle.compare_all(wanted, {"y": y.numpy()}).values()) < 1e-5
        assert (np.diff(times.numpy() @ np.array([10**9, 1])) >= 0).all()
        assert [kernel["symbol"] for kernel in made.kernels if "origin" not in kernel] == ["transpose", "transpose1"]
        assert sum("origin" in kernel for kernel in made.kernels) == 5
        return {kernel["symbol"] for kernel in made.kernels}

    plain = lower.compiled(module, graph, chosen, plainly, forms)
    before = {kernel["symbol"] for kernel in plain.kernels}
    assert len(asked) == sum("origin" in kernel for kernel in plain.kernels) == 5
    assert len(made_of(lambda _: choice) - before) == 5
    (other,) = made_of(lambda k: Choice(rank=1) if k.call.op.name == "relax.matmul" else Choice()) - before
    assert "matmul" in other

    def never(*_, **__):
        raise AssertionError("no weights may be packed")

    for family in (conv, dense, transposed, winograd):
        monkeypatch.setattr(family, "pack", never)
    assert made_of(plainly) == before
    forms = {}
    with pytest.raises(InputError, match="no weights may be packed"):
        made_of(plainly)


def kernel_of(graph: Graph, chosen) -> tune.Kernel:
    """The only kernel of a graph that leaves a choice."""
    kernels: list[tune.Kernel] = []
    with lower._compiling(chosen):
        lower._loops(lower.folded(named(graph), chosen), chosen, lambda kernel: kernels.append(kernel) or Choice())
    (kernel,) = kernels
    return kernel


def test_records_hold_for_one_kind_of_machine_and_survive_what_can_happen(tmp_path):
    chosen, folder = options.parse({"threads": 1}), tmp_path / "records"
    kernel = kernel_of(network(16), chosen)
    known = {Choice(): 2e-3, Choice(size=4): 1e-3}
    records = tune.Records(folder, chosen)
    assert records.of(kernel) == {}
    for choice, seconds in known.items():
        records.add(kernel, choice, seconds)
    assert tune.Records(folder, chosen, write=False).of(kernel) == pytest.approx(known)

    two = options.parse({"threads": 2})
    assert len({tune.cache_folder(two), tune.cache_folder(chosen), tune.cache_folder(chosen, "pi5")}) == 3
    with pytest.raises(InputError, match="threads is 2, theirs 1"):
        tune.Records(folder, two, write=False)
    assert tune.Records(folder, two).of(kernel) == {}  # even where both are in one file

    with open(folder / tune.RECORDS, "a") as file:
        file.write('[0,[[["Samp')  # killed while it wrote
    assert tune.Records(folder, chosen).of(kernel) == pytest.approx(known)
    with open(folder / tune.RECORDS, "a") as file:
        file.write("nonsense\n")
    with pytest.raises(InputError, match=r"no tuning records that can be read.*remove"):
        tune.Records(folder, chosen)
    with pytest.raises(InputError, match="holds no tuning records"):
        tune.Records(tmp_path / "none", chosen, write=False)


def test_one_search_at_a_time(tmp_path):
    chosen = options.parse({"threads": 1, "tune": "1s"})
    with tune._alone_in(tune.cache_folder(chosen)), pytest.raises(InputError, match="another search"):
        graph = named(network())
        runner = tune.Here(graph, chosen, lambda *_: pytest.fail("never opened"))
        tune.build(graph, chosen, tmp_path / ENGINE, lambda: runner)


def test_neighbours_differ_in_one_respect_from_the_fastest(monkeypatch):
    class Call:
        class op:
            name = "relax.nn.conv2d"

    space = {"size": (None, 4), "rows_outside": (False, True), "steps": (4,), "rank": (0, 1)}
    monkeypatch.setattr(tune, "SPACE", space)
    task = tune.Task(tune.Kernel(Call, None, options.parse({"threads": 1}), tile.Vectors(16, 32)))
    tried = []
    while (choice := task.next()) is not None:
        tried.append(choice)
        task.known[choice] = 1.0 if choice == Choice(size=4) else 2.0
    four = Choice(size=4)
    assert tried == [Choice(), four, replace(four, rows_outside=True), replace(four, rank=1)]
    assert task.best == Choice(size=4)
    task.known = {Choice(): 1.0, Choice(size=4): 0.99}
    assert task.best == Choice()  # that is noise
    Call.op.name = "relax.matmul"
    assert task.next() == Choice(size=4, rows_outside=True)  # the size of a tile is tried for convolutions only


def numbered(seconds) -> tune.Tasks:
    """Kernels that have a number, of which nothing is recorded."""

    class Call:
        class op:
            name = "relax.matmul"

    @dataclass(frozen=True)
    class Numbered(tune.Kernel):
        origin: int = 0

    class Nothing:
        def of(self, _) -> dict:
            return {}

        def add(self, *_) -> None:
            pass

    tasks = tune.Tasks(Nothing())
    for origin, one in enumerate(seconds):
        tasks.add(Numbered(Call, None, options.parse({"threads": 1}), tile.Vectors(16, 32), origin))
        tasks.learn(origin, Choice(), one)
    return tasks


def test_what_takes_most_is_tried_most(monkeypatch):
    monkeypatch.setattr(tune, "_TOGETHER", 2)
    monkeypatch.setattr(tune, "SPACE", {**SMALL, "rank": tuple(range(12))})
    tasks, tried = numbered((1e-3, 8e-3, 3e-3, 1e-6)), Counter()
    rounds = []
    while trials := tasks.trials():
        rounds.append(set(trials))
        for origin, choice in trials.items():
            tasks.learn(origin, choice, 1.0)
            tried[origin] += 1
    assert rounds[:2] == [{1, 2}] * 2 and 1 in rounds[2] and {0, 1} in rounds
    assert tried == {0: 11, 1: 11, 2: 11}  # and what takes nothing is not tried at all
    assert tasks.tried == 33


def test_what_is_being_measured_is_not_tried_a_second_time(monkeypatch):
    monkeypatch.setattr(tune, "SPACE", {**SMALL, "size": (None,), "rank": (0, 1, 2)})
    tasks = numbered((1e-3, 2e-3))
    rounds = []
    while trials := tasks.trials():  # none of which is done before all have begun
        tasks.begin(trials)
        rounds.append(trials)
    assert [set(trials) for trials in rounds] == [{0, 1}] * 2
    assert rounds[0][0] == Choice(rank=1) and rounds[1][0] == Choice(rank=2)
    for origin, choice in rounds[1].items():
        tasks.learn(origin, choice, 1.0)
    assert not tasks.trials()  # the first round is still under way
    (task, _) = tasks.all
    assert task.trying == {Choice(rank=1)} and set(task.known) == {Choice(), Choice(rank=2)}


def test_time_that_is_too_short_is_not_exceeded(tmp_path):
    said: list[str] = []
    build(tmp_path / "hurried", said.append, tune="0.5s")
    assert any("leaves no time to search" in text for text in said)
    assert not (tmp_path / "hurried" / tune.FACTS).exists()
    facts = json.loads((cache(tmp_path) / tune.FACTS).read_text())
    assert (facts["rounds"], facts["trials"]) == (0, 0) and len(facts["kernels"]) == 1
    assert (cache(tmp_path) / tune.RECORDS).read_text() == ""


@pytest.mark.parametrize(
    "given, why",
    [
        ({"tune": "soon"}, "not a duration"),
        ({"tune": "-1s"}, "not a duration"),
        ({"tune": "1m", "tuning": "x"}, "cannot both"),
        ({"tune": "1m", "schedules": "no"}, "nothing to choose"),
        ({"tuning": "x", "arch": "sm_87"}, "nothing to choose"),
    ],
)
def test_refuses_options(given, why):
    with pytest.raises(InputError, match=why):
        options.parse(given)
    assert options.parse({"tune": "10m"}).tune == 600 and options.parse({"tune": "0s"}).tune == 0
    assert options.parse({}).tune is None


def test_refuses_to_time_what_runs_elsewhere(tmp_path):
    other = "x86_64" if platform.machine() == "aarch64" else "aarch64"
    given = {"mtriple": f"{other}-linux-gnu", "mcpu": "generic", "linker": sys.executable, "tune": "1m"}
    with pytest.raises(InputError, match="cannot be timed here"):
        build(tmp_path / "x", **given)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgecompile", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_command_line_refuses_targets_that_cannot_tune(tmp_path):
    network(8).save(tmp_path / "net.onnx")
    done = command("build", "net.onnx", "--target", "ort", "--tune", "10m", cwd=tmp_path)
    assert done.returncode == 2 and "cannot tune" in done.stderr and "--target tvm" in done.stderr
    done = command("build", "net.onnx", "--target", "tvm", "--tune", "soon", cwd=tmp_path)
    assert done.returncode == 2 and "--tune" in done.stderr
    assert "tune" in registry.target("tvm").options and "tune" not in registry.target("ort").options


@pytest.mark.slow
def test_build_by_a_configuration_file(tmp_path):
    network().save(tmp_path / "net.onnx")
    (tmp_path / "edgecompile.toml").write_text('version = 1\n[build]\ntarget = "tvm"\ntune = "20s"\n')
    done = command("build", "net.onnx", "--config", "edgecompile.toml", "--option", "threads=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tuning: round 1" in done.stderr
    manifest = json.loads((tmp_path / "build" / "net" / "manifest.json").read_text())
    assert manifest["engine"]["options"]["tune"] == "20s"
