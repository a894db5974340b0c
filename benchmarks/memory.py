"""Peak memory and time of `edgecompile opt --passes clean` on large models, against their size on disk.

Usage: python benchmarks/memory.py [--external-mb 2500] [--inline-mb 400] [--output benchmarks/results/memory.json]

The model is a chain of MatMul and Relu with random weights. Peak memory is the child's maximum resident set
(ru_maxrss), in which every mapped page that was touched counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from common import machine
from onnx import TensorProto, helper, numpy_helper

WIDTH = 2048
LAYER_BYTES = WIDTH * WIDTH * 4


def write_model(path: Path, megabytes: int, external: bool) -> int:
    """Write the chain; the size of its files in bytes."""
    layers = max(1, megabytes * 10**6 // LAYER_BYTES)
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    data = path.with_suffix(".bin")
    with open(data, "wb") if external else open(os.devnull, "wb") as file:
        for i in range(layers):
            values = (rng.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5).astype(np.float32)
            if external:
                tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=values.shape)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", file.tell()), ("length", values.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(values.tobytes())
            else:
                tensor = numpy_helper.from_array(values, f"w{i}")
            weights.append(tensor)
            nodes += [
                helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], name=f"layer{i}"),
                helper.make_node("Relu", [f"m{i}"], [f"r{i}"]),
                helper.make_node("Identity", [f"r{i}"], [f"x{i + 1}"]),
            ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, [1, WIDTH])],
        initializer=weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size + (data.stat().st_size if external else 0)


def measure(megabytes: int, external: bool) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.onnx"
        writer = "import sys; sys.path.insert(0, sys.argv[1]); import memory, pathlib; "
        writer += "print(memory.write_model(pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == 'True'))"
        arguments = [
            sys.executable,
            "-c",
            writer,
            str(Path(__file__).parent),
            str(source),
            str(megabytes),
            str(external),
        ]
        size = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
        command = [sys.executable, "-m", "edgecompile", "opt", "in.onnx", "-o", "out.onnx", "--passes", "clean"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"edgecompile failed with status {status}")
        model = onnx.load(Path(folder) / "out.onnx", load_external_data=False)
        if any(n.op_type == "Identity" for n in model.graph.node):
            raise SystemExit("the pass did nothing")
    kind = "external data" if external else "inline"
    return {"weights": kind, "model_mb": size / 1e6, "peak_mb": usage.ru_maxrss / 1e3,
            "peak_over_size": usage.ru_maxrss * 1e3 / size, "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--external-mb", type=int, default=2500)
    parser.add_argument("--inline-mb", type=int, default=400)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [measure(options.external_mb, True), measure(options.inline_mb, False)]
    for row in rows:
        print(
            "{weights:14} {model_mb:7.0f} MB  peak {peak_mb:7.0f} MB = {peak_over_size:.2f}x  {seconds:.1f} s".format(
                **row
            )
        )
    if options.output:
        document = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
