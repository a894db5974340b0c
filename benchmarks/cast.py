"""The zoo in float16 and bfloat16: signal-to-noise ratio, largest error, what stays in float32, size of the weights.

Usage: python benchmarks/cast.py [NAME ...] [--dtype float16] [--output benchmarks/results/cast.json]

Every model (without NAMEs, the whole zoo) is exported at its native resolution with random weights and BatchNorm
statistics, its branches are merged, and the pass `cast` is applied with its default budget of 50 dB for float16, and of
30 dB for bfloat16, which has 8 bits of significand where float16 has 11. bfloat16 needs opset 22, to which the graph is
converted before. Figures are those of the emulation, which computes in float32 and rounds each tensor when it is
stored, over all probe inputs; that inputs ten times as large stay finite is checked on the same. Size is the ratio of
the bytes of the initializers; kept are the nodes with a float32 result.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

BUDGETS = {"float16": 50.0, "bfloat16": 30.0}
OPSETS = {"bfloat16": 22}


def run_one(name: str, dtype: str) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np
    import onnx

    from edgecompile import frontend, oracle
    from edgecompile.graph import Graph
    from edgecompile.passes.cast import Cast, emulated
    from edgecompile.pipeline import Context, Pipeline

    with tempfile.TemporaryDirectory() as folder:
        source = frontend.load(name, folder=Path(folder))
        graph, feeds = source.graph, source.feeds
        Pipeline.parse("clean,fold_norm,reparam").run(graph, feeds, verify=False)
        if dtype in OPSETS:
            graph = Graph.from_proto(onnx.version_converter.convert_version(graph.to_proto(), OPSETS[dtype]))
        reference = [oracle.run(graph, f) for f in feeds]
        nodes, size = len(graph.nodes), graph.weight_bytes()
        context = Context(tuple(feeds))
        context.begin("cast")
        start = time.perf_counter()
        Cast(dtype=dtype, min_snr=BUDGETS[dtype]).run(graph, context)
        graph.tidy()
        seconds = time.perf_counter() - start
        graph.check(source.graph.signature())
        plain = emulated(graph)
        errors = [
            e
            for r, f in zip(reference, feeds, strict=True)
            for e in oracle.compare_all(r, oracle.run(plain, f)).values()
        ]
        large = [oracle.run(plain, {n: 10 * v for n, v in f.items()}) for f in feeds]
        kept = [n for n in graph.nodes if n.op != "Cast" and any(t.dtype == np.float32 for t in n.outputs)]
        reasons: dict[str, int] = {}
        for note in context.result().notes:
            reason = "range or storage" if "tensor" in note.text else "long sum" if "sum of" in note.text else ""
            reason = reason or (
                "island" if "Casts" in note.text else "error budget" if "leaves" in note.text else "other"
            )
            reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "model": name,
        "dtype": dtype,
        "budget_db": BUDGETS[dtype],
        "opset": graph.opsets[""],
        "snr_db": min(e.snr_db for e in errors),
        "max_rel": max(e.max_rel for e in errors),
        "finite_at_10x": all(bool(np.isfinite(v).all()) for outputs in large for v in outputs.values()),
        "nodes": nodes,
        "kept": len(kept),
        "kept_ops": sorted({n.op for n in kept}),
        "reasons": reasons,
        "casts": sum(n.op == "Cast" for n in graph.nodes),
        "size": graph.weight_bytes() / size,
        "seconds": seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | type | SNR | max error / max | kept in float32 | Casts | size | finite at 10x | pass |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['dtype']} | {r['snr_db']:.1f} dB | {r['max_rel']:.1e} | {r['kept']} of {r['nodes']} "
        f"| {r['casts']} | {r['size']:.2f} | {'yes' if r['finite_at_10x'] else 'NO'} | {r['seconds']:.0f} s |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dtype", choices=BUDGETS, action="append", help="default: all, one after the other")
    parser.add_argument("--output", type=Path, help="JSON file of results; rows that are not measured again are kept")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one)))
        return
    import common

    from edgecompile import models

    names = options.names or models.names()
    jobs = [(name, dtype) for dtype in options.dtype or BUDGETS for name in names]
    rows = common.rows(__file__, jobs, markdown, options.output, lambda row: (row["model"], row["dtype"]))
    wrong = [f"{r['model']} {r['dtype']}" for r in rows if r["snr_db"] < r["budget_db"] or not r["finite_at_10x"]]
    if wrong:
        raise SystemExit(f"budget missed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
