"""Nodes read as maps compute what the nodes do; what is written back computes the composition."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, parser

from edgecompile import linear, linear_write, oracle
from edgecompile.affine import Refusal
from edgecompile.graph import Graph
from edgecompile.linear import Path, Scaling
from edgecompile.linear_write import Changes

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def build(body: str, inputs: str, weights: dict[str, np.ndarray]) -> Graph:
    """A graph from nodes in ONNX text, in float64 where ONNX Runtime has the operator in it; its output is y."""
    double = not re.search("ConvTranspose<group", body)
    proto = parser.parse_graph(f"g ({'double' if double else 'float'}[{inputs}] x) => () {{ {body} }}")
    kind = TensorProto.DOUBLE if double else TensorProto.FLOAT
    proto.output.append(helper.make_tensor_value_info("y", kind, None))
    used = {n: w for n, w in weights.items() if re.search(rf"\b{n}\b", body)}
    used = {n: w if double or w.dtype.kind != "f" else w.astype(np.float32) for n, w in used.items()}
    proto.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in used.items())
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def only(graph: Graph) -> gs.Node:
    (node,) = graph.nodes
    return node


def same(before: Graph, after: Graph) -> None:
    feeds = oracle.random_feeds(before.signature().inputs, seed=1)
    error = oracle.compare_all(oracle.run(before, feeds), oracle.run(after, feeds))["y"]
    assert error.max_rel <= (1e-11 if feeds["x"].dtype == np.float64 else 1e-5), error


def varied(axis: int, size: int, shift: bool = True) -> Scaling:
    return Scaling.of(axis, RNG.uniform(0.5, 2, size), normal(size) if shift else 0.0)


def applied(graph: Graph, s: Scaling, name: str, rank: int) -> Graph:
    """The graph with a map between ``name``, its input or its output, and the rest."""
    copy = graph.copy()
    scale, shift = (copy.new_constant("c", v.astype(copy.inputs[0].dtype)) for v in s.broadcast(rank))
    node = only(copy)
    if name == "y":
        old = node.outputs[0]
        node.outputs[0] = copy.new_variable("raw", old)
        product = copy.insert("Mul", [node.outputs[0], scale], replaces=[]).outputs[0]
        product.dtype, product.shape = old.dtype, old.shape
        copy.insert("Add", [product, shift], [old], replaces=[])
    else:
        source = copy.inputs[0]
        index = next(i for i, t in enumerate(node.inputs) if t is source)
        product = copy.insert("Mul", [source, scale], replaces=[]).outputs[0]
        total = copy.insert("Add", [product, shift], replaces=[]).outputs[0]
        for tensor in (product, total):
            tensor.dtype, tensor.shape = source.dtype, source.shape
        node.inputs[index] = total
    copy.tidy()
    return copy


WEIGHTS = {
    "k": normal(6, 4, 3, 2), "g": normal(6, 2, 3, 3), "t": normal(4, 3, 3, 3), "d": normal(4, 1, 3, 3), "b": normal(6),
    "w": normal(6, 5), "v": normal(5, 6), "l": normal(3, 4), "rows": normal(3, 1), "one": normal(1), "five": normal(5),
    "four": normal(4), "gamma": normal(4), "beta": normal(4), "mean": normal(4), "var": RNG.uniform(0.5, 2, 4),
    "six": normal(6),
}  # fmt: skip
IMAGE = "2,4,7,6"

# node, input, channel axes of input and output
LAYERS = {
    "conv": ("y = Conv<strides=[2,1], pads=[1,0,2,1], dilations=[1,2]>(x, k, b)", IMAGE, 1, 1),
    "conv without bias": ("y = Conv(x, k)", IMAGE, 1, 1),
    "grouped": ("y = Conv<group=2, pads=[1,1,1,1]>(x, g, b)", IMAGE, 1, 1),
    "depthwise": ("y = Conv<group=4>(x, d)", IMAGE, 1, 1),
    "same": ('y = Conv<auto_pad="SAME_LOWER">(x, k)', IMAGE, 1, 1),
    "transposed": ("y = ConvTranspose<strides=[2,3], pads=[1,0,1,2], output_padding=[1,0]>(x, t)", IMAGE, 1, 1),
    "grouped transposed": ("y = ConvTranspose<group=2, strides=[2,2], dilations=[2,1]>(x, t, b)", IMAGE, 1, 1),
    "gemm": ("y = Gemm<alpha=0.5, beta=3.0>(x, w, five)", "3,6", 1, 1),
    "gemm with one bias": ("y = Gemm<transB=1, beta=0.5>(x, v, one)", "3,6", 1, 1),
    "gemm of a transposed input": ("y = Gemm<transA=1, transB=1>(x, v, five)", "6,3", 0, 1),
    "matrix on the right": ("y = MatMul(x, w)", "2,3,6", 2, 2),
    "matrix on the left": ("y = MatMul(l, x)", "2,4,5", 1, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_read_and_planned_again(name: str):
    body, inputs, axis, exit_axis = LAYERS[name]
    graph = build(body, inputs, WEIGHTS)
    node = only(graph)
    step = linear.read(graph, node, node.outputs[0], exit_axis)
    assert step is not None and step.axis == axis
    path = Path(step.entry, step.axis, step.order, step.build())
    assert path.exit_axis == exit_axis
    copy = graph.copy()
    inserted = linear_write.plan(Path(copy.inputs[0], *(getattr(path, n) for n in ("axis", "order", "map"))))
    copy.rewire(copy.outputs[0], inserted.insert(copy, "p", []))
    copy.tidy()
    assert inserted.error == 0  # nothing was merged, so nothing is rounded
    same(graph, copy)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_a_map_in(name: str, side: str):
    """The weight keeps its form; a shift passes if the algebra says so, else it is refused."""
    body, inputs, axis, exit_axis = LAYERS[name]
    graph = build(body, inputs, WEIGHTS)
    node, changes = only(graph), Changes(graph)
    tensor, at = (node.outputs[0], exit_axis) if side == "before" else (graph.inputs[0], axis)
    shape = [int(n) for n in tensor.shape or ()]  # type: ignore[arg-type]
    bare = "MatMul" in body
    uneven = side == "after" and ("pads" in body or "SAME" in body or "Transpose<" in body)
    s = varied(at, shape[at], shift=not bare and not uneven)
    wanted = applied(graph, s, "y" if side == "before" else "x", len(shape))
    if bare or uneven:
        shifted = varied(at, shape[at])
        if side == "before":
            with pytest.raises(Refusal, match="no bias to take the shift"):
                changes.held(node).before(shifted)
        elif bare:
            assert changes.held(node).after(shifted)[1] is not None
        else:
            with pytest.raises(Refusal, match="bias cannot pass"):
                changes.held(node).after(shifted)
    held = changes.held(node)
    changes.hold(held.before(s) if side == "before" else held.after(s)[0])
    old = [(t.name, t.shape) for t in node.inputs]
    changes.commit(changes.edits(0), [])
    assert [t.shape for t in node.inputs[:2]] == [shape for _, shape in old[:2]]
    graph.check()
    same(wanted, graph)


def test_changes_of_one_layer_add_up_and_can_be_given_up():
    graph = build("y = Conv(x, k, b)", IMAGE, WEIGHTS)
    node, changes = only(graph), Changes(graph)
    first, second = varied(1, 4), varied(1, 6)

    def fails() -> None:
        changes.hold(changes.held(node).before(varied(1, 6)))
        raise Refusal("no")

    changes.attempt(fails, lambda: changes.hold(changes.held(node).after(first)[0]))
    with pytest.raises(Refusal, match="no"):
        changes.attempt(fails)
    changes.hold(changes.held(node).before(second))
    inner = applied(graph, first, "x", 4)
    changes.commit(changes.edits(0), [])
    scale, shift = (inner.new_constant("s", v) for v in second.broadcast(4))
    old = inner.outputs[0]
    conv = old.inputs[0]
    conv.outputs[0] = inner.new_variable("raw", old)
    product = inner.insert("Mul", [conv.outputs[0], scale], replaces=[]).outputs[0]
    inner.insert("Add", [product, shift], [old], replaces=[])
    inner.tidy()
    same(inner, graph)


@pytest.mark.parametrize(
    ("body", "inputs", "why"),
    [
        ("y = Gemm(x, w, rows)", "3,6", "bias varies along another axis"),
        ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, k)', IMAGE, "depends on the extents"),
        ("y = ConvTranspose<output_shape=[9,8]>(x, t)", IMAGE, "depends on the extents"),
        ("y = MatMul(l, x)", "4", "multiplies a vector"),
        ("y = MatMul(x, k)", "6,4,1,3", "not a matrix"),
    ],
)
def test_what_is_no_map_for_all_positions_is_refused(body: str, inputs: str, why: str):
    graph = build(body, inputs, WEIGHTS)
    node = only(graph)
    with pytest.raises(Refusal, match=why):
        step = linear.read(graph, node, node.outputs[0], max(0, min(1, linear.rank(node.outputs[0]) - 1)))
        assert step is not None
        step.build()


def test_a_layer_of_unknown_padding_takes_a_scale_but_no_shift_before_it():
    graph = build('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, k)', IMAGE, WEIGHTS)
    changes, s = Changes(graph), varied(1, 4, shift=False)
    with pytest.raises(Refusal, match="depends on the extents"):
        changes.held(only(graph)).after(varied(1, 4))
    wanted = applied(graph, s, "x", 4)
    changes.hold(changes.held(only(graph)).after(s)[0])
    changes.commit(changes.edits(0), [])
    same(wanted, graph)


NORMS = {
    "y = LayerNormalization<axis=-1>(x, gamma, beta)": ("2,3,4", 2),
    "y = InstanceNormalization(x, gamma, beta)": ("2,4,5,3", 1),
    "y = GroupNormalization<num_groups=2>(x, gamma, beta)": ("2,4,5,3", 1),
    "y = BatchNormalization(x, gamma, beta, mean, var)": ("2,4,5,3", 1),
    "y = LayerNormalization<axis=-1>(x, gamma)": ("2,3,4", 2),
}


@pytest.mark.parametrize("body", NORMS)
def test_a_norm_takes_a_map_in_at_its_end(body: str):
    inputs, axis = NORMS[body]
    graph = build(body, inputs, WEIGHTS)
    node, changes, s = only(graph), Changes(graph), varied(axis, 4)
    graph.outputs[0].shape = [int(n) for n in inputs.split(",")]  # not inferred for GroupNormalization
    wanted = applied(graph, s, "y", len(graph.outputs[0].shape))
    changes.hold(changes.held(node).before(s))
    changes.commit(changes.edits(0), [])
    same(wanted, graph)


@pytest.mark.parametrize(
    ("body", "axis"),
    [
        ("y = BatchNormalization(x, gamma, beta, mean, var)", 1),
        ("y = Mul(x, six)", 3), ("y = Sub(six, x)", 3), ("y = Div(x, six)", 3), ("y = Add(x, one)", None),
    ],
)  # fmt: skip
def test_a_scaling_is_read(body: str, axis: int | None):
    graph = build(body, IMAGE, WEIGHTS)
    found = linear.scaling(graph, only(graph))
    assert found is not None and found[1].axis == axis
    x = oracle.random_feeds(graph.signature().inputs, seed=1)["x"]
    scale, shift = found[1].broadcast(4)
    np.testing.assert_allclose(x * scale + shift, oracle.run(graph, {"x": x})["y"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("body", ["y = Div(six, x)", "y = Mul(x, k)", "y = Relu(x)", "y = Mul(x, x)"])
def test_what_is_no_scaling(body: str):
    graph = build(body, "6,4,3,2" if "k" in body else IMAGE, WEIGHTS)
    assert linear.scaling(graph, only(graph)) is None


def test_scalings_compose_along_one_axis_only():
    a, b, one = varied(1, 4), varied(1, 4), Scaling.of(None, 3.0, -1.0)
    x = normal(4)
    for first, second in ((a, b), (a, one), (one, b)):
        both = first.then(second)
        assert both is not None and both.axis == 1
        wanted = (x * first.scale + first.shift) * second.scale + second.shift
        np.testing.assert_allclose(x * both.scale + both.shift, wanted)
    assert a.then(varied(2, 4)) is None
    assert Scaling.of(1, np.full(4, 2.0)).axis is None
    with pytest.raises(Refusal, match="acts on axis 1, the channels are on axis 2"):
        a.on(2, 4)
    with pytest.raises(Refusal, match="not finite"):
        Scaling.of(1, [1.0, np.inf])


CARRIED = {  # node, input, an axis before it and the same after it; None: refused
    "transpose": ("y = Transpose<perm=[2,0,1]>(x)", "2,3,4", 1, 2),
    "unit axes": ("y = Reshape(x, unit)", "2,1,3", 2, 1),
    "channels kept apart": ("y = Reshape(x, flat)", "2,3,2,2", 1, 1),
    "channels split over two axes": ("y = Reshape(x, rows)", "2,3,4", 2, None),
    "mean over others": ("y = ReduceMean<keepdims=0>(x, axes)", "2,3,4", 1, 1),
    "mean over it": ("y = ReduceMean<keepdims=0>(x, axes)", "2,3,4", 2, None),
}
SHAPES = {
    "unit": np.array([2, 3, 1, 1]),
    "flat": np.array([2, 3, 4]),
    "rows": np.array([2, 6, 2]),
    "axes": np.array([2]),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_map_is_carried_across_what_moves_and_averages(name: str):
    body, inputs, axis, after = CARRIED[name]
    graph = build(body, inputs, SHAPES)
    node, shape = only(graph), [int(n) for n in inputs.split(",")]
    s = varied(axis, shape[axis])
    if after is None:
        with pytest.raises(Refusal):
            linear.carried(node, s, back=False)
        return
    moved = linear.carried(node, s, back=False)
    assert moved.axis == after
    back = linear.carried(node, moved, back=True)
    assert back.axis == axis
    np.testing.assert_array_equal(back.scale, s.scale)
    x = oracle.random_feeds(graph.signature().inputs, seed=1)["x"]
    scale, shift = s.broadcast(len(shape))
    found = oracle.run(graph, {"x": x})["y"]
    scale_after, shift_after = moved.broadcast(found.ndim)
    np.testing.assert_allclose(oracle.run(graph, {"x": x * scale + shift})["y"], found * scale_after + shift_after)


@pytest.mark.parametrize(
    ("body", "inputs", "order"),
    [
        ("y = Squeeze(x, last)", "2,4,3,1", (0, 1, 2)),
        ("y = Unsqueeze(x, last)", "2,4,3", (0, 1, 2, -1)),
        ("y = Reshape(x, swap)", "2,1,4,3", (0, 2, -1, 3)),
        ("y = Flatten(x)", "2,4,1,1", (0, 1)),
        ("y = Transpose(x)", "2,4,3", (2, 1, 0)),
        ("y = Flatten(x)", "2,4,3,1", None),
        ("y = Reshape(x, other)", "2,6", None),
        ("y = Reshape(x, swap)", "2,4,3,1", (0, 1, -1, 2)),
    ],
)
def test_reshapes_that_only_add_and_drop_axes_of_extent_one_are_read(body: str, inputs: str, order: tuple | None):
    shapes = {"last": np.array([3]), "swap": np.array([2, 4, 1, 3]), "other": np.array([3, 4])}
    graph = build(body, inputs, shapes)
    node = only(graph)
    assert linear.is_affine(graph, node) == (order is not None)
    if order is not None:
        axis = order.index([int(n) for n in inputs.split(",")].index(4))
        step = linear.read(graph, node, node.outputs[0], axis)
        assert step is not None and step.order == order


def test_a_selection_of_one_axis():
    indices = {"i": np.array([3, -1]), "zero": np.array([0]), "two": np.array([2]), "one": np.array([1])}
    gather, cut = (build(b, IMAGE, indices) for b in ("y = Gather<axis=1>(x, i)", "y = Slice(x, zero, two, one)"))
    for graph, wanted in ((gather, [3, 3]), (cut, [0, 1])):
        chosen = linear.selection(graph, only(graph))
        assert chosen is not None and chosen.axis == 1 and chosen.parts is not None
        assert [p.tolist() for p in chosen.parts] == [wanted]
    several = build("y = Slice(x, a, b)", IMAGE, {"a": np.array([0, 1]), "b": np.array([2, 3])})
    with pytest.raises(Refusal, match="slices several axes"):
        linear.selection(several, only(several))
    assert linear.selection(several, build("y = Relu(x)", IMAGE, {}).nodes[0]) is None
