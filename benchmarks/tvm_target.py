"""Zoo models through the targets `tvm` and `ort` at native resolution: parity, build time, load time, latency ratios.

Usage: python benchmarks/tvm_target.py [NAME ...] [--seconds 6] [--threads 1 2] [--output FILE]

(It is not called tvm.py, which would hide the package from itself.) Each model runs in a process of its own, exported
by TorchScript with random weights, and goes through the target's own passes; both engines are built from the resulting
graph. They are interleaved in one run, six times with fresh sessions. Ratios below 1 mean that TVM's code is faster;
the interval in brackets has 95 % confidence. A third engine has Winograd's algorithm turned off; `--plain` adds TVM's
default lowering as a fourth.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

REPRESENTATIVES = [
    "repvgg_a0",
    "damoyolo_t",
    "shvit_s4",
    "deanet",
    "repavit_small",
    "efficientvit_m5",
    "litepose_xs",
]
DIRECT, PLAIN = "tvm without winograd", "tvm default lowering"


def exported(name: str) -> Any:
    import onnx
    import torch

    from edgecompile import models
    from edgecompile.graph import Graph
    from edgecompile.models.randomize import randomize
    from edgecompile.passes.clean import Clean
    from edgecompile.passes.fold_norm import FoldNorm
    from edgecompile.passes.legalize import Legalize
    from edgecompile.passes.reparam import Reparam
    from edgecompile.pipeline import Pipeline

    example = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(0))
    module = randomize(models.create(name), 0, example).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), buffer, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    graph = Graph.from_proto(onnx.load_from_string(buffer.getvalue()))
    passes = (Clean(), FoldNorm(), Reparam(), Legalize("tvm"), Clean())
    Pipeline(passes).run(graph, verify=False, strict=True)
    return graph


def run_one(name: str, seconds: float, threads: int, plain: bool) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from edgecompile import measure, oracle
    from edgecompile.targets.ort import OrtTarget
    from edgecompile.targets.tvm import TvmTarget

    graph = exported(name)
    feeds = oracle.random_feeds(graph.signature().inputs)
    arms = {"tvm": (TvmTarget(), {}), "ort": (OrtTarget(), {}), DIRECT: (TvmTarget(), {"winograd": "no"})}
    if plain:
        arms[PLAIN] = (TvmTarget(), {"schedules": "no"})
    spent: dict[str, dict[str, float]] = {}
    manifests, outputs = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for label, (target, options) in arms.items():
            folder = Path(scratch) / label
            folder.mkdir()
            start = time.perf_counter()
            cpu = time.process_time()
            engine = target.build(graph, folder, {"threads": threads, **options})
            spent[label] = {"build_s": time.perf_counter() - start, "build_cpu_s": time.process_time() - cpu}
            graph.save(folder / "model.onnx")
            manifests[label] = engine.manifest
            engine.close()
            start = time.perf_counter()
            again = target.load(folder, engine.manifest, graph)
            outputs[label] = again.run(feeds)
            spent[label]["load_and_first_run_s"] = time.perf_counter() - start
            again.close()

        @contextlib.contextmanager
        def open_arms():
            engines = {k: target.load(Path(scratch) / k, manifests[k], graph) for k, (target, _) in arms.items()}
            yield {label: engine.call(feeds) for label, engine in engines.items()}
            for engine in engines.values():
                engine.close()

        clock = "thread_cpu" if threads == 1 else "wall"
        samples = measure.interleave_sessions(open_arms, clock, seconds=seconds, threads=threads)
    errors = oracle.compare_all(outputs["ort"], outputs["tvm"])
    return {
        "model": name,
        "threads": threads,
        "clock": clock,
        "parity": max(e.max_rel for e in errors.values()),
        "p50_ms": {k: s.p50 * 1e3 for k, s in samples.items()},
        "calls": {k: len(s.seconds) for k, s in samples.items()},
        "to_ort": {k: measure.ratio(s, samples["ort"]).as_dict() for k, s in samples.items() if k != "ort"},
        "seconds": spent,
        "load": list(samples["tvm"].load),
    }


def line(row: dict[str, Any]) -> str:
    ratio, direct, spent = row["to_ort"]["tvm"], row["to_ort"][DIRECT], row["seconds"]["tvm"]
    return (
        f"| {row['model']} | {row['threads']} | {row['parity']:.0e} | {row['p50_ms']['tvm']:.2f} "
        f"| {row['p50_ms']['ort']:.2f} | {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] "
        f"| {direct['value']:.2f} "
        f"| {spent['build_s']:.0f} | {spent['build_cpu_s']:.0f} | {spent['load_and_first_run_s']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--plain", action="store_true", help="also TVM's default lowering")
    parser.add_argument("--output", type=Path, help="JSON file of results; rows that are not measured again are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.seconds, options.threads[0], options.plain)))
        return
    from common import earlier, machine

    columns = (
        "model, threads, parity, tvm ms, ort ms, ratio, without Winograd, build s, build CPU s, load and first run s"
    )
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = earlier(options.output)
    for name, threads in itertools.product(options.names or REPRESENTATIVES, options.threads):
        command = [sys.executable, __file__, "--one", name, "--seconds", str(options.seconds)]
        command += ["--threads", str(threads), *(["--plain"] if options.plain else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows = [row for row in rows if (row["model"], row["threads"]) != (name, threads)]
        if done.returncode:
            rows.append({"model": name, "threads": threads, "failed": done.returncode})
            print(f"| {name} | {threads} | failed |", flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
        if options.output:
            document = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
            options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
