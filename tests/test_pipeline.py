"""Specs, verification, roll-back and bisection, with passes that are wrong on purpose."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from edgecompile import oracle, pipeline, registry
from edgecompile.errors import InputError, PassError
from edgecompile.graph import Graph
from edgecompile.pipeline import Context, Drop, Pass, PassResult, Pipeline

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N,4,6,6] x) => (float[N,6] y, float[N,6,4,4] z) {
    c = Conv(x, w, b)
    n = BatchNormalization<epsilon=0.1>(c, gamma, beta, mean, var)
    z = Relu(n)
    p = AveragePool<kernel_shape=[4,4]>(z)
    f = Flatten(p)
    y = Softmax<axis=1>(f)
}"""


def network() -> Graph:
    rng = np.random.default_rng(5)
    graph = Graph.from_proto(parser.parse_model(MODEL))
    shapes = {"w": (6, 4, 3, 3), "b": (6,), "gamma": (6,), "beta": (6,), "mean": (6,), "var": (6,)}
    for name, tensor in graph.tensors().items():
        if name in shapes:
            values = rng.uniform(0.5, 1.5, shapes[name]) * (1 if name == "var" else rng.choice([-1, 1], shapes[name]))
            tensor.to_constant(values.astype(np.float32))
    return graph


@dataclass(frozen=True)
class Rename(Pass):
    """Gives Relu nodes a new name: harmless, one rewrite each."""

    name: ClassVar[str] = "rename"
    suffix: str = "_renamed"
    times: int = 3

    def run(self, graph: Graph, context: Context) -> PassResult:
        for _ in range(self.times):
            for node in graph.nodes:
                if node.op == "Relu" and context.rewrite("rename", node):
                    node.name += self.suffix
        context.note("nothing else has a Relu", "")
        return context.result()


