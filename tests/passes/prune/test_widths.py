"""Widths on targets whose times follow a formula, so that what the search should find is known; and on a real one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from networks import chain

from edgecompile import measure
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.measure import Samples
from edgecompile.passes.prune import losses, scores, widths
from edgecompile.passes.prune.dependency import groups
from edgecompile.sensitivity import Memo


class Formula:
    """A target on which a layer takes a microsecond per 1000 multiply-accumulates, channels rounded up to a block.

    Args:
        block: channels that are computed at once.
        overhead: seconds of every call, whatever it computes.
        free: layers with this many inputs take the same time at any width.
    """

    def __init__(self, block: int = 1, overhead: float = 0.0, free: int = 0):
        self.block, self.overhead, self.free, self.calls = block, overhead, free, 0
        self.facts = {"target": f"formula {block} {overhead} {free}"}

    def __call__(self, graphs, seconds: float, sessions: int) -> list[Samples]:
        self.calls += 1
        rng = np.random.default_rng(self.calls)
        made = []
        for number, graph in enumerate(graphs):
            times = self.seconds(graph) * (1 + 0.002 * rng.standard_normal(60))
            session = np.repeat(np.arange(sessions), 60 // sessions)[:60]
            made.append(Samples(str(number), "thread_cpu", times[: len(session)], 1, np.arange(len(session)), 0.0,
                                (0.0, 0.0), sessions=session))  # fmt: skip
        return made

    def seconds(self, graph: Graph) -> float:
        total = self.overhead
        for node in graph.nodes:
            if node.op in ("Conv", "Gemm"):
                shape = list(node.inputs[1].shape)
                if self.free and shape[1] <= self.free:
                    total += 1e-4
                    continue
                shape[0] = math.ceil(shape[0] / self.block) * self.block
                total += math.prod(shape) * 1e-9 * (144 if node.op == "Conv" else 1)
        return total


def memo() -> Memo:
    return Memo(None, {})


def table_of(graph: Graph, timer: Formula, align: int = 4):
    found = groups(graph)
    choices = widths.candidates(found, graph, align)
    return found, choices, widths.table(graph, found, timer, memo(), choices=choices)


def test_candidates_leave_multiples_and_the_whole():
    graph = chain()
    found = widths.candidates(groups(graph), graph, 8)
    assert found == {"a": [16, 8], "b": [24, 16, 8], "c": [16, 8]}
    assert widths.candidates(groups(graph), graph, 1)["a"] == list(range(16, 0, -1))
    # 16 channels are narrow for multiples of 32, so a half, a quarter .. of it serves.
    assert widths.candidates(groups(graph), graph, 32) == {"a": [16, 8], "b": [24, 16, 8], "c": [16, 8]}


def test_the_units_that_stay_are_the_most_important_in_their_order():
    given = {"a": np.array([1.0, 5.0, 3.0, 4.0]), "b": np.ones(3)}
    kept = widths.keep(given, {"a": 2, "b": 3})
    assert {n: v.tolist() for n, v in kept.items()} == {"a": [1, 3]}


def test_the_table_predicts_a_target_that_counts_multiplications():
    graph, timer = chain(), Formula()
    found, _, table = table_of(graph, timer)
    given = {"a": 8, "b": 12, "c": 8}
    cut = graph.copy()
    found.cut(cut, {n: range(w) for n, w in given.items()})
    assert table.total(given) == pytest.approx(timer.seconds(cut), rel=0.02)
    assert table.total({g.name: g.units for g in found.prunable}) == pytest.approx(timer.seconds(graph), rel=0.02)
    assert abs(table.total(given) / table.total({}) - 1) > 0.3


def test_equal_layers_are_timed_once(tmp_path):
    graph, timer = chain(), Formula()
    found = groups(graph)
    choices = widths.candidates(found, graph, 8)
    for expected in (len([n for n in graph.nodes if n.op in ("Conv", "Gemm")]), 0):
        before = timer.calls
        with Memo(tmp_path, timer.facts) as known:
            widths.table(graph, found, timer, known, choices=choices)
        assert timer.calls - before == expected
    with Memo(tmp_path, {"target": "another"}) as known:
        widths.table(graph, found, timer, known, choices=choices)
    assert timer.calls - before > 0


def test_what_is_not_timed_is_estimated():
    graph, timer = chain(), Formula()
    found = groups(graph)
    choices = widths.candidates(found, graph, 8)
    table = widths.table(graph, found, timer, memo(), choices=choices, seconds=0)
    assert timer.calls == 1 and len(table.estimated) == 4
    assert all(s > 0 for s in table.seconds.values())


@pytest.mark.parametrize("block", [8, 16, 32])
def test_the_alignment_is_the_block_of_the_target(block: int):
    rng = np.random.default_rng(0)
    graph = chain()
    for name, shape in {"a.w": (128, 3, 3, 3), "a.b": (128,), "b.w": (24, 128, 1, 1)}.items():
        for node in graph.nodes:
            for slot, tensor in enumerate(node.inputs):
                if tensor.name == name:
                    node.inputs[slot] = graph.new_constant(name, rng.standard_normal(shape).astype(np.float32))
    for tensor in graph.tensors().values():
        if tensor.name in ("a", "ar"):
            tensor.shape = None
    found = groups(graph)
    assert widths.alignment(graph, found, Formula(block), memo()) == block


def test_the_path_starts_with_what_saves_most_for_its_importance():
    graph, timer = chain(), Formula()
    found, choices, table = table_of(graph, timer)
    importance = scores.magnitude(graph, found)
    importance["b"][:12] = 1e-6  # half of b matters to nobody
    way = widths.path(found, importance, choices, table)
    assert [name for name, _ in way.steps[: way.steps.index(("b", 12)) + 1]] in (["b"], ["b"] * 2, ["b"] * 3)
    assert all(x > y for x, y in itertools.pairwise((1.0, *way.costs)))
    assert way.at(1.0) == way.full
    assert way.at(0.0) == way.states()[-1] != way.full
    importance["b"][:] = 1
    assert {name for name, _ in widths.path(found, importance, choices, table).steps[:6]} > {"b"}


def test_a_group_that_matters_more_is_cut_later():
    graph, timer = chain(), Formula()
    found, choices, table = table_of(graph, timer)
    importance = scores.magnitude(graph, found)
    plain = widths.path(found, importance, choices, table)
    first = plain.steps[0][0]
    lost = dict(losses.of_importance(importance))
    assert widths.path(found, importance, choices, table, losses=lost) == plain
    lost[first] = lost[first] * 1e4
    assert widths.path(found, importance, choices, table, losses=lost).steps[0][0] != first


def test_of_steps_about_as_good_the_path_takes_the_smallest():
    graph, timer = chain(), Formula()
    found, choices, table = table_of(graph, timer)
    importance = scores.magnitude(graph, found)
    even = {g.name: np.linspace(1.0, 0.0, g.units + 1) for g in found.prunable}  # each unit costs the same

    def jumps(lost) -> list[int]:
        states = widths.path(found, importance, choices, table, losses=lost).states()
        return [sum(a.values()) - sum(b.values()) for a, b in itertools.pairwise(states)]

    assert set(jumps(even)) <= {2, 4}
    steep = {name: np.minimum(values * 100, 1.0) for name, values in even.items()}  # the first unit costs all
    assert max(jumps(steep)) > 4


def test_the_greedy_choice_is_close_to_the_best_of_all():
    graph, timer = chain(), Formula()
    found, choices, table = table_of(graph, timer)
    importance = scores.magnitude(graph, found)
    way, whole = widths.path(found, importance, choices, table), table.total({})

    def kept(given) -> float:
        return scores.share_kept(importance, widths.keep(importance, given))

    for share in (0.8, 0.6, 0.4):
        every = (dict(zip(choices, w, strict=True)) for w in itertools.product(*choices.values()))
        best = max(kept(w) for w in every if table.total(w) <= share * whole)
        found_widths = way.at(share)
        assert table.total(found_widths) <= share * whole * 1.001
        assert kept(found_widths) >= 0.6 * best
        assert kept({n: min(c) for n, c in choices.items()}) < 0.6 * best


@pytest.mark.parametrize("target", [0.8, 0.6])
def test_the_latency_is_met_on_a_target_that_the_table_does_not_know(target: float):
    graph = chain()
    found, choices, table = table_of(graph, Formula(), align=1)
    importance = scores.magnitude(graph, found)
    way = widths.path(found, importance, choices, table)
    slow = Formula(overhead=2e-4)  # the runtime takes longer than the sum of the layers
    made = widths.fit(graph, found, importance, way, target, slow)
    assert target * 0.95 <= made.ratio.value <= target * 1.02
    # The table alone would have promised too much.
    first = widths.against(graph, found, widths.keep(importance, way.at(target)), slow, 1.0)
    assert first.value > target * 1.05


def test_a_latency_out_of_reach_is_refused():
    graph = chain()
    found, choices, table = table_of(graph, Formula(), align=8)
    importance = scores.magnitude(graph, found)
    way = widths.path(found, importance, choices, table)
    with pytest.raises(InputError, match=r"cannot be cut to 0\.3"):
        widths.fit(graph, found, importance, way, 0.3, Formula(overhead=1.0))


def test_a_cut_that_does_not_pay_is_found_out():
    graph, importance = chain(), scores.magnitude(chain(), groups(chain()))
    found = groups(graph)
    given = {"a": 8, "b": 24, "c": 12}
    assert widths.unpaid(graph, found, importance, given, Formula(), memo()) == []
    # In blocks of 16, 12 channels cost what 16 do; their readers, a matrix of 16 columns, take any time.
    assert widths.unpaid(graph, found, importance, given, Formula(block=16, free=16), memo()) == ["a", "c"]


def test_the_parameters_are_met_exactly():
    graph = chain()
    found = groups(graph)
    importance = scores.magnitude(graph, found)
    choices = widths.candidates(found, graph, 1)
    way = widths.by_parameters(graph, found, importance, choices)
    total = sum(v.size for v in graph.constants().values() if v.dtype.kind == "f")
    for share in (0.9, 0.7, 0.4):
        cut = graph.copy()
        found.cut(cut, widths.keep(importance, widths.fit_parameters(graph, found, importance, way, share)))
        left = sum(v.size for v in cut.constants().values() if v.dtype.kind == "f") / total
        assert share - 0.1 < left <= share
    with pytest.raises(InputError, match=r"parameters cannot be cut to 0\.001"):
        widths.fit_parameters(graph, found, importance, way, 0.001)


def test_layers_are_timed_on_onnx_runtime(tmp_path):
    ort = pytest.importorskip("onnxruntime")

    class Runtime:
        def __init__(self):
            self.facts = {"target": "ort", "version": ort.__version__}

        def __call__(self, graphs, seconds, sessions):
            calls = {}
            for number, graph in enumerate(graphs):
                session = ort.InferenceSession(graph.to_proto().SerializeToString())
                feeds = {t.name: np.zeros(t.shape, np.float32) for t in graph.inputs}
                calls[str(number)] = lambda s=session, f=feeds: s.run(None, f)
            return list(measure.interleave(calls, "thread_cpu", seconds=0.01).values())

    graph = chain()
    found = groups(graph)
    table = widths.table(graph, found, Runtime(), memo(), choices=widths.candidates(found, graph, 8))
    assert set(table.seconds) == {"a", "b", "d", "c", "y"}
    assert all(0 < s < 1 for s in table.seconds.values())
    assert set(table.shares["b"]) == {"a", "b"} and table.share("b", "a", 16) == 1
