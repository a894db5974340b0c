"""Export a module and compare ONNX Runtime with torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

TOLERANCE = 1e-5


def export(model: nn.Module, x: torch.Tensor, path: Path, *, dynamo: bool, dynamic: bool = False) -> onnx.ModelProto:
    """Export an eval-mode module with one input, optionally with a dynamic batch axis."""
    options: dict = {}
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif dynamic:
        options["dynamic_axes"] = {"x": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, input_names=["x"], verbose=False, **options)
    return onnx.load(path)


def error(model: nn.Module, x: torch.Tensor, path: Path) -> float:
    """The largest max|err| / max|ref| over the outputs, ONNX Runtime without optimisations against torch."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = model.eval()(x)
    wanted = (wanted,) if isinstance(wanted, torch.Tensor) else wanted
    got = session.run(None, {"x": x.numpy()})
    assert len(got) == len(wanted)
    assert [g.shape for g in got] == [tuple(w.shape) for w in wanted]
    return max(float(np.abs(g - w.numpy()).max() / w.abs().max()) for g, w in zip(got, wanted, strict=True))


def assert_exports(
    model: nn.Module, x: torch.Tensor, path: Path, *, dynamo: bool, dynamic: bool = False
) -> onnx.ModelProto:
    """Export and compare at the batch size of ``x`` and, with a dynamic batch axis, at another one."""
    proto = export(model, x, path, dynamo=dynamo, dynamic=dynamic)
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert dim.HasField("dim_param") == dynamic
    assert error(model, x, path) <= TOLERANCE
    if dynamic:
        assert error(model, torch.cat((x, -x[:1])), path) <= TOLERANCE
    return proto
