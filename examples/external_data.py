"""Write a plain ONNX file that keeps its weights as external data, with the onnx package alone.

python examples/external_data.py net.onnx
edgecompile build net.onnx --target ort
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write(path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "conv_w": 0.1 * rng.standard_normal((32, 3, 3, 3)),
        "bn_scale": rng.uniform(0.5, 1.5, 32),
        "bn_bias": 0.1 * rng.standard_normal(32),
        "bn_mean": 0.1 * rng.standard_normal(32),
        "bn_var": rng.uniform(0.5, 2.0, 32),
        "fc_w": 0.1 * rng.standard_normal((32, 10)),
        "fc_b": 0.1 * rng.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv_w"], ["conv"], "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "bn_scale", "bn_bias", "bn_mean", "bn_var"], ["bn"], "bn"),
        helper.make_node("Relu", ["bn"], ["relu"], "relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc_w", "fc_b"], ["logits"], "fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=0, convert_attribute=False
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
