"""Zoo models as int8 through the targets `tvm` and `ort`: one Q/DQ graph, latency ratio, and error of both to float.

Usage: python benchmarks/tvm_int8.py [NAME ...] [--rules ort_cpu] [--seconds 6] [--threads 1] [--output FILE]

Each model runs in a process of its own, exported with random weights at its native resolution, calibrated on random
inputs, and quantised by the rules of ONNX Runtime (`--rules tvm`: by those of TVM; ONNX Runtime still gets its own).
Both engines are interleaved in one run, six times with fresh sessions. Ratios below 1 mean that TVM's code is faster;
the interval in brackets has 95 % confidence. SNR is that of the worst output over fresh random inputs, real kernels
against ONNX Runtime's float32; `simulated` is the Q/DQ graph computed in floats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ["repvgg_a0", "shvit_s1", "efficientvit_m0", "damoyolo_t"]
CALIBRATED, JUDGED = 4, 8  # samples


def quantised(graph: Any, name: str) -> Any:
    """A quantised copy of a graph, by the rules of a table."""
    from edgecompile import calibration, oracle, qdq
    from edgecompile.calibration_data import open_data
    from edgecompile.placement import TABLES, place

    rules, ports = TABLES[name], graph.signature().inputs
    data = open_data([oracle.random_feeds(ports, 100 + i) for i in range(CALIBRATED)], ports)
    points = list(place(graph, rules).points)
    ranges = calibration.collect(graph, data, points, "minmax", symmetric=rules.symmetric)
    return qdq.quantized(graph, rules, ranges)


def run_one(name: str, rules: str, seconds: float, threads: int) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from tvm_target import exported

    from edgecompile import measure, oracle, qdq
    from edgecompile.targets.ort import OrtTarget
    from edgecompile.targets.tvm import TvmTarget

    graph = exported(name)
    graphs = {"tvm": quantised(graph, rules), "ort": quantised(graph, "ort_cpu")}
    targets = {"tvm": TvmTarget(), "ort": OrtTarget()}
    samples = [oracle.random_feeds(graph.signature().inputs, i) for i in range(JUDGED)]
    reference = list(map(qdq.kernels(graph), samples))
    manifests, found, built = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for label, target in targets.items():
            folder = Path(scratch) / label
            folder.mkdir()
            start = time.process_time()
            engine = target.build(graphs[label], folder, {"threads": threads})
            built[label] = time.process_time() - start
            found[label] = list(map(engine.run, samples))
            manifests[label] = engine.manifest
            engine.close()

        @contextlib.contextmanager
        def open_arms():
            engines = {k: t.load(Path(scratch) / k, manifests[k], graphs[k]) for k, t in targets.items()}
            yield {label: engine.call(samples[0]) for label, engine in engines.items()}
            for engine in engines.values():
                engine.close()

        clock = "thread_cpu" if threads == 1 else "wall"
        taken = measure.interleave_sessions(open_arms, clock, seconds=seconds, threads=threads)
    return {
        "model": name,
        "rules": rules,
        "threads": threads,
        "clock": clock,
        "p50_ms": {k: s.p50 * 1e3 for k, s in taken.items()},
        "calls": {k: len(s.seconds) for k, s in taken.items()},
        "to_ort": measure.ratio(taken["tvm"], taken["ort"]).as_dict(),
        "snr_db": {k: qdq.snr(reference, v) for k, v in found.items()},
        "simulated_db": {k: qdq.snr(reference, map(qdq.simulation(g), samples)) for k, g in graphs.items()},
        "build_cpu_s": built,
        "load": list(taken["tvm"].load),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | rules | threads | tvm ms | ort ms | ratio | tvm SNR dB | ort SNR dB | simulated dB | build CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, p50, snr = row["to_ort"], row["p50_ms"], row["snr_db"]
        lines.append(
            f"| {row['model']} | {row['rules']} | {row['threads']} | {p50['tvm']:.2f} | {p50['ort']:.2f} "
            f"| {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | {snr['tvm']:.1f} | {snr['ort']:.1f} "
            f"| {row['simulated_db']['tvm']:.1f} | {row['build_cpu_s']['tvm']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rules", default="ort_cpu", choices=["ort_cpu", "tvm"])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file of results; rows that are not measured again are kept")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, rules, seconds, threads = options.one
        print(json.dumps(run_one(name, rules, float(seconds), int(threads))))
        return
    from common import rows

    names = options.names or MODELS
    jobs = [(n, options.rules, str(options.seconds), str(options.threads)) for n in names]
    print("\n".join(table([]).splitlines()))
    rows(__file__, jobs, table, options.output, lambda row: (row["model"], row["rules"], row["threads"]))


if __name__ == "__main__":
    sys.exit(main())
