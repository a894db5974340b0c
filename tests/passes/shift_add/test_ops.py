"""The operators of domain ai.edgecompile, run by ONNX Runtime through their bodies, against numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops

CASES = [(kind, bits, group) for kind, widths in codes.WIDTHS.items() for bits in widths for group in (0, 8, 7)]


def model(coded: codes.Coded, x: np.ndarray, *, conv: bool, rows: int, strides=(1, 1), opset=18) -> onnx.ModelProto:
    name = ("BinaryCoded" if coded.kind == "binary" else "Shift") + ("Conv" if conv else "Linear")
    weights = {"planes": codes.pack(coded.codes, coded.bits), "exponents": coded.exponents}
    if coded.kind != "binary":
        weights["levels"] = codes.book(coded.kind, coded.bits)
    attributes = {"columns": coded.codes.shape[1], "group": coded.group}
    if conv:
        attributes["strides"] = list(strides)
    node = helper.make_node(name, ["x", *weights], ["y"], domain=ops.DOMAIN, **attributes)
    shape = ["n", rows, "h", "w"] if conv else [*x.shape[:-1], rows]
    graph = helper.make_graph(
        [node],
        "coded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[ops.function(name, opset)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(("kind", "bits", "group"), CASES)
def test_the_body_decodes_what_was_packed(kind, bits, group):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((30, 45)).astype(np.float32)
    coded = codes.encode(weight, kind, bits, group=group)
    # The identity shows the decoded weights themselves, bit for bit.
    x = np.eye(45, dtype=np.float32)
    proto = model(coded, x, conv=False, rows=30)
    onnx.checker.check_model(proto, full_check=True)
    assert np.array_equal(run(proto, x).T, coded.decode())
    image = rng.standard_normal((2, 45, 6, 5)).astype(np.float32)
    found = run(model(coded, image, conv=True, rows=30, strides=(2, 1)), image)
    np.testing.assert_allclose(found, np.einsum("oc,nchw->nohw", coded.decode(), image[:, :, ::2]), atol=1e-4)


@pytest.mark.parametrize("opset", [ops.OPSET, 17, 20, 23])
@pytest.mark.parametrize("kind", ["pot", "binary"])
def test_the_bodies_are_valid_in_every_opset_since_theirs(opset, kind):
    coded = codes.encode(np.random.default_rng(4).standard_normal((6, 9)).astype(np.float32), kind, 4)
    x = np.eye(9, dtype=np.float32)
    proto = model(coded, x, conv=False, rows=6, opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    assert np.array_equal(run(proto, x).T, coded.decode())
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model(coded, x, conv=False, rows=6, opset=11), full_check=True)


def test_other_codes_give_another_answer():
    weight = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    coded = codes.encode(weight, "pot", 4)
    x = np.eye(16, dtype=np.float32)
    proto = model(coded, x, conv=False, rows=8)
    planes = next(t for t in proto.graph.initializer if t.name == "planes")
    changed = numpy_helper.to_array(planes).copy()
    changed[0, 0, 0] ^= 1
    planes.CopyFrom(numpy_helper.from_array(changed, "planes"))
    different = coded.decode() != run(proto, x).T
    assert different[0, 0] and different.sum() == 1


@pytest.mark.parametrize("conv", [False, True])
def test_onnx_runtime_folds_the_decoding_away(conv, tmp_path):
    weight = np.random.default_rng(2).standard_normal((8, 16)).astype(np.float32)
    x = np.ones((1, 16, 3, 3) if conv else (4, 16), np.float32)
    options = onnxruntime.SessionOptions()
    # Beyond this level a convolution is put into a layout of the machine's own.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    proto = model(codes.encode(weight, "sp2", 4), x, conv=conv, rows=8)
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found == ["Conv" if conv else "MatMul"]


def test_a_graph_keeps_the_functions_through_loading_copying_and_saving(tmp_path):
    weight = np.random.default_rng(3).standard_normal((8, 16)).astype(np.float32)
    coded = codes.encode(weight, "pot", 4)
    x = np.eye(16, dtype=np.float32)
    onnx.save(model(coded, x, conv=False, rows=8), tmp_path / "in.onnx")
    graph = Graph.load(tmp_path / "in.onnx").copy()
    graph.infer_shapes()
    graph.tidy()
    graph.check()
    graph.save(tmp_path / "out.onnx")
    assert np.array_equal(run(onnx.load(tmp_path / "out.onnx"), x).T, coded.decode())
