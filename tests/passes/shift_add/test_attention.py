"""Attention in its many spellings: found, rewritten to the binary forms, and what must be left alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import oracle
from edgecompile.calibration_data import open_data
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import ShiftAdd, attention, ops
from edgecompile.pipeline import Context, PassResult, Pipeline

pytest.importorskip("onnxruntime")

N, D, E = 7, 6, 5
HEAD = "(float[B,2,7,8] x) => (float[B,2,7,5] y) { q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) "
PLAIN = HEAD + "t = Transpose <perm=[0,1,3,2]> (k) "
SPELLINGS = {
    "tokens first": PLAIN + "s = MatMul (q, t) p = Softmax <axis=-1> (s) y = MatMul (p, v) }",
    "a scale after": PLAIN + "s = MatMul (q, t) c = Mul (s, half) p = Softmax (c) y = MatMul (p, v) }",
    "a divisor": PLAIN + "s = MatMul (q, t) c = Div (s, half) p = Softmax (c) y = MatMul (p, v) }",
    "a scale before": PLAIN + "r = Mul (q, half) s = MatMul (r, t) p = Softmax (s) y = MatMul (p, v) }",
    "axis 3": PLAIN + "s = MatMul (q, t) p = Softmax <axis=3> (s) y = MatMul (p, v) }",
    "channels first": HEAD
    + """q1 = Transpose <perm=[0,1,3,2]> (q) k1 = Transpose <perm=[0,1,3,2]> (k) v1 = Transpose <perm=[0,1,3,2]> (v)
         q2 = Transpose <perm=[0,1,3,2]> (q1) s = MatMul (q2, k1) p = Softmax (s) r = Transpose <perm=[0,1,3,2]> (p)
         z = MatMul (v1, r) y = Transpose <perm=[0,1,3,2]> (z) }""",
}
BIASED = (
    PLAIN
    + "s = MatMul (q, t) c = Mul (s, half) b = Add (c, bias) m = Add (mask, b) p = Softmax (m) y = MatMul (p, v) }"
)


def graph_of(text: str, opset: int = 17) -> Graph:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, d)) for n, d in (("wq", D), ("wk", D), ("wv", E))}
    weights |= {
        "half": np.float32(0.5),
        "bias": rng.standard_normal((2, N, N)),
        "mask": rng.standard_normal((1, 1, N, N)),
    }
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    for name, value in weights.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return Graph.from_proto(model)


def feeds(seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 2, N, 8)).astype(np.float32)}


def run(graph: Graph, calibrated: bool = True, **options) -> PassResult:
    data = open_data([feeds(s) for s in range(6)], graph.signature().inputs) if calibrated else None
    context = Context(calibration=data)
    context.begin("shift_add")
    return ShiftAdd(linear=False, **options).run(graph, context)


def values(x: np.ndarray) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(x @ rng.standard_normal((8, d)).astype(np.float32) for d in (D, D, E))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def thresholds(how: str, x: np.ndarray) -> tuple:
    """What queries and keys are compared with."""
    if how == "fixed":
        seen = [values(feeds(s)["x"]) for s in range(6)]
        return tuple(np.mean([unit(one[i]).mean() for one in seen]) for i in (0, 1))
    axes = (0, 1, 2, 3) if how == "batch" else (1, 2, 3)
    return tuple(unit(v).mean(axes, keepdims=True) for v in values(x)[:2])


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("how", attention.THRESHOLDS)
def test_the_angular_form_is_that_of_the_paper(how, opset):
    graph = graph_of(SPELLINGS["a scale after"], opset)
    assert len(run(graph, attention="angular", threshold=how).rewrites) == 1
    x = feeds(9, 3)["x"]
    q, k, v = values(x)
    least_q, least_k = thresholds(how, x)
    near = (unit(q) > least_q).astype(np.float32) @ ((unit(k) > least_k).astype(np.float32).swapaxes(2, 3) @ v)
    expected = unit(0.5 * v + near / np.pi)
    # One factor for each head: the root mean square length of what softmax attention gave on the calibration data.
    plain = graph_of(SPELLINGS["a scale after"], opset)
    seen = np.stack([oracle.run(plain, feeds(s))["y"] for s in range(6)])
    length = np.sqrt(np.square(seen).sum(-1).mean((0, 1, 3)))[:, None, None]
    np.testing.assert_allclose(oracle.run(graph, {"x": x})["y"], length * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("form", attention.FORMS)
def test_every_spelling_becomes_the_same_function(name, form):
    graph = graph_of(SPELLINGS[name])
    result = run(graph, attention=form)
    assert len(result.rewrites) == 1, result.notes
    graph.check(graph_of(SPELLINGS[name]).signature())
    assert {n.op for n in graph.nodes if n.domain == ops.DOMAIN} == {
        "BinaryAngularAttention" if form == "angular" else "BinarySoftmaxAttention"
    }
    assert not any(n.op == "Softmax" for n in graph.nodes)
    if form == "angular" and "scale" not in name and name != "a divisor":
        first = graph_of(SPELLINGS["tokens first"])
        run(first, attention=form)
        np.testing.assert_allclose(
            oracle.run(graph, feeds(9, 2))["y"], oracle.run(first, feeds(9, 2))["y"], rtol=1e-4, atol=1e-5
        )


def test_the_hamming_form_counts_common_ones_and_keeps_biases():
    graph = graph_of(BIASED)
    assert len(run(graph, attention="hamming").rewrites) == 1
    x = feeds(9, 2)["x"]
    q, k, v = values(x)
    least_q, least_k = thresholds("fixed", x)
    count = (unit(q) > least_q).astype(np.float32) @ (unit(k) > least_k).astype(np.float32).swapaxes(2, 3)
    node = next(n for n in graph.nodes if n.domain == ops.DOMAIN)
    scale = node.inputs[5].values.item()
    biases = {t.name: t.values for n in graph_of(BIASED).nodes for t in n.inputs if t.name in ("bias", "mask")}
    score = scale * count + biases["bias"] + biases["mask"]
    share = np.exp(score - score.max(-1, keepdims=True))
    expected = share / share.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(oracle.run(graph, {"x": x})["y"], expected, rtol=1e-4, atol=1e-5)
    assert scale > 0


@pytest.mark.parametrize("how", attention.THRESHOLDS)
def test_only_the_threshold_of_the_authors_makes_images_depend_on_each_other(how):
    graph = graph_of(SPELLINGS["tokens first"])
    notes = " ".join(map(str, run(graph, attention="angular", threshold=how).notes))
    x = np.concatenate([feeds(9)["x"], 3 * np.abs(feeds(10)["x"]) + 2])
    together = oracle.run(graph, {"x": x})["y"][0]
    alone = oracle.run(graph, {"x": x[:1]})["y"][0]
    assert np.allclose(together, alone, atol=1e-5) == (how != "batch")
    assert ("companions" in notes) == (how == "batch")


ALONE = {
    "a bias in the angular form": (BIASED, "no place for its bias"),
    "the other axis": (
        PLAIN + "s = MatMul (q, t) p = Softmax <axis=2> (s) y = MatMul (p, v) }", "over the queries",
    ),
    "scores used twice": (
        PLAIN + "s = MatMul (q, t) p = Softmax (s) z = MatMul (p, v) m = ReduceMax (s) y = Add (z, m) }",
        "used elsewhere",
    ),
    "shares used twice": (
        PLAIN + "s = MatMul (q, t) p = Softmax (s) z = MatMul (p, v) m = ReduceMax (p) y = Add (z, m) }",
        "values alone",
    ),
    "a bias that is scaled": (
        PLAIN + "s = MatMul (q, t) b = Add (s, bias) c = Mul (b, half) p = Softmax (c) y = MatMul (p, v) }",
        "scaled after",
    ),
    "a classifier": ("(float[B,2,7,8] x) => (float[B,2,7,5] y) { s = MatMul (x, wv) y = Softmax (s) }", "no attention"),
    "a gate": (HEAD + "s = Mul (q, k) p = Softmax (s) m = ReduceMax <axes=[3]> (p) y = Mul (v, m) }", "no attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_such_attention_is_left_alone(name):
    text, why = ALONE[name]
    graph = graph_of(text)
    before = oracle.run(graph, feeds(9))["y"]
    result = run(graph, attention="angular")
    assert not result.rewrites
    assert why in " ".join(map(str, result.notes))
    assert np.array_equal(oracle.run(graph, feeds(9))["y"], before)


def test_without_calibration_data_attention_is_not_guessed():
    with pytest.raises(InputError, match="calibration"):
        run(graph_of(SPELLINGS["tokens first"]), calibrated=False, attention="angular")


def test_wrong_options_are_refused():
    for options in ({"attention": "linear"}, {"threshold": "mean"}):
        with pytest.raises(ValueError):
            ShiftAdd(**options)


@pytest.mark.parametrize("form", attention.FORMS)
@pytest.mark.parametrize("how", ["fixed", "image"])
def test_the_torch_module_computes_the_same_and_trains_through_it(form, how):
    torch = pytest.importorskip("torch")
    from edgecompile.passes.shift_add import to_torch

    graph = graph_of(SPELLINGS["channels first"])
    run(graph, attention=form, threshold=how)
    module = to_torch(graph)
    x = torch.from_numpy(feeds(9, 2)["x"])
    y = module(x)
    np.testing.assert_allclose(y.detach().numpy(), oracle.run(graph, feeds(9, 2))["y"], rtol=1e-4, atol=1e-5)
    y.square().sum().backward() if form == "hamming" else y.sum().backward()
    gradients = {n: p.grad.abs().sum().item() for n, p in module.named_parameters() if n in ("wq", "wk", "wv")}
    assert len(gradients) == 3
    assert all(g > 0 for g in gradients.values())


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def trained(request, tmp_path_factory) -> Graph:
    """A block of ShiftAddViT, exported."""
    torch = pytest.importorskip("torch")
    from edgecompile.models.shiftaddvit import pvtv2_b0_block

    torch.manual_seed(0)
    block, x = pvtv2_b0_block(3).eval(), torch.randn(1, 196, 160)
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    dynamo = request.param == "dynamo"
    torch.onnx.export(block, (x,), path, dynamo=dynamo, opset_version=20 if dynamo else 17)
    graph = Graph.load(path)
    Pipeline.parse("clean,fold_norm").run(graph)
    return graph


def test_a_block_trained_with_angular_attention_is_lowered_to_the_same_function(trained):
    graph = trained.copy()
    given = oracle.random_feeds(graph.signature().inputs, 3)
    before = next(iter(oracle.run(graph, given).values()))
    context = Context()
    context.begin("shift_add")
    result = ShiftAdd(linear=False).run(graph, context)
    assert [r.what for r in result.rewrites] == ["angular attention, as it was trained"]
    graph.check(trained.signature())
    assert sum(n.op == "BinaryAngularAttention" for n in graph.nodes) == 1
    assert not any(n.op in ("Greater", "Clip") for n in graph.nodes)
    after = next(iter(oracle.run(graph, given).values()))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("change", ["another factor", "another value", "no length"])
def test_what_only_resembles_it_is_left_alone(trained, change):
    graph = trained.copy()
    for node in graph.nodes:
        if (
            change == "another factor"
            and node.op == "Mul"
            and any(
                (c := graph.constant(t)) is not None and c.size == 1 and abs(float(c.reshape(-1)[0]) - 0.5) < 1e-6
                for t in node.inputs
            )
        ):
            node.inputs[1] = graph.new_constant("factor", np.float32(0.25))
        if change == "another value" and node.op == "MatMul" and graph.producer(node.inputs[0]).op == "Transpose":
            node.inputs[1] = graph.insert("Relu", [node.inputs[1]], replaces=[node]).outputs[0]
        if change == "no length" and node.op == "ReduceL2":
            node.op = "ReduceL1"
    graph.tidy()
    context = Context()
    context.begin("shift_add")
    assert not ShiftAdd(linear=False).run(graph, context).rewrites