def wrong(name: str, damage, op: str, exact: bool = True) -> type[Pass]:
    """A pass that harmlessly renames three nodes, then applies ``damage`` to the node ``op``, then renames again."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in list(graph.nodes):
            if context.rewrite("rename", node):
                node.name += "_x"
            if node.op == op and context.rewrite("damage", node):
                damage(graph, node)
        return context.result()

    cls = type(name, (Pass,), {"name": name, "exact": exact, "run": run, "__doc__": "Wrong on purpose."})
    return dataclass(frozen=True)(cls)


def _swap_axis(graph, node):
    node.attrs["axis"] = 0


def _drop_bias(graph, node):
    del node.inputs[2]


def _shift_padding(graph, node):
    node.attrs.update(pads=[1, 0, 0, 0], kernel_shape=[3, 3])
    node.inputs[1] = graph.new_constant("w2", np.ascontiguousarray(graph.constant(node.inputs[1])[:, :, :, :]))
    # one row more above and one less below keeps the shape and moves the picture
    crop = graph.insert("Slice", [node.outputs[0]], replaces=[node])
    crop.inputs += [graph.new_constant(n, np.array([v], np.int64)) for n, v in (("s", 0), ("e", 4), ("a", 2))]
    for consumer in [n for n in node.outputs[0].outputs if n is not crop]:
        consumer.inputs[0] = crop.outputs[0]


def _wrong_eps(graph, node):
    node.attrs["epsilon"] = 0.1001


def _lose_output(graph, node):
    graph.outputs = graph.outputs[:1]


def _raise(graph, node):
    raise KeyError("no such thing")


def _dangle(graph, node):
    node.inputs[0] = gs.Variable("nowhere", np.float32, None)


def _change_type(graph, node):
    graph.outputs[1].dtype = np.float64


WRONG = {
    "swapped_axis": (_swap_axis, "Softmax"),
    "dropped_bias": (_drop_bias, "Conv"),
    "off_by_one_padding": (_shift_padding, "Conv"),
    "wrong_eps": (_wrong_eps, "BatchNormalization"),
    "lost_output": (_lose_output, "Relu"),
    "raises": (_raise, "Relu"),
    "dangling": (_dangle, "Relu"),
    "changed_type": (_change_type, "Relu"),
}


@pytest.fixture(params=WRONG)
def wrong_pass(request, monkeypatch) -> Pass:
    damage, op = WRONG[request.param]
    cls = wrong(request.param, damage, op)
    module = type(sys)("wrong_passes")
    setattr(module, request.param, cls)
    monkeypatch.setitem(sys.modules, "wrong_passes", module)
    monkeypatch.setitem(registry.PASSES, request.param, f"wrong_passes:{request.param}")
    return Pipeline.parse(request.param).passes[0]


@pytest.fixture
def rename(monkeypatch):
    monkeypatch.setitem(registry.PASSES, "rename", f"{__name__}:Rename")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Rename.__module__])


def test_wrong_passes_are_caught_and_rolled_back(wrong_pass):
    graph = network()
    before = graph.digest()
    trace = Pipeline((Rename(), wrong_pass, Rename("_again"))).run(graph)
    statuses = [bool(s.failure) for s in trace.steps]
    assert statuses == [False, True, False]
    assert trace.steps[1].rewrites == () and trace.failures == (trace.steps[1],)
    assert [r.number for r in trace.rewrites] == [1, 2, 3, 4, 5, 6], "numbers of a rolled-back pass are used again"
    undone = network()
    Pipeline((Rename(), Rename("_again"))).run(undone)
    assert graph.digest() == undone.digest() != before


def test_strict_stops_and_names_the_pass_and_those_before(wrong_pass):
    with pytest.raises(PassError) as caught:
        Pipeline((Rename(), wrong_pass)).run(network(), strict=True)
    assert wrong_pass.name in caught.value.what and "passes before it: rename" in caught.value.why


def test_bisect_names_the_single_rewrite(wrong_pass):
    culprit = pipeline.bisect(network(), Pipeline((Rename(), wrong_pass, Rename())))
    assert culprit is not None
    assert culprit.rewrite.pass_name == wrong_pass.name and culprit.rewrite.what == "damage"
    graph = network()
    assert not Pipeline((Rename(), wrong_pass)).run(graph, limit=culprit.rewrite.number - 1).failures
    assert Pipeline((Rename(), wrong_pass)).run(graph, limit=culprit.rewrite.number).failures


def test_bisect_finds_nothing_in_a_right_pipeline():
    assert pipeline.bisect(network(), Pipeline((Rename(), Rename()))) is None


def test_bisect_sees_changes_that_are_not_numbered():
    @dataclass(frozen=True)
    class Sneaky(Pass):
        name: ClassVar[str] = "sneaky"

        def run(self, graph, context):
            _wrong_eps(graph, next(n for n in graph.nodes if n.op == "BatchNormalization"))
            return context.result()

    trace = Pipeline((Sneaky(),)).run(network())
    assert trace.failures
    culprit = pipeline.bisect(network(), Pipeline((Rename(), Sneaky())))
    assert culprit is not None and culprit.rewrite.pass_name == "sneaky" and "not a numbered" in culprit.rewrite.what


def test_a_right_pass_is_kept_with_its_notes_and_figures():
    graph = network()
    (step,) = Pipeline((Rename(times=1),)).run(graph).steps
    assert not step.failure and not step.unverified and len(step.rewrites) == 1
    assert [str(n) for n in step.notes] == ["nothing else has a Relu"]
    assert step.errors is not None and all(e.max_abs == 0 for e in step.errors.values())
    assert step.before == step.after and step.before.nodes == 6
    assert step.before.macs == 6 * 16 * 36


def test_exact_passes_may_differ_by_rounding_and_no_more():
    def scale_by(factor):
        def damage(graph, node):
            node.inputs[1] = graph.new_constant("w2", graph.constant(node.inputs[1]) * np.float32(factor))

        return damage

    for factor, failed in ((1 + 2**-22, False), (1 + 2**-9, True)):
        trace = Pipeline((wrong("scaled", scale_by(factor), "Conv")(),)).run(network())
        assert bool(trace.failures) is failed


def test_an_approximate_pass_is_judged_by_its_own_budget():
    @dataclass(frozen=True)
    class Coarse(wrong("coarse", _wrong_eps, "BatchNormalization", exact=False)):
        min_snr: float = 40.0

        def reject(self, errors, rounding):
            worst = min(e.snr_db for e in errors.values())
            return "" if worst >= self.min_snr else f"{worst:.1f} dB"

    assert not Pipeline((Coarse(),)).run(network()).failures
    (failed,) = Pipeline((Coarse(min_snr=200.0),)).run(network()).failures
    assert "dB" in failed.failure


def test_a_model_that_does_not_run_is_not_verified_and_says_so():
    text = "g (float[2,2] x) => (float[2,2] y) { y = NoSuchOp<k=1>(x) }"
    graph = Graph.from_proto(parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18, "d" : 1]> {text}'))
    graph.nodes[0].domain = "d"
    (step,) = Pipeline((Rename(),)).run(graph).steps
    assert step.unverified and step.errors is None
    with pytest.raises(InputError):
        Pipeline((Rename(),)).run(graph, [{"x": np.zeros((2, 2), np.float32)}])


@given(suffix=st.text(max_size=8), times=st.integers(-9, 9))
def test_specs_round_trip(suffix, times):
    registry.PASSES["rename"] = f"{__name__}:Rename"
    try:
        built = Pipeline((Rename(), Rename(suffix, times)))
        assert Pipeline.parse(str(built)) == built
    finally:
        del registry.PASSES["rename"]


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("", "cannot be read"),
        ("rename,", "cannot be read"),
        ("rename{", "cannot be read"),
        ("rename{times}", "cannot be read"),
        ("rename{times=1 rename", "cannot be read"),
        ("renam", "did you mean 'rename'"),
        ("rename{tims=1}", "did you mean 'times'"),
        ("rename{times=many}", "is not an int"),
        ("rename{times=1,times=2}", "twice"),
    ],
)
def test_wrong_specs_are_explained(rename, spec, complaint):
    with pytest.raises(InputError) as caught:
        Pipeline.parse(spec)
    assert complaint in str(caught.value)


def test_specs_are_lenient_with_spaces_and_sizes(rename):
    assert Pipeline.parse(" rename{ times = 2KiB , suffix=a } ,rename").passes == (Rename("a", 2048), Rename())


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package of somebody else, as pip would have installed it."""
    (tmp_path / "their_package.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from edgecompile.pipeline import Pass\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Theirs(Pass):\n"
        '    """Does nothing, politely."""\n\n'
        '    name: ClassVar[str] = "theirs"\n\n'
        "    def run(self, graph, context):\n"
        '        context.note("hello")\n'
        "        return context.result()\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgecompile.passes]\ntheirs = their_package:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return info


def test_a_pass_of_another_package_is_found(plugin):
    assert "theirs" in registry.pass_names()
    (step,) = Pipeline.parse("theirs").run(network()).steps
    assert str(step.notes[0]) == "hello"


def test_two_passes_of_one_name_are_an_error(plugin):
    (plugin / "entry_points.txt").write_text("[edgecompile.passes]\nclean = their_package:Theirs\n")
    with pytest.raises(InputError, match="two passes are called 'clean'"):
        registry.pass_names()


def test_a_pass_that_cannot_be_imported_says_so(plugin):
    (plugin / "entry_points.txt").write_text("[edgecompile.passes]\ntheirs = their_package_gone:Theirs\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        Pipeline.parse("theirs")


def test_verification_runs_on_the_given_feeds():
    graph = network()
    feeds = [{"x": np.full((3, 4, 6, 6), 0.5, np.float32)}]
    before = oracle.run(graph, feeds[0])
    trace = Pipeline((Rename(),)).run(graph, feeds)
    assert not trace.failures and np.array_equal(before["y"], oracle.run(graph, feeds[0])["y"])


@pytest.mark.parametrize(
    ("text", "base", "least"),
    [("0.5%", 0.8, 0.796), ("0.5%", 80.0, 79.6), ("0.5%", -2.0, -2.01), ("0.005", 0.8, 0.795), ("0", 0.8, 0.8)],
)
def test_a_drop_is_a_share_of_the_score_or_in_its_unit(text, base, least):
    drop = Drop(text)
    assert drop.limited and str(drop) == text
    assert drop.holds(least + 1e-9, base) and drop.holds(base + 1, base) and not drop.holds(least - 1e-6, base)
    assert not drop.holds(-math.inf, base) and not drop.holds(math.nan, base)


def test_no_drop_is_any_drop_and_nonsense_is_none():
    assert not Drop().limited and Drop().holds(-1e9, 1.0)
    for wrong in ("", "half", "-1", "-1%", "101%", "nan", "5%%", "0,5%"):
        with pytest.raises(ValueError, match="drop"):
            Drop(wrong)


def test_the_score_that_a_drop_is_counted_from_is_that_of_the_first_who_asks():
    first, second, asked = network(), network(), []
    second.nodes[0].attrs["mark"] = 1
    context = Context(evaluate=lambda graph, simulate: asked.append((graph.digest(), simulate)) or len(asked))
    assert [context.base(first), context.base(second), context.base(second, True), context.base(second)] == [1, 1, 2, 1]
    assert asked == [(first.digest(), False), (first.digest(), True)]
    assert Context().base(network()) is None


def test_a_drop_goes_through_a_spec():
    for spec in ("quantize{max_drop=0.5%}", "cast{max_drop=0.005}"):
        assert str(Pipeline.parse(spec)) == spec
    assert Pipeline.parse('quantize{max_drop="0.5%"}').passes[0].max_drop == Drop("0.5%")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="max_drop"):
        Pipeline.parse("quantize{max_drop=much}")


def test_bfloat16_is_rounded_as_bfloat16_is():
    """What is rounding in bfloat16 is an error in float32."""
    rng = np.random.default_rng(0)

    def graph(dtype) -> Graph:
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        x, y = (helper.make_tensor_value_info(n, code, [1, 64]) for n in "xy")
        tensors = [numpy_helper.from_array(rng.standard_normal((64, 64)).astype(dtype), "w")]
        made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], tensors)
        return Graph.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10))

    @dataclass(frozen=True)
    class Nudge(Pass):
        """Change a weight by a few ulps of bfloat16."""

        name: ClassVar[str] = "nudge"
        factor: float = 1 + 2**-7

        def run(self, graph, context):
            (node,) = graph.nodes
            values = graph.constant(node.inputs[1])
            if context.rewrite("nudge", node):
                wide = values.astype(np.float32) * np.float32(self.factor)
                node.inputs[1] = graph.new_constant("v", wide.astype(values.dtype))
            return context.result()

    def failed(dtype, factor: float) -> bool:
        (step,) = Pipeline((Nudge(factor),)).run(graph(dtype)).steps
        assert step.errors is not None
        return bool(step.failure)

    assert not failed(ml_dtypes.bfloat16, 1 + 2**-7) and failed(ml_dtypes.bfloat16, 4.0)
    assert failed(np.float32, 1 + 2**-7)
