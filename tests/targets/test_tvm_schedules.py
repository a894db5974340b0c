"""The schedules compute what numpy computes, for shapes that no tile divides, on one thread and on two."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.schedules import activation, conv, dense, tile
from edgecompile.targets.tvm.schedules.tile import Shape, Vectors

tvm = pytest.importorskip("tvm")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def chosen():
    return options.parse({"threads": 1})


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def computed(chosen, define, arrays, shape, parallel=False) -> np.ndarray:
    """What a kernel computes from arrays, once scheduled and compiled."""
    from tvm import te

    inputs = [te.placeholder(a.shape, name=f"i{n}") for n, a in enumerate(arrays)]
    function = te.create_prim_func([*inputs, define(*inputs)])
    have = tile.vectors(options.device(chosen))
    module = tile.schedule(tvm.IRModule({"main": function}), have, parallel=parallel)
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


@pytest.mark.parametrize(
    "case, depthwise, parallel",
    [
        *itertools.product(CONVOLUTIONS, [False], [False]),
        *itertools.product(DEPTHWISE, [True], [False]),
        (CONVOLUTIONS[0], False, True),
        (DEPTHWISE[0], True, True),
    ],
)
def test_convolution(chosen, case, depthwise, parallel):
    torch = pytest.importorskip("torch")
    batch, height, width, inner, out, kernel, strides, padding, dilation = case
    x, weight = random(batch, height, width, inner), random(out, *kernel, 1 if depthwise else inner)
    top, left, bottom, right = padding
    wanted = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), (left, right, top, bottom)),
        torch.tensor(weight).permute(0, 3, 1, 2),
        stride=strides,
        dilation=dilation,
        groups=inner if depthwise else 1,
    )
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    shape = choose(chosen, wanted.shape[2], out, weight[0].size)
    found = computed(
        chosen,
        lambda i, w: conv.convolution(i, w, out, shape.rows, strides, padding, dilation, depthwise),
        [x, conv.pack(weight, shape.columns)],
        wanted.shape,
        parallel,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "stride, kernel, padding, extra, dilation", [(2, 4, 1, 0, 1), (2, 3, 0, 1, 1), (3, 2, 2, 0, 2)]
)
def test_transposed_convolution(chosen, depthwise, stride, kernel, padding, extra, dilation):
    torch = pytest.importorskip("torch")
    x, weight = random(1, 5, 6, 9), random(9, 1 if depthwise else 20, kernel, kernel)
    out = 9 if depthwise else 20
    wanted = torch.nn.functional.conv_transpose2d(
        torch.tensor(x).permute(0, 3, 1, 2),
        torch.tensor(weight),
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=9 if depthwise else 1,
    )
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    turned = weight[:, :, ::-1, ::-1].transpose((0, 2, 3, 1) if depthwise else (1, 2, 3, 0))
    shape, reach = choose(chosen, wanted.shape[2], out, turned[0].size), (kernel - 1) * dilation
    before, size = (reach - padding,) * 2, [d + reach for d in wanted.shape[1:3]]
    found = computed(
        chosen,
        lambda i, w: conv.transposed(
            i, w, out, shape.rows, (stride, stride), before, size, (dilation, dilation), depthwise
        ),
        [x, conv.pack(turned, shape.columns)],
        wanted.shape,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


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
