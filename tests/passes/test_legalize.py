"""Each rule makes legal what it is for, changes nothing but rounding, and leaves alone what needs nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle
from edgecompile.graph import Graph, provenance
from edgecompile.passes.legalize import RULES, Legalize
from edgecompile.pipeline import Context, PassResult

RNG = np.random.default_rng(0)
CONTRIB = "com.microsoft"


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def make(op, shapes, weights=(), opset=20, domain="", outputs=1, **attrs) -> Graph:
    """A graph of one node that reads inputs, then initializers; an initializer that is None is left out."""
    names = [f"x{i}" for i in range(len(shapes))] + ["" if w is None else f"c{i}" for i, w in enumerate(weights)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="net.block.op", domain=domain, **attrs)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, s) for i, s in enumerate(shapes)],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [onnx.numpy_helper.from_array(w, f"c{i}") for i, w in enumerate(weights) if w is not None],
    )
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    rng = np.random.default_rng(1)
    feeds = {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    ort = pytest.importorskip("onnxruntime")
    for output, value in zip(
        graph.output, ort.InferenceSession(model.SerializeToString()).run(None, feeds), strict=True
    ):
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, value.shape))
    del model.graph.output[:]
    model.graph.output.extend(graph.output)
    return Graph.from_proto(model)


def legalized(graph: Graph, limit: int | None = None, target: str = "tvm") -> PassResult:
    """Run the pass; what the graph computes stays the same."""
    feeds = oracle.random_feeds(graph.signature().inputs)
    before, signature = oracle.run(graph, feeds), graph.signature()
    context = Context(limit=limit)
    context.begin("legalize")
    result = Legalize(target=target).run(graph, context)
    graph.tidy()
    graph.check(signature)
    assert oracle.worst([oracle.compare_all(before, oracle.run(graph, feeds))]).popitem()[1].max_rel < 1e-5
    return result


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


W = random(4, 3, 3, 3)
T = random(3, 4, 3, 3)
NEEDED = {
    "reshape": (("Reshape", [(2, 3, 4)], [ints(0, -1)]), {}),
    "squeeze": (("Squeeze", [(2, 3, 1)], [ints(-1)]), {}),
    "unsqueeze": (("Unsqueeze", [(2, 3)], [ints(-1, 0)]), {}),
    "flatten": (("Flatten", [(2, 3, 4)]), {"axis": 2}),
    "split": (("Split", [(2, 7)]), {"opset": 18, "outputs": 3, "axis": 1, "num_outputs": 3}),
    "split of opset 13": (("Split", [(2, 6)]), {"opset": 13, "outputs": 3, "axis": -1}),
    "split of opset 11": (("Split", [(2, 6)]), {"opset": 11, "outputs": 3, "axis": -1}),
    "conv": (("Conv", [(1, 3, 7, 8)], [W]), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid conv": (("Conv", [(1, 3, 7, 8)], [W]), {"auto_pad": "VALID"}),
    "max pool": (
        ("MaxPool", [(1, 3, 7, 8)]),
        {"auto_pad": "SAME_LOWER", "kernel_shape": [3, 3], "strides": [2, 2]},
    ),
    "average pool": (("AveragePool", [(1, 3, 7, 8)]), {"auto_pad": "SAME_UPPER", "kernel_shape": [2, 2]}),
    "transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "output_shape": [10, 12]}),
    "odd transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [1, 1], "output_shape": [6, 7]}),
    "same transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "attention": (("Attention", [(1, 2, 4, 8)] * 3), {"opset": 23, "scale": 0.3}),
    "attention of three axes": (("Attention", [(1, 4, 16)] * 3), {"opset": 23, "q_num_heads": 2, "kv_num_heads": 2}),
    "celu": (("Celu", [(2, 4)]), {"alpha": 2.0}),
    "celu by default": (("Celu", [(2, 4)]), {}),
    "gelu": (("Gelu", [(2, 4)]), {"domain": CONTRIB}),
    "bias gelu": (("BiasGelu", [(2, 4)], [random(4)]), {"domain": CONTRIB}),
    "fast gelu": (("FastGelu", [(2, 4)], [random(4)]), {"domain": CONTRIB}),
    "quick gelu": (("QuickGelu", [(2, 4)]), {"domain": CONTRIB}),
    "fused matmul": (
        ("FusedMatMul", [(2, 4, 3), (2, 5, 4)]),
        {"domain": CONTRIB, "transA": 1, "transB": 1, "alpha": 0.5},
    ),
    "fused conv": (
        ("FusedConv", [(1, 3, 5, 5)], [W, random(4)]),
        {"domain": CONTRIB, "activation": "LeakyRelu", "activation_params": [0.3]},
    ),
    "fused conv with a sum": (
        ("FusedConv", [(1, 3, 5, 5)], [W, random(4), random(1, 4, 3, 3)]),
        {"domain": CONTRIB, "activation": "Relu"},
    ),
    "skip layer norm": (("SkipLayerNormalization", [(1, 3, 8)] * 2, [random(8)]), {"domain": CONTRIB}),
    "skip layer norm with all": (
        ("SkipLayerNormalization", [(1, 3, 8)] * 2, [random(8), random(8), random(8)]),
        {"domain": CONTRIB},
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_rule_applies_once_and_for_all(name):
    arguments, options = NEEDED[name]
    graph = make(*arguments, **options)
    original = provenance(graph.nodes[0])
    result = legalized(graph)
    assert result.rewrites
    assert not {"auto_pad", "output_shape", "num_outputs"} & {k for n in graph.nodes for k in n.attrs}
    assert not {"Attention", "Celu"} & set(ops(graph))
    assert all(node.domain in (None, "") for node in graph.nodes)
    assert all(provenance(node).sources == original.sources for node in graph.nodes)
    assert not legalized(graph).rewrites


@pytest.mark.parametrize("name", NEEDED)
def test_a_rule_that_may_not_apply_changes_nothing(name):
    arguments, options = NEEDED[name]
    graph = make(*arguments, **options)
    before = ops(graph), [dict(n.attrs) for n in graph.nodes], [len(n.inputs) for n in graph.nodes]
    assert not legalized(graph, limit=0).rewrites
    assert (ops(graph), [dict(n.attrs) for n in graph.nodes], [len(n.inputs) for n in graph.nodes]) == before


LEGAL = {
    "reshape": (("Reshape", [(2, 3, 4)], [ints(2, 12)]), {}),
    "split": (("Split", [(2, 7)], [ints(3, 4)]), {"opset": 18, "outputs": 2, "axis": 1}),
    "conv": (("Conv", [(1, 3, 7, 8)], [W]), {"pads": [1, 1, 1, 1]}),
    "transposed": (("ConvTranspose", [(1, 3, 5, 6)], [T]), {"strides": [2, 2], "output_padding": [1, 1]}),
    "gelu": (("Gelu", [(2, 4)]), {}),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_is_left_alone(name):
    arguments, options = LEGAL[name]
    result = legalized(make(*arguments, **options))
    assert not result.rewrites
    assert not result.notes


def test_a_reshape_whose_extent_is_unknown_is_left_alone():
    graph = make("Reshape", [(2, 3, 4)], [ints(0, -1)])
    graph.inputs[0].shape = ["batch", 3, 4]
    graph.outputs[0].shape = ["batch", 12]
    context = Context()
    context.begin("legalize")
    assert not Legalize().run(graph, context).rewrites


def test_what_no_rule_makes_legal_is_named():
    graph = make("FusedConv", [(1, 3, 5, 5)], [W], domain=CONTRIB, activation="Relu")
    graph.nodes[0].attrs["activation"] = "Unheard"
    context = Context()
    context.begin("legalize")
    result = Legalize().run(graph, context)
    assert not result.rewrites
    (note,) = result.notes
    assert "FusedConv" in note.where
    assert "com.microsoft::FusedConv" in note.text


# -- TensorRT ----------------------------------------------------------------------------------------------------------

F, I64, I32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def network(nodes, inputs, weights=(), opset=20, dtype=F, shape=None) -> Graph:
    """Nodes given as (operator, inputs, outputs, attributes); the last output is the model's."""
    made = [
        helper.make_node(op, read, written, f"net.{i}.{op}", **attrs)
        for i, (op, read, written, attrs) in enumerate(nodes)
    ]
    ports = [helper.make_tensor_value_info(n, k, s) for n, (s, k) in inputs.items()]
    last = onnx.ValueInfoProto(name=nodes[-1][2][-1])
    graph = helper.make_graph(made, "g", ports, [last], [onnx.numpy_helper.from_array(v, n) for n, v in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if inferred.graph.output[0].type.tensor_type.HasField("shape"):
        model.graph.output[0].CopyFrom(inferred.graph.output[0])
    else:
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(last.name, dtype, shape))
    return Graph.from_proto(model)


def shuffles(chain, shape, *, dtype=F) -> Graph:
    """A chain of Transpose (a permutation) and Reshape (a shape) from the input ``x``."""
    nodes, weights, name = [], [], "x"
    for i, step in enumerate(chain):
        if isinstance(step, tuple):
            nodes.append(("Transpose", [name], [f"t{i}"], {"perm": list(step)}))
        else:
            weights.append((f"s{i}", ints(*step)))
            nodes.append(("Reshape", [name, f"s{i}"], [f"t{i}"], {}))
        name = f"t{i}"
    return network(nodes, {"x": (shape, dtype)}, weights)


WINDOWS = [(0, 2, 3, 1), [1, 2, 7, 2, 7, 6], (0, 1, 3, 2, 4, 5), [4, 7, 7, 6], (0, 3, 1, 2)]
CHAINS = {
    # chain, input shape, operators left, most axes of any of them
    "windows": (WINDOWS, [1, 6, 14, 14], ["Reshape", "Transpose", "Reshape"], 5),
    "windows of tokens": (
        [[1, 2, 7, 2, 7, 6], (0, 1, 3, 2, 4, 5), [4, 49, 6]], [1, 196, 6], ["Reshape", "Transpose", "Reshape"], 4,
    ),
    "windows of batches": (
        [[-1, 2, 7, 2, 7, 6], (0, 1, 3, 2, 4, 5), [-1, 49, 6]], ["n", 196, 6], ["Reshape", "Transpose", "Reshape"], 5,
    ),
    "there and back": ([[1, 2, 7, 2, 7, 6], (0, 1, 3, 2, 4, 5), (0, 1, 3, 2, 4, 5), [1, 196, 6]], [1, 196, 6], [], 3),
    "pixel shuffle": ([[1, 4, 2, 2, 3, 5], (0, 1, 4, 2, 5, 3), [1, 4, 6, 10]], [1, 16, 3, 5],
                      ["Reshape", "Transpose", "Reshape"], 5),
    "two transposes": ([(0, 2, 1, 3), (0, 1, 3, 2)], [2, 3, 4, 5], ["Transpose"], 4),
    "two transposes of ones": ([(0, 2, 1, 3), (0, 1, 3, 2)], [1, 3, 1, 5], ["Transpose"], 4),
    "of ones": ([[1, 1, 3, 1, 4, 1], (2, 0, 4, 1, 3, 5), [3, 4]], [3, 4], [], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_shuffles_becomes_one(name: str):
    chain, shape, left, axes = CHAINS[name]
    graph = shuffles(chain, shape)
    assert legalized(graph, target="trt").rewrites
    assert [op for op in ops(graph) if op != "Identity"] == left
    graph.infer_shapes(outputs=True)
    assert max(len(t.shape) for n in graph.nodes for t in n.outputs) <= axes
    assert not legalized(graph, target="trt").rewrites


@pytest.mark.parametrize("seed", range(40))
def test_random_chains_move_each_element_where_they_did(seed: int):
    rng = np.random.default_rng(seed)
    shape = [int(d) for d in rng.choice([1, 2, 3, 4, 6], rng.integers(1, 5))]
    chain, current = [], list(shape)
    for _ in range(rng.integers(2, 7)):
        if rng.integers(2) and len(current) > 1:
            perm = tuple(int(i) for i in rng.permutation(len(current)))
            chain.append(perm)
            current = [current[i] for i in perm]
        else:
            current = refactored(rng, current)
            chain.append(current)
    graph = shuffles(chain, shape)
    feed = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    before, transposes = oracle.run(graph, feed), ops(graph).count("Transpose")
    count = len(graph.nodes)
    context = Context()
    context.begin("legalize")
    Legalize(target="trt").run(graph, context)
    graph.tidy()
    graph.check()
    for output, value in oracle.run(graph, feed).items():
        np.testing.assert_array_equal(value, before[output])
    assert ops(graph).count("Transpose") <= transposes
    assert len(graph.nodes) <= max(count, 3)


def refactored(rng: np.random.Generator, shape: list[int]) -> list[int]:
    """Another shape of as many elements: neighbours merged, extents split, ones put in."""
    left, made = int(np.prod(shape)), []
    while left > 1:
        factor = int(rng.choice([d for d in range(2, left + 1) if left % d == 0][:6]))
        made.append(factor)
        left //= factor
    made.insert(int(rng.integers(len(made) + 1)), 1)
    return made


KEPT = {
    "one transpose": ([(0, 2, 3, 1)], [1, 4, 5, 6]),
    "heads": ([[1, 49, 3, 8], (0, 2, 1, 3)], [1, 49, 24]),
    "not by factors": ([[4, 6], (1, 0), [8, 3], (1, 0)], [24]),
    "four axes": ([[2, 3, 4, 5], (0, 2, 1, 3), [2, 4, 15]], [6, 20]),
}


@pytest.mark.parametrize("name", KEPT)
def test_shuffles_that_are_simple_are_left_alone(name: str):
    graph = shuffles(*KEPT[name])
    before = ops(graph)
    assert not legalized(graph, target="trt").rewrites
    assert ops(graph) == before


def test_a_chain_whose_middle_is_read_elsewhere_keeps_it():
    graph = shuffles(WINDOWS, [1, 6, 14, 14])
    middle = graph.nodes[2].outputs[0]
    middle.dtype, middle.shape = np.dtype(np.float32), [1, 2, 2, 7, 7, 6]
    graph.outputs.append(middle)
    legalized(graph, target="trt")
    assert any(t is middle for t in graph.outputs) and middle.inputs


def attention(taken: str, heads: int = 3, tokens: int = 5, width: int = 4, batch: int = 2) -> Graph:
    """Queries, keys and values taken from one product as torch exports them, multiplied so that each counts."""
    nodes = [
        ("Reshape", ["x", "five"], ["r"], {}),
        ("Transpose", ["r"], ["t"], {"perm": [2, 0, 3, 1, 4]}),
    ]
    weights = [("five", ints(-1, tokens, 3, heads, width)), ("axis", ints(0))]
    for i, part in enumerate("qkv"):
        weights += [(f"a{i}", ints(i)), (f"b{i}", ints(i + 1)), (f"i{i}", np.array(i))]
        if taken == "gather":
            nodes.append(("Gather", ["t", f"i{i}"], [part], {"axis": 0}))
        else:
            nodes.append(("Slice", ["t", f"a{i}", f"b{i}", "axis"], [f"{part}1"], {}))
            nodes.append(("Squeeze", [f"{part}1", "axis"], [part], {}) if taken == "squeeze" else
                         ("Relu", [f"{part}1"], [part], {}))  # fmt: skip
    nodes += [("Sub", ["q", "k"], ["s"], {}), ("Mul", ["s", "v"], ["y"], {})]
    return network(nodes, {"x": ([batch, tokens, 3 * heads * width], F)}, weights)


@pytest.mark.parametrize("taken", ["squeeze", "gather", "slice"])
def test_queries_keys_and_values_are_split_before_they_are_transposed(taken: str):
    graph = attention(taken)
    assert legalized(graph, target="trt").rewrites
    assert ops(graph).count("Split") == 1 and not {"Slice", "Gather", "Squeeze"} & set(ops(graph))
    graph.infer_shapes()
    assert all(len(n.inputs[0].shape) <= 4 for n in graph.nodes if n.op == "Transpose")
    assert not legalized(graph, target="trt").rewrites


def test_a_transpose_that_is_read_whole_is_not_split():
    graph = attention("squeeze")
    transposed = next(n for n in graph.nodes if n.op == "Transpose").outputs[0]
    transposed.dtype, transposed.shape = np.dtype(np.float32), [3, 2, 3, 5, 4]
    graph.outputs.append(transposed)
    legalized(graph, target="trt")
    assert "Split" not in ops(graph)


def windows_mask(ones: int = 1, batch: int = 1, side: int = 1) -> Graph:
    """The mask of shifted windows: an axis of 1 before the windows for one addition."""
    mask = random(*[1] * ones, 4, 1, 3, 3)
    order = ["r", "m"] if side else ["m", "r"]
    nodes = [
        ("Reshape", ["x", "five"], ["r"], {}),
        ("Add", order, ["a"], {}),
        ("Reshape", ["a", "four"], ["y"], {}),
    ]
    weights = [("five", ints(batch, 4, 2, 3, 3)), ("four", ints(4 * batch, 2, 3, 3)), ("m", mask)]
    return network(nodes, {"x": ([4 * batch, 2, 3, 3], F)}, weights)


@pytest.mark.parametrize("ones", [0, 1])
@pytest.mark.parametrize("side", [0, 1])
def test_an_axis_of_one_is_not_made_for_one_operator(ones: int, side: int):
    graph = windows_mask(ones, side=side)
    assert legalized(graph, target="trt").rewrites
    assert ops(graph) == ["Add"]


def test_an_axis_of_the_batch_stays():
    graph = windows_mask(batch=2)
    assert not legalized(graph, target="trt").rewrites
    assert ops(graph) == ["Reshape", "Add", "Reshape"]


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [[2, 6, 5], [2, 6, 4, 5], ["n", 6, 4, 5]], ids=str)
def test_group_normalization_becomes_what_every_version_computes(opset: int, groups: int, shape: list):
    count = groups if opset < 21 else 6
    weights = [("s", random(count)), ("b", random(count))]
    node = ("GroupNormalization", ["x", "s", "b"], ["y"], {"num_groups": groups, "epsilon": 1e-3})
    graph = network([node], {"x": (shape, F)}, weights, opset, shape=shape)
    assert legalized(graph, target="trt").rewrites
    assert "GroupNormalization" not in ops(graph) and ops(graph).count("InstanceNormalization") == 1
    x = random(*(3 if d == "n" else d for d in shape))
    grouped = x.reshape(len(x), groups, -1)
    expected = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-3)
    scale, bias = (np.repeat(w, 6 // count).reshape(-1, *[1] * (x.ndim - 2)) for _, w in weights)
    expected = expected.reshape(x.shape) * scale + bias
    np.testing.assert_allclose(oracle.run(graph, {"x": x})["y"], expected, rtol=1e-4, atol=1e-4)


def test_instance_normalization_is_left_as_torch_exports_it():
    nodes = [
        ("Reshape", ["x", "three"], ["r"], {}),
        ("InstanceNormalization", ["r", "s", "b"], ["i"], {}),
        ("Reshape", ["i", "four"], ["y"], {}),
    ]
    weights = [
        ("three", ints(2, 1, -1)),
        ("four", ints(2, 6, 4, 5)),
        ("s", np.ones(1, np.float32)),
        ("b", np.zeros(1, np.float32)),
    ]
    assert not legalized(network(nodes, {"x": ([2, 6, 4, 5], F)}, weights), target="trt").rewrites


@pytest.mark.parametrize("bounds", [("l", "h"), ("l",), ("", "h"), ("zero", "h"), ("l", "six")])
def test_a_clip_with_computed_bounds(bounds: tuple[str, ...]):
    inputs = {"x": ([3, 4], F)} | {n: ([], F) for n in ("l", "h") if n in bounds}
    weights = [(n, np.array(v, np.float32)) for n, v in (("zero", 0), ("six", 6)) if n in bounds]
    graph = network([("Clip", ["x", *bounds], ["y"], {})], inputs, weights)
    for low, high in ((-0.5, 0.5), (0.5, -0.5), (0, 0)):
        feed = {"x": random(3, 4), "l": np.float32(low), "h": np.float32(high)}
        feed = {n: np.asarray(feed[n]) for n in inputs}
        twin = graph.copy()
        before = oracle.run(twin, feed)["y"]
        assert legalized(twin, target="trt").rewrites
        assert set(ops(twin)) <= {"Max", "Min"}
        np.testing.assert_array_equal(oracle.run(twin, feed)["y"], before)


def test_a_clip_of_integers_and_one_after_a_linear_layer():
    weights = [("l", np.array(-1, np.int64)), ("h", np.array(3, np.int64))]
    graph = network([("Clip", ["x", "l", "h"], ["y"], {})], {"x": ([5], I64)}, weights, dtype=I64)
    assert legalized(graph, target="trt").rewrites and ops(graph) == ["Max", "Min"]
    nodes = [("MatMul", ["x", "w"], ["m"], {}), ("Add", ["m", "b"], ["a"], {}), ("Clip", ["a", "l", "h"], ["y"], {})]
    linear = [("w", random(3, 4)), ("b", random(4))]
    for low, lost in ((0.0, True), (-1.0, False)):
        bounds = [("l", np.array(low, np.float32)), ("h", np.array(0.5, np.float32))]
        graph = network(nodes, {"x": ([2, 3], F)}, [*linear, *bounds])
        assert bool(legalized(graph, target="trt").rewrites) == lost
        assert ("Clip" in ops(graph)) != lost


def test_a_clip_that_is_an_activation_stays():
    bounds = [("l", np.array(0, np.float32)), ("h", np.array(6, np.float32)), ("w", W)]
    nodes = [("Conv", ["x", "w"], ["c"], {}), ("Clip", ["c", "l", "h"], ["y"], {})]
    graph = network(nodes, {"x": ([1, 3, 5, 5], F)}, bounds)
    assert not legalized(graph, target="trt").rewrites


def resize(shape=(1, 2, 4, 6), scales=None, sizes=None, opset=19, **attrs) -> Graph:
    weights = [("scales", np.array(scales, np.float32))] if scales else [("sizes", ints(*sizes))]
    names = ["x", "", "scales"] if scales else ["x", "", "", "sizes"]
    return network([("Resize", names, ["y"], attrs)], {"x": (list(shape), F)}, weights, opset)


SYMMETRIC = {"coordinate_transformation_mode": "half_pixel_symmetric", "mode": "linear"}
RESIZED = {
    "whole scales": resize(scales=[1, 1, 2, 1.5], **SYMMETRIC),
    "axes": resize(scales=[2, 3], axes=[2, 3], mode="nearest"),
    "axes from behind": resize(scales=[3, 2], axes=[-1, -2], mode="linear"),
    "sizes of axes": resize(sizes=[8, 9], axes=[2, 3], mode="linear"),
    "upwards without aliasing": resize(scales=[1, 1, 2, 2], mode="linear", antialias=1),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_resize_is_written_as_the_parser_takes_it(name: str):
    graph = RESIZED[name].copy()
    assert legalized(graph, target="trt").rewrites
    (node,) = graph.nodes
    assert not node.attrs.get("antialias") and "axes" not in node.attrs
    assert node.attrs.get("coordinate_transformation_mode") != "half_pixel_symmetric"
    assert not legalized(graph, target="trt").rewrites


@pytest.mark.parametrize("sliced", [False, True])
def test_a_computed_size_becomes_scales(sliced: bool):
    """An image of a batch that is not known is doubled: its size is computed at run time."""
    nodes = [
        *([("Shape", ["x"], ["d"], {}), ("Slice", ["d", "zero", "two"], ["nc"], {})] if sliced else
          [("Shape", ["x"], ["nc"], {"start": 0, "end": 2})]),
        ("Concat", ["nc", "hw"], ["sizes"], {"axis": 0}),
        ("Resize", ["x", "", "", "sizes"], ["y"], {"mode": "nearest", "nearest_mode": "floor",
                                                  "coordinate_transformation_mode": "asymmetric"}),
    ]  # fmt: skip
    graph = network(nodes, {"x": (["n", 2, 4, 6], F)}, [("zero", ints(0)), ("two", ints(2)), ("hw", ints(8, 18))])
    assert legalized(graph, target="trt").rewrites
    assert ops(graph) == ["Resize"] and graph.constant(graph.nodes[0].inputs[2]).tolist() == [1, 1, 2, 3]


FRACTIONAL = {
    "symmetric": resize(scales=[1, 1, 1.3, 1.3], **SYMMETRIC),
    "smaller": resize(scales=[1, 1, 0.5, 0.5], mode="linear", antialias=1),
    "sizes of axes": resize(sizes=[5, 7], axes=[2, 3], mode="linear"),
    "plain": resize(scales=[1, 1, 2, 2], mode="linear"),
}


@pytest.mark.parametrize("name", FRACTIONAL)
def test_a_resize_that_would_change_stays(name: str):
    graph = FRACTIONAL[name].copy()
    assert not legalized(graph, target="trt").rewrites


def test_a_shape_that_is_computed_is_written_out():
    nodes = [
        ("Shape", ["x"], ["d"], {"end": 1}),
        ("Concat", ["d", "rest"], ["s"], {"axis": 0}),
        ("Reshape", ["x", "s"], ["y"], {}),
    ]
    graph = network(nodes, {"x": (["n", 4, 6], F)}, [("rest", ints(2, 12))])
    assert legalized(graph, target="trt").rewrites
    assert ops(graph) == ["Reshape"] and graph.constant(graph.nodes[0].inputs[1]).tolist()[1:] == [2, 12]
    known = shuffles([[2, -1]], [4, 6])
    assert not legalized(known, target="trt").rewrites
    open_ended = network([("Reshape", ["x", "s"], ["y"], {})], {"x": ([4, 6], F), "s": ([2], I64)}, ())
    context = Context()
    context.begin("legalize")
    assert not Legalize(target="trt").run(open_ended, context).rewrites


def test_constant_indices_are_narrowed_where_they_fit():
    weights = [("i", ints(0, 2))]
    graph = network([("Gather", ["x", "i"], ["y"], {"axis": 1})], {"x": ([2, 3], F)}, weights)
    assert legalized(graph, target="trt").rewrites
    assert graph.constant(graph.nodes[0].inputs[1]).dtype == np.int32
    assert not legalized(graph, target="trt").rewrites
    shape = network([("Gather", ["x", "i"], ["y"], {})], {"x": ([3], I64)}, weights, dtype=I64)
    assert not legalized(shape, target="trt").rewrites
    wide = network([("Gather", ["x", "i"], ["y"], {})], {"x": ([3], F)}, [("i", ints(2**40))])
    context = Context()
    context.begin("legalize")
    assert not Legalize(target="trt").run(wide, context).rewrites


@pytest.mark.parametrize("name", ["gelu", "quick gelu", "fused matmul", "fused conv", "skip layer norm"])
def test_the_operators_of_the_runtime_go_for_tensorrt_too(name: str):
    arguments, options = NEEDED[name]
    graph = make(*arguments, **options)
    assert legalized(graph, target="trt").rewrites
    assert all(node.domain in (None, "") for node in graph.nodes)


def test_a_plugin_is_not_noted_as_unknown():
    node = helper.make_node("EfficientNMS_TRT", ["x"], ["y"], "nms", domain="TRT")
    port = helper.make_tensor_value_info
    proto = helper.make_graph([node], "g", [port("x", F, [1])], [port("y", F, [1])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("TRT", 1)]
    context = Context()
    context.begin("legalize")
    graph = Graph.from_proto(helper.make_model(proto, opset_imports=opsets, ir_version=10))
    assert not Legalize(target="trt").run(graph, context).notes
    graph.nodes[0].domain = "mine"
    context.begin("legalize")
    assert Legalize(target="trt").run(graph, context).notes


def test_a_target_without_rules_is_refused():
    with pytest.raises(ValueError, match="tvm"):
        Legalize(target="tv")


def test_every_rule_says_why():
    for rules in RULES.values():
        assert all(rule.what and rule.why and rule.ops for rule in rules)
