"""Every zoo model at its native resolution through `build --target ort`: size before and after, parity, latency ratios.

Usage: python benchmarks/zoo.py [NAME ...] [--seconds 12] [--output benchmarks/results/zoo.json]

Each model runs in a process of its own. Three arms are interleaved in one run, on one thread, timed by thread CPU
time, six times with fresh sessions: the engine, the plain export under the same ONNX Runtime settings, and eager torch
in inference mode. Weights are random, BatchNorm statistics too. Ratios below 1 mean that the engine is faster; the
interval in brackets has 95 % confidence.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

PARITY = {"damoyolo": 1e-4}
DEFAULT_PARITY = 1e-5


def run_one(name: str, seconds: float) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import torch

    from edgecompile import driver, frontend, measure, models, registry
    from edgecompile.models.randomize import randomize

    torch.set_num_threads(1)
    options = {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        (Path(folder) / "export").mkdir()
        (Path(folder) / "plain").mkdir()
        source = frontend.load(name, folder=Path(folder) / "export")
        chosen = driver.Options(bench=False, target_options=options)
        bundle = driver.build(source, Path(folder) / "bundle", chosen)
        build_seconds = time.perf_counter() - start
        report = json.loads((bundle.path / "report.json").read_text())
        target = registry.target("ort")
        plain = target.build(source.graph, Path(folder) / "plain", options)
        source.graph.save(Path(folder) / "plain" / "model.onnx")
        module = randomize(models.create(name), 0, torch.randn(models.ZOO[name].input_shape)).eval()
        feeds = source.feeds[0]
        tensors = [torch.from_numpy(np.array(v)) for v in feeds.values()]

        def eager() -> None:
            with torch.inference_mode():
                module(*tensors)

        openers = {
            "engine": bundle.engine,
            "plain": lambda: target.load(Path(folder) / "plain", plain.manifest, source.graph),
        }
        order = random.Random(0)

        @contextlib.contextmanager
        def open_arms():
            # In random order: what is opened first lies elsewhere in memory, which alone can be worth a percent.
            engines = {label: openers[label]() for label in order.sample(list(openers), 2)}
            yield {label: engines[label].call(feeds) for label in openers} | {"eager": eager}
            for engine in engines.values():
                engine.close()

        samples = measure.interleave_sessions(open_arms, "thread_cpu", seconds=seconds)
        graph = bundle.graph()
    before, after = report["before"], report["after"]
    parity = max(e["max_rel"] or 0.0 for e in report["parity"]["outputs"].values())
    return {
        "model": name,
        "exporter": next(a["rung"] for a in report["export"] if a["ok"]),
        "nodes": [before["nodes"], after["nodes"]],
        "parameters": [before["parameters"], after["parameters"]],
        "macs": [before["macs"], after["macs"]],
        "batch_norms": sum(n.op == "BatchNormalization" for n in graph.walk()),
        "parity": parity,
        "parity_ok": parity <= PARITY.get(name.split("_")[0], DEFAULT_PARITY),
        "p50_ms": {k: s.p50 * 1e3 for k, s in samples.items()},
        "calls": {k: len(s.seconds) for k, s in samples.items()},
        "to_plain": measure.ratio(samples["engine"], samples["plain"]).as_dict(),
        "to_eager": measure.ratio(samples["engine"], samples["eager"]).as_dict(),
        "build_seconds": build_seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | nodes | parameters | MACs | parity | p50 / plain export | p50 / eager torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (n0, n1), (p0, p1), (m0, m1) = row["nodes"], row["parameters"], row["macs"]
        plain, eager = row["to_plain"], row["to_eager"]
        lines.append(
            f"| {row['model']} | {n0} -> {n1} | {p0 / 1e6:.2f} -> {p1 / 1e6:.2f} M "
            f"| {m0 / 1e9:.3f} -> {m1 / 1e9:.3f} G "
            f"| {row['parity']:.0e} | {plain['value']:.3f} [{plain['low']:.3f}, {plain['high']:.3f}] "
            f"| {eager['value']:.3f} [{eager['low']:.3f}, {eager['high']:.3f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.seconds)))
        return
    import common

    from edgecompile import models

    jobs = [(name, "--seconds", str(options.seconds)) for name in options.names or models.names()]
    rows = common.rows(__file__, jobs, markdown, options.output)
    wrong = [r["model"] for r in rows if not r["parity_ok"] or r["batch_norms"]]
    if wrong:
        raise SystemExit(f"parity or BatchNormalization: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
