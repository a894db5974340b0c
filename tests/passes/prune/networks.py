"""Small graphs that the tests of pruning share."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgecompile.graph import Graph


def chain(norm: bool = False, seed: int = 0) -> Graph:
    """Three convolutions with Relu between, a depthwise one, a mean and a linear head; ``x [1, 3, 12, 12]``.

    Groups: ``a`` (16), ``b`` (24, with its depthwise convolution), ``c`` (16).
    """
    rng = np.random.default_rng(seed)
    shapes = {"a.w": (16, 3, 3, 3), "a.b": (16,), "b.w": (24, 16, 1, 1), "b.b": (24,), "d.w": (24, 1, 3, 3),
              "d.b": (24,), "c.w": (16, 24, 1, 1), "c.b": (16,), "h.w": (5, 16), "h.b": (5,)}  # fmt: skip
    weights = {n: rng.standard_normal(s) / np.sqrt(max(1, np.prod(s[1:]))) for n, s in shapes.items()}
    weights |= {n: 0.2 * v for n, v in weights.items() if n.endswith(".b")}
    nodes = [
        helper.make_node("Conv", ["x", "a.w", "a.b"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "b.w", "b.b"], ["b"]),
        helper.make_node("Relu", ["b"], ["br"]),
        helper.make_node("Conv", ["br", "d.w", "d.b"], ["d"], pads=[1, 1, 1, 1], group=24),
        helper.make_node("Conv", ["d", "c.w", "c.b"], ["c"]),
        helper.make_node("Relu", ["n" if norm else "c"], ["cr"]),
        helper.make_node("GlobalAveragePool", ["cr"], ["m"]),
        helper.make_node("Flatten", ["m"], ["f"]),
        helper.make_node("Gemm", ["f", "h.w", "h.b"], ["y"], transB=1),
    ]
    if norm:
        weights |= {"n.s": 1 + 0.2 * rng.standard_normal(16), "n.t": 0.1 * rng.standard_normal(16),
                    "n.m": 0.1 * rng.standard_normal(16), "n.v": 0.5 + rng.random(16)}  # fmt: skip
        nodes.insert(6, helper.make_node("BatchNormalization", ["c", "n.s", "n.t", "n.m", "n.v"], ["n"]))
    for node in nodes:
        node.name = node.output[0]
    made = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    return Graph.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def samples(count: int = 12, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Inputs of :func:`chain` whose channels are correlated, as those of images are."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((3, 3))
    return [
        {"x": np.einsum("ij,njhw->nihw", mix, rng.standard_normal((1, 3, 12, 12))).astype(np.float32)}
        for _ in range(count)
    ]
