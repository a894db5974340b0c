"""Attention's kernels: rows of softmax and normalisation against torch, and products that read through views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgecompile.targets.tvm import options, schedules
from edgecompile.targets.tvm.schedules import norm, rows, softmax, views
from edgecompile.targets.tvm.schedules.tile import Vectors

tvm = pytest.importorskip("tvm")
torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
AVX2 = {"threads": 1, "mcpu": "haswell", "mattr": "+avx2,+fma"}


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lowered(define: Any, arrays: list[np.ndarray], given: Any = None) -> tuple[Any, Any]:
    """The module of our kernels for what ``define`` makes of variables, and the options."""
    from tvm import relax

    chosen = options.parse(given or {"threads": 1})
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"i{n}", relax.TensorType(a.shape, str(a.dtype))) for n, a in enumerate(arrays)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(define(builder.emit, *inputs))
        builder.emit_func_output(result)
    with tvm.target.Target(dict(chosen.target)):
        steps = [
            relax.transform.LegalizeOps(schedules.legalizations(chosen), list(schedules.LATER)),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.DeadCodeElimination(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
        module = tvm.transform.Sequential(steps)(builder.get())
        return schedules.apply(module, chosen), chosen


def kernels(module: Any) -> list[str]:
    return sorted(v.name_hint for v in module.functions if v.name_hint != "main")


def computed(define: Any, *arrays: np.ndarray, given: Any = None, own: bool | None = True) -> np.ndarray:
    """What the kernels compute from arrays; ``own``: all of them are ours, or none is."""
    from tvm import relax

    module, chosen = lowered(define, list(arrays), given)
    found = [f for v, f in module.functions.items() if v.name_hint != "main"]
    assert own is None or all(("tirx.is_scheduled" in f.attrs) == own for f in found)
    library: Any = tvm.compile(module, target=tvm.target.Target(dict(chosen.target)))
    return relax.VirtualMachine(library, tvm.cpu())["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def double(x: np.ndarray) -> Any:
    return torch.tensor(x, dtype=torch.float64)


def softmax_of(emit: Any, x: Any) -> Any:
    from tvm import relax

    return relax.op.nn.softmax(x, -1)


# -- softmax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, given",
    [
        ((1, 6, 19, 197), None),
        ((1, 49), None),
        ((3, 5, 17), None),
        ((2, 7), None),
        ((4, 1), None),
        ((2, 3, 1024), None),
        ((8, 33), {"threads": 2}),
        ((3, 49), AVX2),
    ],
)
def test_softmax_is_torchs(shape, given):
    x = random(*shape) * 5
    found = computed(softmax_of, x, given=given)
    wanted = torch.softmax(double(x), -1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=2e-6)
    assert shape[-1] == 1 or not np.allclose(found, torch.softmax(double(x), 0).numpy(), rtol=1e-3)


def test_softmax_of_large_values_and_of_masked_ones():
    x = random(3, 37) * 3
    x[0] += 1e4
    x[1] -= 1e30
    x[2, 5:] = -np.inf
    found, wanted = computed(softmax_of, x), torch.softmax(double(x), -1).numpy()
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-7)
    assert wanted[2, :5].sum() > 0.999


def test_a_scale_and_a_mask_before_softmax_are_part_of_it():
    def define(emit: Any, x: Any, mask: Any) -> Any:
        from tvm import relax

        return relax.op.nn.softmax(emit(relax.op.add(emit(relax.op.multiply(x, relax.const(0.5))), mask)), -1)

    x, mask = random(2, 3, 21), random(3, 21)
    module, _ = lowered(define, [x, mask])
    assert len(kernels(module)) == 1
    wanted = torch.softmax(double(x) * 0.5 + double(mask), -1).numpy()
    np.testing.assert_allclose(computed(define, x, mask), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("axis, dtype", [(1, "float32"), (-1, "float16")])
def test_another_softmax_keeps_tvms_lowering(axis, dtype):
    from tvm import relax

    x = (random(2, 5, 9) * 2).astype(dtype)
    found = computed(lambda emit, v: relax.op.nn.softmax(v, axis), x, own=False)
    wanted = torch.softmax(double(x), axis).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6 if dtype == "float32" else 2e-3)


# -- layer normalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, given",
    [
        ((1, 7, 384), None),
        ((5, 50), None),
        ((2, 3, 7), None),
        ((1, 96), None),
        ((9, 40), {"threads": 2}),
        ((4, 37), AVX2),
    ],
)
def test_layer_norm_is_torchs(shape, given):
    from tvm import relax

    x, gamma, beta = random(*shape) * 3 + 100, random(shape[-1]), random(shape[-1])
    found = computed(lambda emit, *a: relax.op.nn.layer_norm(*a, axes=[-1], epsilon=1e-5), x, gamma, beta, given=given)
    normalize = torch.nn.functional.layer_norm
    wanted = normalize(double(x), shape[-1:], double(gamma), double(beta), 1e-5).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=5e-5)
    assert not np.allclose(found, normalize(double(x), shape[-1:], double(gamma)).numpy(), atol=1e-2)


def test_what_follows_a_layer_norm_is_part_of_it():
    from tvm import relax

    def define(emit: Any, x: Any, gamma: Any, beta: Any) -> Any:
        return relax.op.nn.relu(emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1])))

    x, gamma, beta = random(3, 19), random(19), random(19)
    assert len(kernels(lowered(define, [x, gamma, beta])[0])) == 1
    wanted = torch.nn.functional.layer_norm(double(x), (19,), double(gamma), double(beta)).relu().numpy()
    np.testing.assert_allclose(computed(define, x, gamma, beta), wanted, rtol=1e-4, atol=2e-6)


def test_another_layer_norm_keeps_tvms_lowering():
    from tvm import relax

    x, gamma, beta = random(2, 5, 9), random(5, 9), random(5, 9)
    found = computed(lambda emit, *a: relax.op.nn.layer_norm(*a, axes=[1, 2]), x, gamma, beta, own=False)
    wanted = torch.nn.functional.layer_norm(double(x), (5, 9), double(gamma), double(beta)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, name", [(softmax, "softmax"), (norm, "layer_norm")])
def test_rows_of_unknown_length_are_left_alone(family, name):
    from tvm import relax, tirx

    length = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((3, length), "float32"))
    weight = relax.Var("w", relax.TensorType((length,), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, weight]):
        norm_of: Any = relax.op.nn.layer_norm
        call = relax.op.nn.softmax(x, -1) if name == "softmax" else norm_of(x, weight, weight, [1])
        assert family.legalize(builder, builder.normalize(call), Vectors(8, 16)) is None
        builder.emit_func_output(x)


@pytest.mark.parametrize("extent, lanes", [(16, 16), (17, 16), (197, 16), (31, 16), (9, 8), (1, 1), (4, 4)])
def test_every_value_of_a_row_counts_once(extent, lanes):
    from tvm import tirx
    from tvm.sym import Analyzer

    taken = np.zeros(extent, int)
    for vector in range(rows.vectors(extent, lanes)):
        for lane in range(lanes):
            at = rows.position(extent, lanes, vector, lane)
            kept = Analyzer().simplify(rows.once(extent, lanes, vector, lane, tirx.const(1, "float32")))
            taken[int(at)] += int(kept.value)
    assert (taken == 1).all()


# -- views -------------------------------------------------------------------------------------------------------------


def attention(emit: Any, x: Any, heads: int, tokens: int, size: int) -> Any:
    from tvm import relax

    op = relax.op
    parts = emit(op.split(x, 3, axis=-1))
    q, k, v = (
        emit(op.permute_dims(emit(op.reshape(emit(parts[i]), (1, tokens, heads, size))), [0, 2, 1, 3]))
        for i in range(3)
    )
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))
    return op.matmul(emit(op.nn.softmax(scores, -1)), v)


@pytest.mark.parametrize("tokens, given", [(21, None), (16, None), (13, {"threads": 2}), (21, AVX2)])
def test_attention_reads_queries_keys_and_values_where_they_are(tokens, given):
    heads, size = 2, 24
    x = random(1, tokens, 3 * heads * size)

    def define(emit: Any, v: Any) -> Any:
        return attention(emit, v, heads, tokens, size)

    names = kernels(lowered(define, [x], given)[0])
    assert [n.rstrip("0123456789") for n in names] == ["batch_matmul", "batch_matmul", "softmax"]
    q, k, v = double(x).reshape(tokens, 3, heads, size).permute(1, 2, 0, 3)
    wanted = (torch.softmax(q @ k.transpose(1, 2), -1) @ v).numpy()[None]
    found = computed(define, x, given=given)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_product_of_transposes_is_the_transpose_of_a_product():
    from tvm import relax

    def define(emit: Any, x: Any, y: Any) -> Any:
        turned = [emit(relax.op.permute_dims(v, [0, 2, 1])) for v in (x, y)]
        return relax.op.matmul(*turned)

    x, y = random(1, 20, 33), random(1, 9, 20)
    module, _ = lowered(define, [x, y])
    assert [n.rstrip("0123456789") for n in kernels(module)] == ["batch_matmul", "transpose"]
    assert "prepare_operand_turned" not in str(module)
    found = computed(define, x, y, own=None)
    np.testing.assert_allclose(found, x.transpose(0, 2, 1) @ y.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


SHAPES = [
    ((2, 12), (2, 3, 4)),
    ((1, 197, 1, 12), (197, 2, 6)),
    ((4, 6), (24,)),
    ((4, 6), (3, 8)),
    ((1, 1), (1,)),
    ((2, 3, 4), (6, 1, 4)),
]


@pytest.mark.parametrize("before, after", SHAPES)
def test_a_view_is_where_numpy_says(before, after):
    from tvm import relax

    x = np.arange(np.prod(before)).reshape(before)
    found = looked_through(lambda emit, v: relax.op.reshape(v, after), before)
    wanted = x.reshape(after)
    assert found.shape == wanted.shape
    for index in np.ndindex(*wanted.shape):
        assert x[tuple(found.at(index))] == wanted[index]


def looked_through(define: Any, shape: tuple[int, ...]) -> Any:
    """The view of its argument that ``define`` makes."""
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        result = builder.emit(define(builder.emit, x))
        view = views.behind(builder, result)
        builder.emit_func_output(result)
    return view


def test_views_compose():
    from tvm import relax

    def define(emit: Any, v: Any) -> Any:
        part = emit(emit(relax.op.split(v, [4, 10], axis=1))[1])
        turned = emit(relax.op.permute_dims(part, [2, 1, 0]))
        sliced = emit(relax.op.strided_slice(turned, axes=[0], begin=[1], end=[5], strides=[2]))
        return relax.op.expand_dims(sliced, 0)

    x = np.arange(3 * 12 * 6).reshape(3, 12, 6)
    wanted = x[:, 4:10].transpose(2, 1, 0)[1:5:2][None]
    found = looked_through(define, x.shape)
    assert found.shape == wanted.shape and found.source.name == "x"
    for index in np.ndindex(*wanted.shape):
        assert x[tuple(found.at(index))] == wanted[index]
    assert [found.step(a) for a in range(4)] == [0, 2, 6, 72]


def test_what_computes_is_no_view():
    from tvm import relax

    found = looked_through(lambda emit, v: relax.op.nn.relu(emit(relax.op.reshape(v, (6,)))), (2, 3))
    assert found.source.name != "x"
    assert found.at([4]) == [4]


# -- concatenations ----------------------------------------------------------------------------------------------------


def joined(emit: Any, x: Any, y: Any, z: Any) -> Any:
    from tvm import relax

    turned = emit(relax.op.permute_dims(z, [0, 2, 1]))
    return relax.op.nn.relu(emit(relax.op.concat([x, emit(relax.op.multiply(y, relax.const(2.0))), turned], 2)))


@pytest.mark.parametrize("given", [None, {"threads": 2}, AVX2])
def test_a_concatenation_asks_nothing_within_its_parts(given):
    x, y, z = random(1, 6, 5), random(1, 6, 16), random(1, 9, 6)
    found = computed(joined, x, y, z, given=given)
    wanted = np.maximum(np.concatenate([x, 2 * y, z.transpose(0, 2, 1)], 2), 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert len(kernels(lowered(joined, [x, y, z])[0])) == 1


def test_a_concatenation_along_other_axes_and_of_integers():
    from tvm import relax

    for axis, dtype in ((0, "float32"), (1, "uint8"), (1, "int64")):
        x, y = ((random(3, 4, 5) * 9).astype(dtype) for _ in range(2))
        found = computed(lambda emit, *v, axis=axis: relax.op.concat(list(v), axis), x, y)
        np.testing.assert_array_equal(found, np.concatenate([x, y], axis))


def test_a_concatenation_with_a_sum_keeps_tvms_lowering():
    from tvm import te, topi

    from edgecompile.targets.tvm.schedules import moves

    x, y = te.placeholder((4, 8), name="x"), te.placeholder((4, 8), name="y")
    module = tvm.IRModule({"main": te.create_prim_func([x, y, topi.sum(topi.concatenate([x, y], 1), 1)])})
    assert moves.schedule(module, Vectors(8, 16), parallel=False) is module
