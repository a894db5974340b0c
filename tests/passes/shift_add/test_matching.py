"""Attention as exporters write it: windows, one operator for all of it, dynamic batches, the networks of the zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper, parser
from test_attention import PLAIN, D, E, N, feeds, graph_of, unit, values
from test_attention import run as rewritten

from edgecompile import frontend, models, oracle
from edgecompile.calibration_data import open_data
from edgecompile.graph import Graph
from edgecompile.models.randomize import randomize
from edgecompile.passes.shift_add import ShiftAdd, attention, fused, ops
from edgecompile.pipeline import Context, PassResult, Pipeline

pytest.importorskip("onnxruntime")

# -- windows -----------------------------------------------------------------------------------------------------------

WINDOWS = 3
SWIN = """(float[%s,3,2,7,8] image) => (float[M,2,7,5] y) {
    x = Reshape (image, begin) q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
    t = Transpose <perm=[0,1,3,2]> (k) s = MatMul (q, t) c = Add (s, bias) f = Reshape (c, five) m = Add (f, windows)
    r = Reshape (m, four) p = Softmax (r) y = MatMul (p, v) }"""


def swin(
    five: list[int], mask: tuple[int, ...], four: tuple[int, ...] = (-1, 2, N, N), images: str = "2"
) -> tuple[Graph, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, d)) for n, d in (("wq", D), ("wk", D), ("wv", E))}
    weights |= {"bias": rng.standard_normal((2, N, N)), "windows": rng.standard_normal(mask)}
    known = {name: value.astype(np.float32) for name, value in weights.items()}
    shapes = {"begin": np.asarray([-1, 2, N, 8]), "five": np.asarray(five), "four": np.asarray(four)}
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {SWIN % images}')
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in {**known, **shapes}.items())
    return Graph.from_proto(model), known


def pictures(seed: int, images: int) -> dict[str, np.ndarray]:
    return {"image": feeds(seed, images * WINDOWS)["x"].reshape(images, WINDOWS, 2, N, 8)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", [(WINDOWS, 1, N, N), (1, WINDOWS, 2, N, N)])
def test_masks_of_windows_are_kept(dynamic, mask):
    graph, known = swin([-1 if dynamic else 2, WINDOWS, 2, N, N], mask, images="I" if dynamic else "2")
    result = _run(graph, [pictures(s, 1 if dynamic else 2) for s in range(3)], attention="hamming")
    assert len(result.rewrites) == 1, result.notes
    assert not any(n.op == "Softmax" for n in graph.nodes)
    node = next(n for n in graph.nodes if n.domain == ops.DOMAIN)
    scale, least = node.inputs[5].values.item(), [float(t.values) for t in node.inputs[3:5]]
    given = pictures(9, 4 if dynamic else 2)
    q, k, v = values(given["image"].reshape(-1, 2, N, 8))
    count = (unit(q) > least[0]).astype(np.float32) @ (unit(k) > least[1]).astype(np.float32).swapaxes(2, 3)
    score = (scale * count + known["bias"]).reshape(-1, WINDOWS, 2, N, N) + known["windows"]
    expected = _softmax(score.reshape(-1, 2, N, N)) @ v
    np.testing.assert_allclose(oracle.run(graph, given)["y"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - _softmax(scale * count + known["bias"]) @ v).max() > 0.01, "the mask does nothing"


def _softmax(x: np.ndarray) -> np.ndarray:
    share = np.exp(x - x.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def test_an_axis_that_is_split_elsewhere_is_no_window():
    # 2 images of 3 windows of 2 heads, read as 6 windows of one head each.
    graph, _ = swin([2, WINDOWS * 2, 1, N, N], (WINDOWS * 2, 1, N, N), (6, 2, N, N))
    result = _run(graph, [pictures(s, 2) for s in range(3)], attention="hamming")
    assert not result.rewrites
    assert "another shape" in " ".join(map(str, result.notes))
    graph, _ = swin([2, WINDOWS, 2, N, N], (WINDOWS, 1, N, N))
    result = _run(graph, [pictures(s, 2) for s in range(3)], attention="angular")
    assert not result.rewrites and "no place for its bias" in " ".join(map(str, result.notes))


def _run(graph: Graph, given: list[dict[str, np.ndarray]], **options) -> PassResult:
    context = Context(calibration=open_data(given, graph.signature().inputs))
    context.begin("shift_add")
    return ShiftAdd(linear=False, **options).run(graph, context)


# -- one operator ------------------------------------------------------------------------------------------------------

HEADS = 2
SHAPED = "(float[B,5,12] q, float[B,5,12] k, float[B,5,12] v) => (float[B,5,12] y) { %s }"
OPERATORS = {
    "standard, 3 axes": (SHAPED % "y = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v)", {}),
    "standard, 4 axes": (
        "(float[B,2,5,6] q, float[B,2,5,6] k, float[B,2,5,6] v) => (float[B,2,5,6] y) "
        "{ y = Attention <scale=0.3> (q, k, v) }", {},
    ),
    "standard, a mask": (
        SHAPED % "y = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v, mask)", {"mask": (2, 5, 5)},
    ),
    "multi-head": (SHAPED % "y = com.microsoft.MultiHeadAttention <num_heads=2> (q, k, v)", {}),
    "multi-head, biases": (
        SHAPED % 'y = com.microsoft.MultiHeadAttention <num_heads=2, scale=0.2> (q, k, v, bias, "", mask)',
        {"bias": (36,), "mask": (1, 2, 5, 5)},
    ),
    "with its weights": (
        "(float[B,5,8] q) => (float[B,5,12] y) { y = com.microsoft.Attention <num_heads=2> (q, w, bias) }",
        {"w": (8, 36), "bias": (36,)},
    ),
}  # fmt: skip


def operator(text: str, shapes: dict[str, tuple[int, ...]], **attributes) -> Graph:
    text = text.replace(', "", ', ", , ").replace("com.microsoft.", "com.microsoft::")
    start = text.index("{")
    name = "com.microsoft::" if "::" in text else ""
    signature, body = text[:start], text[start:].replace("com.microsoft::", "").replace(", , ", ", none, ")
    model = parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]> g {signature} {body}')
    rng = np.random.default_rng(0)
    for node in model.graph.node:
        node.domain = "com.microsoft" if name else ""
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        node.input[:] = ["" if n == "none" else n for n in node.input]
    for key, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), key))
    return Graph.from_proto(model)


def given_to(graph: Graph, seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {t.name: rng.standard_normal((batch, *t.shape[1:])).astype(np.float32) for t in graph.inputs}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_operator_is_the_products_it_stands_for(name):
    graph = operator(*OPERATORS[name])
    graph.infer_shapes()
    reference, (one,) = graph.copy(), fused.find(graph)
    assert not one.why
    fused.write(graph, one.node)
    graph.tidy()
    graph.infer_shapes()
    (found,) = attention.find(graph)
    assert isinstance(found, attention.Attention), found
    for batch in (1, 3):
        given = given_to(graph, 3, batch)
        expected = oracle.run(reference, given)["y"]
        np.testing.assert_allclose(oracle.run(graph, given)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_one_operator_takes_the_binary_form(name):
    graph = operator(*OPERATORS[name])
    result = _run(graph, [given_to(graph, s, 1) for s in range(4)], attention="hamming")
    assert [r.what for r in result.rewrites] == [
        "attention as products and a Softmax", "softmax attention -> hamming, binary queries and keys",
    ]  # fmt: skip
    assert not any(n.op in ("Softmax", "Attention", "MultiHeadAttention") for n in graph.nodes)
    assert np.isfinite(oracle.run(graph, given_to(graph, 9))["y"]).all()


LEFT = {
    "causal": ("standard, 3 axes", {"is_causal": 1}, "is_causal"),
    "capped": ("standard, 3 axes", {"softcap": 5.0}, "softcap"),
    "one direction": ("with its weights", {"unidirectional": 1}, "unidirectional"),
}


@pytest.mark.parametrize("name", LEFT)
def test_one_operator_that_does_more_is_left_alone(name):
    which, attributes, why = LEFT[name]
    graph = operator(*OPERATORS[which], **attributes)
    result = _run(graph, [given_to(graph, s, 1) for s in range(4)], attention="hamming")
    assert not result.rewrites
    assert why in " ".join(map(str, result.notes))
    assert any(n.op in ("Attention", "MultiHeadAttention") for n in graph.nodes)


def test_grouped_queries_and_masks_of_truths_are_left_alone():
    grouped = operator(
        "(float[B,5,12] q, float[B,5,6] k, float[B,5,6] v) => (float[B,5,12] y) "
        "{ y = Attention <q_num_heads=2, kv_num_heads=1> (q, k, v) }", {},
    )  # fmt: skip
    truths = operator(
        "(float[B,5,12] q, float[B,5,12] k, float[B,5,12] v, bool[5,5] m) => (float[B,5,12] y) "
        "{ y = Attention <q_num_heads=2, kv_num_heads=2> (q, k, v, m) }", {},
    )  # fmt: skip
    for graph, why in ((grouped, "share keys"), (truths, "not added")):
        graph.infer_shapes()
        (one,) = fused.find(graph)
        assert why in one.why


# -- exported ----------------------------------------------------------------------------------------------------------


def test_a_dynamic_batch_of_an_export(tmp_path: Path):
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 2, 6).permute(2, 0, 3, 1, 4)
            share = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1)
            return self.proj((share @ v).transpose(1, 2).reshape(b, n, 12))

    torch.manual_seed(0)
    path = tmp_path / "block.onnx"
    dynamic = {"x": {0: torch.export.Dim("b", min=2, max=64)}}
    torch.onnx.export(Block().eval(), (torch.randn(3, 9, 12),), path, dynamo=True, dynamic_shapes=dynamic)
    graph = Graph.load(path)
    Pipeline.parse("clean").run(graph)
    name = graph.inputs[0].name
    rng = np.random.default_rng(0)
    given = [{name: rng.standard_normal((2, 9, 12)).astype(np.float32)} for _ in range(4)]
    result = _run(graph, given, attention="angular", window=3)
    assert len(result.rewrites) == 1, result.notes
    for batch in (2, 5):
        x = rng.standard_normal((batch, 9, 12)).astype(np.float32)
        together = next(iter(oracle.run(graph, {name: x}).values()))
        assert together.shape == (batch, 9, 12)
        first = next(iter(oracle.run(graph, {name: x[:2]}).values()))
        np.testing.assert_allclose(together[:2], first, rtol=1e-4, atol=1e-5)


# Attentions, and those of them with a bias or mask.
EXPORTED = {"shvit_s1": (9, 0), "efficientvit_m0": (24, 24), "repavit_tiny": (12, 0), "repaswin_tiny": (12, 12)}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_all_attentions_of_the_networks_of_the_zoo_are_found(name: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    example = torch.zeros(models.ZOO[name].input_shape)
    # Attention biases are zero in a network that was not trained, and vanish.
    graph = frontend.from_module(randomize(models.create(name)).eval(), example, folder=tmp_path).graph
    Pipeline.parse("clean,fold_norm").run(graph, verify=False)
    graph.infer_shapes()
    found = list(attention.find(graph))
    count, biased = EXPORTED[name]
    assert all(isinstance(one, attention.Attention) for one in found), found
    assert len(found) == count == sum(n.op == "Softmax" for n in graph.nodes)
    assert sum(bool(one.biases) for one in found if isinstance(one, attention.Attention)) == biased
    # The other axis of one of them, and one is not found.
    softmax = next(n for n in graph.nodes if n.op == "Softmax")
    softmax.attrs["axis"] = 1
    assert sum(isinstance(one, attention.Attention) for one in attention.find(graph)) == count - 1


# -- the window of values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3, 5])
def test_a_window_of_values_leaves_the_least_error(window):
    text = PLAIN + "s = MatMul (q, t) p = Softmax (s) y = MatMul (p, v) }"
    reference, graph = graph_of(text), graph_of(text)
    result = rewritten(graph, attention="angular", threshold="image", window=window)
    assert len(result.rewrites) == 1
    seen = [feeds(s) for s in range(6)]
    expected = np.concatenate([oracle.run(reference, f)["y"] for f in seen])
    found = np.concatenate([oracle.run(graph, f)["y"] for f in seen])
    x = np.concatenate([f["x"] for f in seen])
    q, k, v = values(x)
    mean = [unit(t).mean((1, 2, 3), keepdims=True) for t in (q, k)]
    near = (unit(q) > mean[0]).astype(np.float32) @ ((unit(k) > mean[1]).astype(np.float32).swapaxes(2, 3) @ v)
    raw = unit(0.5 * v + near / np.pi)
    half = window // 2
    padded = np.pad(v, ((0, 0), (0, 0), (half, half), (0, 0)))
    for head in range(2):
        columns = [raw[:, head], *(padded[:, head, t : t + N] for t in range(window))]
        system = np.stack([c.reshape(-1) for c in columns], 1)
        target = expected[:, head].reshape(-1)
        best = np.linalg.lstsq(system, target, rcond=None)[0]
        if window:
            np.testing.assert_allclose(found[:, head].reshape(-1), system @ best, rtol=1e-3, atol=1e-4)
        else:
            assert np.square(found[:, head].reshape(-1) - target).sum() > np.square(system @ best - target).sum()


def test_values_whose_tokens_are_the_last_axis_have_the_same_window():
    rng = np.random.default_rng(3)
    head = "(float[2,6,9] q, float[2,6,9] k, float[2,{}] v) => (float[2,{}] y) {{ t = Transpose <perm=[0,2,1]> (q) "
    head += "s = MatMul (t, k) p = Softmax (s) "
    plain = graph_of(head.format("9,4", "9,4") + "y = MatMul (p, v) }")
    turned = graph_of(head.format("4,9", "4,9") + "r = Transpose <perm=[0,2,1]> (p) y = MatMul (v, r) }")
    shapes = {"q": (2, 6, 9), "k": (2, 6, 9), "v": (2, 9, 4)}
    given = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]
    swapped = [{**f, "v": np.ascontiguousarray(f["v"].swapaxes(1, 2))} for f in given]
    for graph, seen in ((plain, given), (turned, swapped)):
        assert len(_run(graph, seen, attention="angular", window=3).rewrites) == 1
    expected, found = oracle.run(plain, given[0])["y"], oracle.run(turned, swapped[0])["y"]
    np.testing.assert_allclose(found.swapaxes(1, 2), expected, rtol=1e-4, atol=1e-6)
    assert any(n.op == "Conv" for n in turned.nodes)
