"""A plan says what a cut took, survives its file, and is refused where it is not one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile import oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.passes.prune.dependency import groups
from edgecompile.passes.prune.plan import SCHEMA, Plan


def net(hidden: int = 6) -> Graph:
    """Conv, BatchNormalization, a residual with hidden channels, attention over heads, a linear head."""
    rng = np.random.default_rng(0)
    shapes = {"a.w": (8, 3, 3, 3), "a.b": (8,), "b.w": (hidden, 8, 1, 1), "c.w": (8, hidden, 1, 1), "s": (8,),
              "t": (8,), "qkv": (24, 8, 1, 1), "out": (8, 8, 1, 1), "d.w": (5, 8)}  # fmt: skip
    weights = {n: rng.standard_normal(s).astype(np.float32) * 0.3 for n, s in shapes.items()}
    weights |= {"v": np.ones(8, np.float32), "m": np.zeros(8, np.float32)}
    weights |= {"grid": np.array([1, 3, 2, 4, 36]), "flat": np.array([1, 8, 6, 6]), "one": np.array([1, 1, 1])}
    nodes = [
        helper.make_node("Conv", ["x", "a.w", "a.b"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "s", "t", "m", "v"], ["bn"]),
        helper.make_node("Conv", ["bn", "b.w"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["sb"]),
        helper.make_node("Conv", ["sb", "c.w"], ["c"]),
        helper.make_node("Add", ["bn", "c"], ["r"]),
        helper.make_node("Conv", ["r", "qkv"], ["f"]),
        helper.make_node("Reshape", ["f", "grid"], ["g"]),
        helper.make_node("Split", ["g", "one"], ["q", "k", "u"], axis=1),
        helper.make_node("Transpose", ["q"], ["qt"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("MatMul", ["qt", "k"], ["qk"]),
        helper.make_node("Softmax", ["qk"], ["p"], axis=-1),
        helper.make_node("Transpose", ["p"], ["pt"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("MatMul", ["u", "pt"], ["o"]),
        helper.make_node("Reshape", ["o", "flat"], ["of"]),
        helper.make_node("Conv", ["of", "out"], ["z"]),
        helper.make_node("GlobalAveragePool", ["z"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["fl"]),
        helper.make_node("Gemm", ["fl", "d.w"], ["y"], transB=1),
    ]
    for node in nodes:
        node.name = f"/{node.output[0]}/{node.op_type}"
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )  # fmt: skip
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def thinned(graph: Graph) -> tuple[Plan, dict[str, np.ndarray]]:
    found = groups(graph)
    keep = {g.name: np.sort(np.random.default_rng(1).permutation(g.units)[: -(-g.units // 2)]) for g in found.prunable}
    return Plan.of(graph, found, keep), keep


def test_a_plan_names_every_axis_that_was_cut():
    graph = net()
    plan, keep = thinned(graph)
    assert {g.units for g in groups(graph).prunable} >= {2, 4, 6, 8}
    cut = graph.copy()
    groups(graph).cut(cut, keep)
    before, after = graph.constants(), cut.constants()
    changed = {(n, i) for n, v in before.items() for i, size in enumerate(v.shape) if v.dtype.kind == "f"
               and after[n].shape[i] != size}  # fmt: skip
    assert {(x.weight, x.axis) for x in plan.layers} == changed
    for layer in plan.layers:
        assert (layer.of, len(layer.kept)) == (
            before[layer.weight].shape[layer.axis],
            after[layer.weight].shape[layer.axis],
        )
    (stem,) = (x for x in plan.layers if x.weight == "a.w")
    np.testing.assert_array_equal(after["a.w"], before["a.w"][list(stem.kept)])
    assert stem.module == "a" and stem.node == "a"
    assert {w.name: (w.before, w.after) for w in plan.groups} == {
        g.name: (g.units, len(keep[g.name])) for g in groups(graph).prunable
    }
    assert plan.inputs[0].shape == (1, 3, 6, 6) and plan.graph == graph.digest()


def test_a_plan_survives_its_file_and_makes_the_same_cut(tmp_path: Path):
    graph = net()
    plan, keep = thinned(graph)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    found = groups(graph)
    again = read.keep(graph, found)
    assert {n: k.tolist() for n, k in again.items()} == {n: k.tolist() for n, k in keep.items()}
    one, two = graph.copy(), graph.copy()
    found.cut(one, keep)
    found.cut(two, again)
    feeds = oracle.random_feeds(graph.signature().inputs)
    assert oracle.compare_all(oracle.run(one, feeds), oracle.run(two, feeds))["y"].max_abs == 0


def test_a_cut_is_found_again_by_what_the_model_computes():
    graph = net()
    plan, keep = thinned(graph)
    found = groups(graph)
    computed = {place: mask for place, mask in plan.kept().items() if not place[1]}
    assert {n: k.tolist() for n, k in found.keep(graph, computed).items()} == {n: k.tolist() for n, k in keep.items()}
    hidden = {place: mask for place, mask in computed.items() if place[0] == "b"}
    assert list(found.keep(graph, hidden)) == [g.name for g in found.prunable if g.units == 6]


@pytest.mark.parametrize(
    ("place", "mask", "match"),
    [
        (("b", "", 1), np.arange(7) < 3, "has 6 positions"),
        (("y", "", 1), np.arange(5) < 3, "cannot be cut"),
        (("nothing", "", 1), np.arange(5) < 3, "cannot be cut"),
        (("f", "", 1), np.arange(24) < 23, "cannot keep just these"),  # one position of a head alone
    ],
)
def test_positions_that_no_cut_leaves_are_refused(place: tuple, mask: np.ndarray, match: str):
    graph = net()
    with pytest.raises(InputError, match=match):
        groups(graph).keep(graph, {place: mask})


def test_a_plan_of_another_graph_is_refused():
    plan, _ = thinned(net(10))
    other = net()
    with pytest.raises(InputError, match="has 6 positions"):
        plan.keep(other, groups(other))


BROKEN = {
    "no object": (lambda d: [], "schema"),
    "another schema": (lambda d: d | {"schema": "edgecompile.prune-plan/2"}, SCHEMA),
    "no layers": (lambda d: {k: v for k, v in d.items() if k != "layers"}, "lacks 'layers'"),
    "an unknown field": (lambda d: d | {"seed": 1}, "unknown field 'seed'"),
    "a layer without an axis": (lambda d: d | {"layers": [{k: v for k, v in d["layers"][0].items() if k != "axis"}]},
                                "entry 0 of layers lacks 'axis'"),
    "a truth value": (lambda d: d | {"layers": [d["layers"][0] | {"axis": True}]}, "'axis' of entry 0 of layers"),
    "a name for a position": (lambda d: d | {"layers": [d["layers"][0] | {"kept": ["0"]}]}, "holds '0'"),
    "no position": (lambda d: d | {"layers": [d["layers"][0] | {"kept": []}]}, "keeps nothing"),
    "descending": (lambda d: d | {"layers": [d["layers"][0] | {"kept": [2, 1]}]}, "ascending"),
    "out of range": (lambda d: d | {"layers": [d["layers"][0] | {"kept": [0, 8]}]}, "keeps position 8 of 8"),
    "a negative axis": (lambda d: d | {"layers": [d["layers"][0] | {"axis": -1}]}, "counts from the end"),
    "twice": (lambda d: d | {"layers": d["layers"][:1] * 2}, "listed twice"),
    "a group that grew": (lambda d: d | {"groups": [{"name": "a", "before": 2, "after": 3}]}, "from 2 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plan_is_refused(case: str, tmp_path: Path):
    change, match = BROKEN[case]
    document = json.loads(json.dumps(thinned(net())[0].as_dict()))
    assert Plan.from_dict(document).as_dict()["layers"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(change(document)))
    with pytest.raises(InputError, match="is no plan of a cut") as caught:
        Plan.load(path)
    assert match in str(caught.value)


def test_a_file_that_is_not_there_or_is_no_json_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="no plan"):
        Plan.load(tmp_path / "plan.json")
