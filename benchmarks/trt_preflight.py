"""Every zoo model in fp32, fp16 and int8 as target `trt` prepares it: what legalize rewrote, and what TensorRT refuses.

Usage: python benchmarks/trt_preflight.py [NAME ...] [--output benchmarks/results/trt_preflight.json]

Each model runs in a process of its own: export, the passes of the precision's preset, then the preflight and the rules
of strongly typed networks for TensorRT 10.3, 10.16 and 11. `refused` is what keeps a version from building the graph;
`notes` counts places that build and run slower than they could. Int8 is calibrated on two random inputs in the quickest
way, since only where Q/DQ stand matters here. No TensorRT takes part: the figures are of the graph, not of an engine.
Weights and BatchNorm statistics are random. An existing file of results keeps its rows of models that are not named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgecompile.graph import Graph

PRECISIONS = ("fp32", "fp16", "int8")
SAMPLES = "random:2"
STRUCTURE = (
    "method=minmax,bias_correction=false,seconds=0"  # Q/DQ stand where they would; only their values are rougher
)


def lowered(
    source: Graph, feeds: Mapping[str, np.ndarray], only: tuple[str, ...] = PRECISIONS
) -> Iterator[tuple[str, Graph, dict[str, Any]]]:
    """The graph of each precision as the target's preset makes it, and what legalize did to it.

    Raises:
        PassError: a pass failed, or legalize changed more than rounding.
    """
    from edgecompile import calibration_data
    from edgecompile.pipeline import Pipeline
    from edgecompile.targets.trt import TrtTarget

    data = calibration_data.open_data(SAMPLES, source.signature().inputs)
    shared: Graph | None = None
    for precision in only:
        spec = TrtTarget.pipelines[precision].replace("rules=tensorrt", f"rules=tensorrt,{STRUCTURE}")
        passes = Pipeline.parse(spec).passes
        common = [p for p in passes if p.name in ("clean", "fold_norm", "reparam")]
        if shared is None:
            shared = source.copy()
            Pipeline(tuple(common)).run(shared, verify=False, strict=True)
        graph = shared.copy()
        Pipeline(passes[len(common) : -1]).run(graph, [feeds], verify=False, strict=True, calibration=data)
        start = time.perf_counter()
        step = Pipeline(passes[-1:]).run(graph, [feeds], strict=True).steps[0]
        row = {
            "nodes": [step.before.nodes, step.after.nodes],
            "legalized": dict(Counter(r.what for r in step.rewrites)),
            "legalize_max_rel": max(e.max_rel for e in (step.errors or {}).values()),
            "legalize_seconds": round(time.perf_counter() - start, 2),
        }
        yield precision, graph, row


def checked(graph: Graph) -> dict[str, dict[str, Any]]:
    """What each version of TensorRT has against a graph."""
    from edgecompile.targets.trt import preflight, strong_typing, support

    view = preflight.View.of(graph, support.VERSIONS[0])
    found = {v: [*preflight.check(view, v), *strong_typing.check(view, v)] for v in support.VERSIONS}
    return {
        version: {
            "ok": not any(p.fatal for p in problems),
            "refused": [str(p) for p in problems if p.fatal][:8],
            "notes": sum(not p.fatal for p in problems),
            "first_note": next((str(p) for p in problems if not p.fatal), ""),
        }
        for version, problems in found.items()
    }


def run_one(name: str) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    from edgecompile import frontend

    with tempfile.TemporaryDirectory() as folder:
        source = frontend.load(name, folder=Path(folder))
        made = {
            precision: row | {"versions": checked(graph)}
            for precision, graph, row in lowered(source.graph, source.feeds[0])
        }
        exporter = next(a.rung for a in source.attempts if a.ok)
        return {"model": name, "exporter": exporter, "opset": source.graph.opsets[""], "precisions": made}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | precision | nodes | legalize | refused by | notes |", "|---|---|---|---|---|---|"]
    for row in rows:
        for precision, made in row["precisions"].items():
            versions = made["versions"]
            refused = ", ".join(v for v, found in versions.items() if not found["ok"]) or "none"
            notes = "/".join(str(found["notes"]) for found in versions.values())
            nodes, count = made["nodes"], sum(made["legalized"].values())
            lines.append(f"| {row['model']} | {precision} | {nodes[0]} -> {nodes[1]} | {count} | {refused} | {notes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one)))
        return
    from common import earlier, machine

    from edgecompile import models

    order = models.names()
    rows = {row["model"]: row for row in earlier(options.output) if row["model"] in order}
    for name in options.names or order:
        done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print("\n".join(markdown([rows[name]]).splitlines()[2:]), flush=True)
        if options.output:
            ordered = sorted(rows.values(), key=lambda row: order.index(row["model"]))
            document = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": ordered}
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    wrong = [
        name
        for name, row in rows.items()
        for made in row["precisions"].values()
        for found in made["versions"].values()
        if not found["ok"]
    ]
    if wrong:
        raise SystemExit(f"refused: {', '.join(dict.fromkeys(wrong))}")


if __name__ == "__main__":
    main()
