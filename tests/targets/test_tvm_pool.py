"""Maxima over windows, separably: equal to torch's for every overhang, and left alone where they could not be."""

from __future__ import annotations

import numpy as np
import pytest

from edgecompile.targets.tvm import options
from edgecompile.targets.tvm.schedules import pool, tile

tvm = pytest.importorskip("tvm")
RNG = np.random.default_rng(0)


def legalized(shape, kernel, strides, padding, dilation, ceil_mode=False, dtype="uint8"):
    """The module that a max_pool2d over NHWC becomes, or None where it keeps TVM's lowering."""
    from tvm import relax

    chosen = options.parse({"threads": 1})
    have = tile.vectors(options.device(chosen))
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        call = builder.normalize(
            relax.op.nn.max_pool2d(x, kernel, strides, padding, dilation, ceil_mode, layout="NHWC")
        )
        made = pool.legalize(builder, call, have)
        builder.emit_func_output(builder.emit(call if made is None else made))
    return None if made is None else (builder.get(), chosen, have)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32"])
@pytest.mark.parametrize(
    "kernel, strides, padding, ceil_mode, parallel",
    [
        ((5, 5), (1, 1), (2, 2, 2, 2), False, False),
        ((3, 2), (2, 2), (1, 0, 1, 0), False, True),
        ((3, 3), (2, 2), (0, 0, 0, 0), True, False),
        ((13, 13), (1, 1), (6, 6, 6, 6), False, False),
    ],
)
def test_maxima_are_torchs(dtype, kernel, strides, padding, ceil_mode, parallel):
    torch = pytest.importorskip("torch")
    x = RNG.integers(-128, 128, (2, 9, 11, 24))
    x = (x - 200.0 if dtype == "float32" else x + 128 if dtype == "uint8" else x).astype(dtype)
    made = legalized(x.shape, kernel, strides, padding, (1, 1), ceil_mode, dtype)
    assert made is not None
    module, chosen, have = made
    (name,) = [v.name_hint for v in module.functions if v.name_hint != "main"]
    done = pool.schedule(
        tvm.IRModule({"main": module[name].with_attr("global_symbol", "main")}), have, parallel=parallel
    )
    assert "vectorized" in str(done) and ("parallel" in str(done)) == parallel
    planar = torch.tensor(x.astype(np.float64)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.max_pool2d(planar, kernel, strides, padding[:2], ceil_mode=ceil_mode)
    wanted = wanted.permute(0, 2, 3, 1).numpy().astype(dtype)
    result = tvm.runtime.tensor(np.zeros(wanted.shape, dtype))
    library = tvm.compile(done, target=tvm.target.Target(dict(chosen.target)))
    library["main"](tvm.runtime.tensor(x), result)
    np.testing.assert_array_equal(result.numpy(), wanted)


def test_what_the_edge_cannot_stand_for_is_left_alone():
    shape = (1, 9, 9, 8)
    assert legalized(shape, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)) is not None
    assert legalized(shape, (3, 3), (1, 1), (1, 1, 1, 1), (2, 2)) is None
    assert legalized(shape, (3, 3), (1, 1), (3, 3, 3, 3), (1, 1)) is None
