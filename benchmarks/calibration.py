"""Memory and CPU time of calibration: ours against ONNX Runtime's `quantize_static`, on the same tensors and images.

Usage: python benchmarks/calibration.py [--counts 16,64] [--methods entropy] [--output FILE]

Every figure is that of a child process on one core: peak memory is its maximum resident set (VmHWM, not ru_maxrss,
which a process inherits from the one that started it), the interpreter, libraries and weights included; time is its CPU
time (user and system, which does not grow when others use
the machine) from loading the model to the ranges. That of `quantize_static` includes quantising the weights and writing
the model; what that costs shows where lines are drawn through different numbers of images. Its children may take 9 GB
of address space and ten minutes. Tensors are those that `quantize_static` calibrates; methods are left at their
defaults. Weights are random; images are noise of varying contrast.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
MEMORY_LIMIT = 9 * 10**9
TIME_LIMIT = 600


class Images(Sequence):
    """Noise that is made when it is asked for: rolled and scaled copies of one image."""

    def __init__(self, count: int, shape: Sequence[int]):
        self._count = count
        self._base = np.random.default_rng(0).standard_normal(shape, np.float32)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= self._count:
            raise IndexError
        return np.roll(self._base, 1009 * index) * np.float32(0.75 + 0.5 * (index * 7 % 16) / 16)


# -- in a child --------------------------------------------------------------------------------------------------------


def ours(path: str, tensors: list[str], method: str, count: int, shape: list[int]) -> None:
    from edgecompile import calibration
    from edgecompile.calibration_data import open_data
    from edgecompile.graph import Graph

    graph = Graph.load(path)
    data = open_data(Images(count, shape), graph.signature().inputs)
    ranges = calibration.collect(graph, data, tensors, method)
    assert len(ranges) == len(tensors)


def theirs(path: str, tensors: list[str], method: str, count: int, shape: list[int]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._images = iter(Images(count, shape))

        def get_next(self):
            return next(({"x": image} for image in self._images), None)

    with tempfile.TemporaryDirectory() as folder:
        kind = getattr(CalibrationMethod, METHODS[method])
        quantize_static(path, f"{folder}/q.onnx", Reader(), quant_format=QuantFormat.QDQ, calibrate_method=kind)


def child(request: dict[str, Any]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # ONNX Runtime then makes no threads that spin
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    arm = {"ours": ours, "theirs": theirs}[request.pop("arm")]
    before, start = _peak(), time.process_time()
    arm(**request)
    used = time.process_time() - start
    print(json.dumps({"cpu_s": used, "base_mb": before, "peak_mb": _peak()}))


def _peak() -> float:
    """Largest resident set of this process so far, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def prepare(name: str, folder: str) -> None:
    """Export a zoo model with random weights and list the tensors that `quantize_static` calibrates."""
    import torch
    from onnxruntime.quantization.calibrate import CalibraterBase
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    from edgecompile import models
    from edgecompile.graph import Graph
    from edgecompile.models.randomize import randomize

    path, shape = Path(folder) / f"{name}.onnx", list(models.ZOO[name].input_shape)
    network, example = models.create(name), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        randomize(network, 0, example)
    torch.onnx.export(network, (example,), path, dynamo=False, opset_version=17, input_names=["x"])
    model = load_model_with_shape_infer(path)
    chosen, _ = CalibraterBase(path, [*QLinearOpsRegistry, *QDQRegistry]).select_tensors_to_calibrate(model)
    graph = Graph.load(path)
    known = {n for n, t in graph.tensors().items() if graph.constant(t) is None}
    path.with_suffix(".json").write_text(json.dumps({"shape": shape, "tensors": sorted(chosen & known)}))


# -- in the parent -----------------------------------------------------------------------------------------------------


def call(function: str, argument: str, limit: float) -> str:
    """What a function of this file prints in a new process; raises what `subprocess.run` raises."""
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import calibration; calibration.{function}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), argument]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit, env=environment)
    return done.stdout


def measure(arm: str, folder: str, name: str, method: str, count: int) -> dict[str, Any]:
    """One line of the result."""
    known = json.loads((Path(folder) / f"{name}.json").read_text())
    row: dict[str, Any] = {
        "model": name,
        "arm": arm,
        "method": method,
        "images": count,
        "tensors": len(known["tensors"]),
    }
    request = {"arm": arm, "path": f"{folder}/{name}.onnx", "method": method, "count": count, **known}
    asked = Path(folder) / "request.json"
    asked.write_text(json.dumps(request))
    start = time.perf_counter()
    try:
        output = call("child(__import__('json').load(open(sys.argv[2])))", str(asked), TIME_LIMIT)
        row |= json.loads(output.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row["failed"] = f"not done after {TIME_LIMIT} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
        row["failed"] = lines[-1][:200]
    row["wall_s"] = time.perf_counter() - start
    figures = " ".join(f"{k} {row[k]:8.1f}" for k in ("peak_mb", "cpu_s", "wall_s") if k in row)
    print(f"{name:12} {arm:7} {method:10} {count:4}  {figures}  {row.get('failed', '')}", flush=True)
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the limits are about."""
    by = {(r["model"], r["arm"], r["method"], r["images"]): r for r in rows if "failed" not in r}
    found = {}
    for (name, arm, method, count), row in by.items():
        other = by.get((name, "theirs", method, count))
        if arm == "ours" and other is not None:
            found[f"{name} {method} {count}: cpu over quantize_static"] = row["cpu_s"] / other["cpu_s"]
            found[f"{name} {method} {count}: peak over quantize_static"] = row["peak_mb"] / other["peak_mb"]
    for name, method in dict.fromkeys((n, m) for n, arm, m, _ in by if arm == "ours"):
        peaks = {c: r["peak_mb"] for (n, a, m, c), r in by.items() if (n, a, m) == (name, "ours", method)}
        if len(peaks) > 1:
            few, many = min(peaks), max(peaks)
            found[f"{name} {method}: peak at {many} over that at {few} images"] = peaks[many] / peaks[few]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shvit_s4")
    parser.add_argument("--counts", default="16,64", help="images, for both")
    parser.add_argument("--long", type=int, default=512, help="images, for ours alone")
    parser.add_argument("--detector", type=int, default=512, help="images of DAMO-YOLO-T, for ours alone")
    parser.add_argument("--methods", default="minmax,entropy,percentile")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts, rows = [int(c) for c in options.counts.split(",")], []
    with tempfile.TemporaryDirectory() as folder:
        names = [options.model, *(["damoyolo_t"] if options.detector else [])]
        for name in names:
            call(f"prepare({name!r}, sys.argv[2])", folder, TIME_LIMIT)
        for method in options.methods.split(","):
            for count in counts:
                rows += [measure(arm, folder, options.model, method, count) for arm in ("ours", "theirs")]
        if options.long:
            rows.append(measure("ours", folder, options.model, "entropy", options.long))
        if options.detector:
            rows.append(measure("ours", folder, "damoyolo_t", "entropy", min(16, options.detector)))
            if options.detector > 16:
                rows.append(measure("ours", folder, "damoyolo_t", "entropy", options.detector))
    found = ratios(rows)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    if options.output:
        from common import machine

        document = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows, "ratios": found}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
