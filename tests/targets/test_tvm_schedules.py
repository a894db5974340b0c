"""The schedules compute what numpy computes, for shapes that no tile divides, on one thread and on two."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.schedules import activation, conv, dense, depthwise, moves, tile, transposed, winograd
from edgecompile.targets.tvm.schedules.tile import Choice, Shape, Vectors

tvm = pytest.importorskip("tvm")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def chosen():
    return options.parse({"threads": 1})


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def have(chosen) -> Vectors:
    return tile.vectors(options.device(chosen))


def computed(chosen, define, arrays, shape, parallel=False, family: Any = tile) -> np.ndarray:
    """What a kernel computes from arrays, once scheduled and compiled; the last arrays may be bias and residual."""
    from tvm import te

    inputs = [te.placeholder(a.shape, name=f"i{n}") for n, a in enumerate(arrays)]
    function = te.create_prim_func([*inputs, define(*inputs)])
    module = family.schedule(tvm.IRModule({"main": function}), have(chosen), parallel=parallel)
    assert "vectorized" in str(module)
    assert ("parallel" in str(module)) == parallel
    library = tvm.compile(module, target=tvm.target.Target(dict(chosen.target)))
    result = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    library["main"](*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


def choose(chosen, *sizes: int) -> Shape:
    return tile.choose(*sizes, tile.vectors(options.device(chosen)))


@pytest.mark.parametrize(
    "lead, depth, n, parallel",
    [((1,), 3, 7, False), ((49,), 48, 80, False), ((2, 7, 7), 13, 40, False), ((197,), 24, 100, True)],
)
def test_product_with_a_constant(chosen, lead, depth, n, parallel):
    a, b = random(*lead, depth), random(depth, n)
    shape = choose(chosen, int(np.prod(lead)), n, depth)
    packed = dense.pack(b, shape.columns)
    found = computed(chosen, lambda x, w: dense.product(x, w, n, shape.rows), [a, packed], (*lead, n), parallel)
    np.testing.assert_allclose(found, a @ b, rtol=1e-4, atol=1e-5)


def test_a_product_with_other_weights_is_another(chosen):
    a, b = random(5, 8), random(8, 20)
    shape = choose(chosen, 5, 20, 8)
    packed = dense.pack(b, shape.columns)
    packed[0, 3, 2] += 1
    found = computed(chosen, lambda x, w: dense.product(x, w, 20, shape.rows), [a, packed], (5, 20))
    assert not np.allclose(found, a @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "left, right, parallel",
    [((7, 5), (5, 3), False), ((2, 3, 7, 5), (2, 3, 5, 33), True), ((4, 1, 9, 16), (3, 16, 49), False)],
)
def test_product_of_activations(chosen, left, right, parallel):
    a, b = random(*left), random(*right)
    shape = choose(chosen, left[-2], right[-1], left[-1])
    wanted = a @ b
    found = computed(
        chosen, lambda x, y: dense.batched(x, y, shape.rows, shape.columns), [a, b], wanted.shape, parallel
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows_outside", [False, True])
def test_threads_share_rows_where_columns_are_cut(chosen, rows_outside):
    """A register tile that is wider than what is left of the columns is a loop of its own, on two threads too."""
    m, depth, n = 784, 12, 40
    a, b = random(m, depth), random(depth, n)
    shape = Shape(5, 3 * have(chosen).lanes if have(chosen).lanes < 16 else 32)
    packed = dense.pack(b, shape.columns)
    registers = replace(have(chosen), choice=Choice(rows_outside=rows_outside))
    for width, uneven in ((n, True), (packed.shape[0] * shape.columns, False)):
        module, arrays = product_of(a, packed, width, shape.rows)
        module = tile.schedule(module, registers, parallel=True)
        text = str(module)
        assert (tile.APART in text) == uneven
        result = tvm.runtime.tensor(np.full((m, width), np.nan, np.float32))
        library = tvm.compile(module, target=tvm.target.Target(dict(chosen.target)))
        library["main"](*arrays, result)
        np.testing.assert_allclose(result.numpy()[:, :n], a @ b, rtol=1e-4, atol=1e-5)
    few, _ = product_of(a[:20], packed, n, shape.rows)
    assert tile.APART not in str(tile.schedule(few, registers, parallel=True))


def product_of(a: np.ndarray, packed: np.ndarray, n: int, rows: int) -> tuple[Any, list[Any]]:
    """The kernel of a product, not scheduled yet, and its arguments."""
    from tvm import te

    x, w = (te.placeholder(v.shape, name=f"i{i}") for i, v in enumerate((a, packed)))
    function = te.create_prim_func([x, w, dense.product(x, w, n, rows)])
    return tvm.IRModule({"main": function}), [tvm.runtime.tensor(a), tvm.runtime.tensor(packed)]


@pytest.mark.parametrize("shape", [(1, 37, 4, 17), (1, 3, 1, 2), (1, 64, 40, 16)])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("case", ["one scale", "scale by channel", "turned"])
def test_elements(chosen, shape, parallel, case):
    """A quantisation, its inverse, and a sum with a tensor whose axes are in another order."""
    from tvm import te, tirx

    a = random(*shape)
    b = random(*((shape[0], shape[2], shape[1], shape[3]) if case == "turned" else shape))
    s = np.abs(random(1, 1, 1, shape[3] if case == "scale by channel" else 1)) + np.float32(0.1)
    x, y, scale = (te.placeholder(v.shape, name=f"i{i}") for i, v in enumerate((a, b, s)))
    wide = case == "scale by channel"

    def steps(n: Any, h: Any, w: Any, c: Any) -> Any:
        return tirx.Cast("int8", tirx.nearbyint(x(n, h, w, c) / scale(0, 0, 0, c if wide else 0)))

    quantised = te.compute(shape, steps, name="steps")
    result = te.compute(
        shape,
        lambda n, h, w, c: (
            tirx.Cast("float32", quantised(n, h, w, c)) + (y(n, w, h, c) if case == "turned" else y(n, h, w, c))
        ),
        name="sum",
    )
    module = tvm.IRModule({"main": te.create_prim_func([x, y, scale, result])})
    done = moves.elements(module, have(chosen), parallel=parallel)
    size = int(np.prod(shape))
    assert ("vectorized" in str(done)) == (case == "one scale" and size >= have(chosen).lanes)
    assert ("parallel" in str(done)) == (parallel and size >= 1 << 14)
    library = tvm.compile(done, target=tvm.target.Target(dict(chosen.target)))
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    library["main"](*map(tvm.runtime.tensor, (a, b, s)), out)
    wanted = np.rint(a / s) + (b.transpose(0, 2, 1, 3) if case == "turned" else b)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-6)


def test_a_sum_over_elements_is_left_alone(chosen):
    from tvm import te

    x = te.placeholder((40, 16), name="x")
    k: Any = te.reduce_axis((0, 16), "k")
    module = tvm.IRModule({"main": te.create_prim_func([x, te.compute((40,), lambda i: te.sum(x[i, k], axis=k))])})
    assert moves.elements(module, have(chosen), parallel=True) is module


CONVOLUTIONS = [  # batch, height, width, in, out, kernel, strides, padding, dilation
    (1, 9, 11, 3, 10, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    (2, 7, 7, 16, 33, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (1, 10, 13, 5, 16, (1, 5), (1, 2), (0, 3, 0, 1), (1, 1)),
    (1, 12, 12, 4, 24, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    (1, 8, 8, 6, 7, (2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
]
DEPTHWISE = [
    (1, 9, 9, 20, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    (2, 11, 10, 48, 48, (5, 5), (2, 2), (2, 2, 2, 2), (1, 1)),
    (1, 7, 7, 33, 33, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
]


def reference(x, weight, strides, padding, dilation=(1, 1), groups=1) -> np.ndarray:
    torch = pytest.importorskip("torch")
    top, left, bottom, right = padding
    planar = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), (left, right, top, bottom)),
        torch.tensor(weight).permute(0, 3, 1, 2),
        stride=strides,
        dilation=dilation,
        groups=groups,
    )
    return planar.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("case, parallel", [*itertools.product(CONVOLUTIONS, [False]), (CONVOLUTIONS[0], True)])
def test_convolution(chosen, case, parallel):
    batch, height, width, inner, out, kernel, strides, padding, dilation = case
    x, weight = random(batch, height, width, inner), random(out, *kernel, inner)
    wanted = reference(x, weight, strides, padding, dilation)
    shape = choose(chosen, wanted.shape[2], out, weight[0].size)
    found = computed(
        chosen,
        lambda i, w: conv.convolution(i, w, out, shape.rows, strides, padding, dilation, 1),
        [x, conv.pack(weight, shape.columns)],
        wanted.shape,
        parallel,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("out, groups, left", [(24, 4, 2), (66, 2, 2), (20, 5, 1)])
def test_grouped_convolution(chosen, out, groups, left):
    x, weight = random(1, 6, 7, 3 * groups), random(out, 3, 3, 3)
    wanted = reference(x, weight, (1, 1), (1, 1, 1, 1), groups=groups)
    values, groups = conv.merged(weight, groups, 9)
    assert groups == left
    shape = choose(chosen, 7, out // groups, values[0].size)
    parts = np.concatenate([conv.pack(p, shape.columns) for p in values.reshape(groups, -1, *values.shape[1:])])
    found = computed(
        chosen,
        lambda i, w: conv.convolution(i, w, out, shape.rows, (1, 1), (1, 1, 1, 1), (1, 1), groups),
        [x, parts],
        wanted.shape,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "case, depth, parallel", [*((c, 1, False) for c in DEPTHWISE), (DEPTHWISE[0], 2, True), (DEPTHWISE[1], 3, False)]
)
def test_depthwise_convolution(chosen, case, depth, parallel):
    batch, height, width, _, out, kernel, strides, padding, dilation = case
    x, weight = random(batch, height, width, out * depth), random(out, *kernel, depth)
    wanted = reference(x, weight, strides, padding, dilation, groups=out)
    shape = depthwise.choose(wanted.shape[2], have(chosen))
    found = computed(
        chosen,
        lambda i, w: depthwise.convolution(i, w, out, shape.rows, strides, padding, dilation),
        [x, conv.pack(weight, shape.columns)],
        wanted.shape,
        parallel,
        depthwise,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize(
    "stride, kernel, padding, extra, dilation", [(2, 4, 1, 0, 1), (2, 3, 0, 1, 1), (3, 2, 2, 0, 2)]
)
def test_transposed_convolution(chosen, of_each, stride, kernel, padding, extra, dilation):
    torch = pytest.importorskip("torch")
    x, weight = random(2, 5, 6, 9), random(9, 1 if of_each else 20, kernel, kernel)
    out = 9 if of_each else 20
    wanted = torch.nn.functional.conv_transpose2d(
        torch.tensor(x).permute(0, 3, 1, 2),
        torch.tensor(weight),
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=9 if of_each else 1,
    )
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    values = transposed.dilated(weight.transpose((0, 2, 3, 1) if of_each else (1, 2, 3, 0)), (dilation, dilation))
    shape = transposed.choose(wanted.shape[2], out, values[0].size, stride, have(chosen))
    given = (out, shape.rows, (padding, padding), wanted.shape[1:3], of_each)
    found = computed(
        chosen,
        lambda i, w: transposed.convolution(i, w, *given),
        [x, transposed.pack(values, (stride, stride), (padding, padding), shape.columns)],
        wanted.shape,
        parallel=extra == 1,
        family=transposed,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_transposed_convolution_multiplies_no_zeros_between_pixels():
    packed = transposed.pack(np.ones((16, 4, 4, 3), np.float32), (2, 2), (1, 1), 16)
    assert packed.shape == (2, 2, 1, 2, 2, 3, 16)
    assert packed.all()
    assert not transposed.pack(np.ones((16, 3, 3, 3), np.float32), (2, 2), (1, 1), 16).all()


# -- Winograd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_winograds_matrices_convolve(m):
    back, weights, forth = winograd.matrices(m)
    x, g = RNG.standard_normal(m + 2), RNG.standard_normal(3)
    found = back @ ((weights @ g) * (forth @ x))
    np.testing.assert_allclose(found, np.correlate(x, g, "valid"), rtol=1e-12, atol=1e-12)
    assert not np.allclose(found, np.convolve(x, g, "valid"))


WINOGRAD = [  # batch, height, width, in, out, m, block, rows, padding
    (1, 9, 11, 66, 75, 2, (2, 3), 3, (1, 1, 1, 1)),
    (2, 13, 10, 20, 68, 4, (2, 2), 4, (1, 1, 1, 1)),
    (1, 8, 8, 5, 16, 4, (1, 2), 2, (0, 2, 1, 0)),
    (1, 18, 17, 8, 16, 2, (2, 2), 4, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(
    "case, parallel", [*itertools.product(WINOGRAD, [False]), *itertools.product(WINOGRAD[1::2], [True])]
)
def test_winograd_with_bias_residual_and_activation(chosen, case, parallel):
    from tvm import te

    batch, height, width, inner, out, m, block, rows, padding = case
    x, weight, bias = random(batch, height, width, inner), random(out, 3, 3, inner), random(out)
    plain = reference(x, weight, (1, 1), padding)
    residual, columns = random(*plain.shape), have(chosen).lanes

    def define(i: Any, w: Any, b: Any, r: Any) -> Any:
        y = winograd.convolution(i, w, out, rows, padding, block)
        z = te.compute(y.shape, lambda *at: y(*at) + b[at[3]], name="bias")
        return te.compute(y.shape, lambda *at: activation.sigmoid(z(*at)) * z(*at) + r(*at), name="end")

    packed = winograd.pack(weight, m, columns)
    found = computed(chosen, define, [x, packed, bias, residual], plain.shape, parallel, winograd)
    z = (plain + bias).astype(np.float64)
    wanted = z / (1 + np.exp(-z)) + residual
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(found - plain).max() > 1e-1


@pytest.mark.parametrize("size, loops", [(14, 5), (36, 1)])
def test_threads_share_the_blocks_of_winograd_or_where_they_are_few_each_step_of_one(chosen, size, loops):
    import tvm
    from tvm import te

    x, weight = te.placeholder((1, size, size, 16)), random(16, 3, 3, 16)
    packed = te.placeholder(winograd.pack(weight, 2, 16).shape)
    y = winograd.convolution(x, packed, 16, 4, (1, 1, 1, 1), (4, 4))
    module = tvm.IRModule({"main": te.create_prim_func([x, packed, y])})
    assert str(winograd.schedule(module, have(chosen), parallel=True)).count("T.parallel(") == loops
    assert "T.parallel(" not in str(winograd.schedule(module, have(chosen), parallel=False))


def test_winograd_with_other_weights_is_another(chosen):
    x, weight = random(1, 8, 8, 16), random(16, 3, 3, 16)
    packed = winograd.pack(weight, 4, 16)
    packed[7, 0, 3, 2] += 1
    given = (16, 1, (1, 1, 1, 1), (1, 1))
    found = computed(
        chosen, lambda i, w: winograd.convolution(i, w, *given), [x, packed], (1, 8, 8, 16), family=winograd
    )
    assert not np.allclose(found, reference(x, weight, (1, 1), (1, 1, 1, 1)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("have", [Vectors(16, 32), Vectors(8, 16), Vectors(4, 32)])
@pytest.mark.parametrize("sizes", [(1, 56, 56, 64, 64), (2, 14, 14, 192, 192), (1, 40, 40, 152, 192)])
def test_winograd_pays_for_many_channels(have, sizes):
    plan = winograd.choose(*sizes, have)
    assert plan is not None
    assert plan.block[0] * plan.block[1] % plan.shape.rows == 0


@pytest.mark.parametrize("sizes", [(1, 224, 224, 3, 32), (1, 8, 8, 512, 512), (1, 56, 56, 4, 4)])
def test_winograd_does_not_pay_for_few_channels_or_few_pixels(sizes):
    assert winograd.choose(*sizes, Vectors(16, 32)) is None


def test_winograds_error_is_measured():
    weight = random(40, 3, 3, 48)
    small, large = winograd.error(weight, 2), winograd.error(weight, 4)
    assert 1e-8 < small < large < 3e-6


def convolution_call(weight: np.ndarray, size: int, **attrs: Any) -> Any:
    from tvm import relax

    groups = attrs.get("groups", 1)
    x: Any = relax.Var("x", relax.TensorType((1, size, size, weight.shape[3] * groups), "float32"))
    operator: Any = relax.op.nn.conv2d
    call = operator(x, relax.const(weight), data_layout="NHWC", kernel_layout="OHWI", **attrs)
    return relax.BlockBuilder().normalize(call)


def legal(weight: np.ndarray, **attrs: Any) -> Any:
    from tvm import relax

    builder = relax.BlockBuilder()
    return winograd.legalize(builder, convolution_call(weight, 28, **{"padding": (1, 1), **attrs}), Vectors(16, 32))


def test_winograd_is_for_dense_3x3_of_stride_1():
    weight = random(64, 3, 3, 64)
    assert legal(weight) is not None
    refused = [
        legal(weight, strides=(2, 2)),
        legal(weight, dilation=(2, 2)),
        legal(weight, groups=2),
        legal(random(64, 5, 5, 64)),
        legal(random(64, 1, 1, 64)),
        legal(random(64, 3, 3, 3)),
    ]
    assert refused == [None] * len(refused)


def test_winograd_is_refused_beyond_its_error_budget(monkeypatch):
    def name(call: Any) -> str:
        return call.args[0].name_hint

    weight = random(64, 3, 3, 64)
    assert name(legal(weight)) == "winograd4"
    monkeypatch.setattr(winograd, "_BUDGET", (winograd.error(weight, 2) + winograd.error(weight, 4)) / 2)
    assert name(legal(weight)) == "winograd2"
    monkeypatch.setattr(winograd, "_BUDGET", 1e-9)
    assert legal(weight) is None


@pytest.mark.parametrize("have", [Vectors(16, 32), Vectors(8, 16), Vectors(4, 32)])
@pytest.mark.parametrize("rows, columns", [(1, 1000), (49, 448), (196, 384), (7, 3), (3136, 64)])
def test_a_tile_fits_the_registers_and_is_no_larger_than_the_result(have, rows, columns):
    shape = tile.choose(rows, columns, 64, have)
    wide = shape.columns // have.lanes
    assert shape.columns % have.lanes == 0
    assert shape.rows * wide + wide + 1 <= have.count
    assert shape.rows <= rows
    assert shape.columns < columns + have.lanes * 8


def test_a_tile_that_divides_the_rows_is_preferred():
    assert 49 % tile.choose(49, 448, 448, Vectors(16, 32)).rows == 0
    assert tile.choose(53, 448, 448, Vectors(16, 32)).rows > 1


def test_vectors_follow_the_features():
    assert tile.vectors("x86_64 avx avx2 avx512f") == Vectors(16, 32)
    assert tile.vectors("x86_64 avx avx2 fma") == Vectors(8, 16)
    assert tile.vectors("x86_64") == Vectors(4, 16)
    assert tile.vectors("aarch64 asimd") == Vectors(4, 32)


def test_packed_matrices_hold_every_column_once():
    matrix = random(5, 20)
    packed = dense.pack(matrix, 16)
    assert packed.shape == (2, 5, 16)
    np.testing.assert_array_equal(packed[1, :, 3], matrix[:, 19])
    assert not packed[1, :, 4:].any()


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu", "erf", "gelu"])
def test_activations(chosen, name):
    from tvm import te

    torch = pytest.importorskip("torch")
    function = {"exp": torch.exp, "erf": torch.erf}.get(name) or getattr(torch.nn.functional, name)
    x = np.concatenate([np.linspace(-20, 20, 4001), [-1e4, -86.5, 0.0, 1e-30, 80.0]]).astype(np.float32)
    given = te.placeholder(x.shape, name="x")
    result = te.compute(x.shape, lambda i: getattr(activation, name)(given(i)), name="y")
    library = tvm.compile(te.create_prim_func([given, result]), target=tvm.target.Target(dict(chosen.target)))
    found = tvm.runtime.tensor(np.full_like(x, np.nan))
    library["main"](tvm.runtime.tensor(x), found)
    wanted = function(torch.tensor(x, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=2e-6 if name in ("silu", "gelu") else 6e-7)
    assert not np.allclose(found.numpy()[:-1], wanted[1:], rtol=1e-6, atol=2e-6)
