"""Channel pruning: the zoo at 0.7 of its parameters, promised against measured latency, accuracy after repair.

    python benchmarks/prune.py --output benchmarks/results/prune.json [params] [latency] [accuracy] [--models NAME ...]

*params*: every model of the zoo after the exact passes, cut to 0.7 of its parameters by magnitude. `masked` is the
largest error of the cut graph on ONNX Runtime against the original in which every sum leaves out what is cut, relative
to the output's largest value. `whole` lists why groups cannot be cut. Weights are random, BatchNorm statistics too.
Models of large images that take any size get smaller ones here, since neither depends on it.

*latency*: `build --prune 0.7x` on one thread. `promised` is the ratio that the build found for the cut graph against
the graph before the cut; `measured` is that of the bundle's engine against the same graph in a run of its own, six
pairs of fresh sessions, thread CPU time.

*accuracy*: MobileNetV2 at 0.85x latency, without training: scored and repaired on every second of the 500 ImageNet
photographs of EDGECOMPILE_DATA and judged on the others, which are of other classes; then the other way round. The drop
is in points of top-1 over all 500, none of which was judged by a network that had seen it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import common
import trained

TARGET, EXACT = 0.7, "clean,fold_norm,reparam"
FAMILIES = ("shvit_s1", "efficientvit_m0", "litepose_xs", "damoyolo_ns")
ACCURACY = 0.85
SMALL = {"deanet": 128, **dict.fromkeys(("damoyolo_t", "damoyolo_s", "damoyolo_m", "damoyolo_l"), 256)}  # pixels
VARIANTS = ("score=magnitude,repair=true", "score=activation,repair=true", "score=reconstruction,repair=true")


def params(name: str) -> dict[str, Any]:
    """Cut one model to 0.7 of its parameters and compare it with its masked original."""
    from edgecompile import frontend, models, oracle, qdq
    from edgecompile.passes.prune import scores, widths
    from edgecompile.passes.prune.dependency import groups
    from edgecompile.pipeline import Pipeline

    pixels = SMALL.get(name)
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"image": (1, 3, pixels, pixels)} if pixels else {}
        source = frontend.load(name, inputs=inputs, folder=Path(folder))
    graph, feeds = source.graph, source.feeds[0]
    Pipeline.parse(EXACT).run(graph, verify=False)
    start = time.perf_counter()
    found = groups(graph)
    importance = scores.magnitude(graph, found)
    choices = widths.candidates(found, graph, 8)
    way = widths.by_parameters(graph, found, importance, choices)
    keep = widths.keep(importance, widths.fit_parameters(graph, found, importance, way, TARGET))
    seconds = time.perf_counter() - start
    cut, masked = graph.copy(), graph.copy()
    found.cut(cut, keep)
    found.mask(masked, keep)
    expected = oracle.run(masked, feeds)
    errors = oracle.compare_all(expected, qdq.kernels(cut)(feeds))
    total = sum(v.size for v in graph.constants().values() if v.dtype.kind == "f")
    left = sum(v.size for v in cut.constants().values() if v.dtype.kind == "f")
    return {
        "kind": "params",
        "model": name,
        "pixels": pixels or models.ZOO[name].resolution,
        "groups": len(found.groups),
        "cut": len(keep),
        "parameters": left / total,
        "masked": max(e.max_rel for e in errors.values()),
        "seconds": seconds,
        "whole": {g.name: g.reason for g in found.whole},
    }


def latency(name: str) -> dict[str, Any]:
    """Build a model at 0.7x and measure it again."""
    from edgecompile import driver, frontend

    options = {"threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "export").mkdir()
        source = frontend.load(name, folder=Path(folder) / "export")
        start = time.perf_counter()
        made = driver.build(
            source, Path(folder) / "bundle", driver.Options(bench=False, target_options=options, prune=TARGET)
        )
        seconds = time.perf_counter() - start
        report = json.loads((made.path / "report.json").read_text())["pruning"]
        ratio = against(source.graph, made, Path(folder) / "plain", source.feeds[0], options)
    return {
        "kind": "latency",
        "model": name,
        "target": TARGET,
        "promised": report["latency"]["value"],
        "measured": ratio,
        "agrees": abs(ratio["value"] / report["latency"]["value"] - 1) <= 0.05,
        "held": ratio["value"] <= 0.72,
        "align": report["align"],
        "parameters": report["parameters"],
        "groups_cut": sum(g["after"] < g["before"] for g in report["groups"]),
        "build_seconds": seconds,
    }


def against(graph: Any, made: Any, folder: Path, feeds: dict[str, np.ndarray], options: dict[str, Any]) -> dict:
    """Latency of a bundle's engine over that of the graph after the exact passes."""
    from edgecompile import measure, registry
    from edgecompile.pipeline import Pipeline

    target, plain = registry.target("ort"), graph.copy()
    Pipeline.parse(EXACT).run(plain, verify=False)
    folder.mkdir()
    engine = target.build(plain, folder, options)
    openers: dict[str, Callable[[], Any]] = {
        "pruned": made.engine,
        "plain": lambda: target.load(folder, engine.manifest, plain),
    }
    order = random.Random(0)

    @contextlib.contextmanager
    def open_arms():
        engines = {label: openers[label]() for label in order.sample(list(openers), 2)}
        yield {label: engines[label].call(feeds) for label in openers}
        for one in engines.values():
            one.close()

    samples = measure.interleave_sessions(open_arms, "thread_cpu", seconds=6)
    return measure.ratio(samples["pruned"], samples["plain"]).as_dict()


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """The 500 images as MobileNetV2 takes them, float32 ``[500, 3, 224, 224]``, and their labels."""
    opened, labels = trained.images("imagenet_500.npz")
    pixels = np.stack(list(opened)).transpose(0, 3, 1, 2)
    return pixels.astype(np.float32) / 127.5 - 1, labels


def accuracy(variant: str) -> dict[str, Any]:
    """MobileNetV2 at 0.85x: top-1 before and after, over both halves of the photographs."""
    halves = [half(variant, first) for first in (0, 1)]
    base, found = (float(np.mean([h["top1"][i] for h in halves])) for i in (0, 1))
    return {
        "kind": "accuracy",
        "model": "mobilenetv2_100_224",
        "variant": variant,
        "target": ACCURACY,
        "parameters": float(np.mean([h["parameters"] for h in halves])),
        "top1": [base, found],
        "drop": base - found,
        "halves": halves,
    }


def half(variant: str, first: int) -> dict[str, Any]:
    """The same, calibrated on every second photograph from one on and judged on the others."""
    from edgecompile import driver, frontend, qdq
    from edgecompile.graph import Graph

    images, labels = photographs()
    calibrated = np.zeros(len(labels), bool)
    calibrated[first::2] = True
    options = {"threads": 1}

    def top1(graph: Graph) -> float:
        run, name = qdq.kernels(graph), graph.inputs[0].name
        found = [next(iter(run({name: x[None]}).values())).reshape(-1)[1:].argmax() for x in images[~calibrated]]
        return float(np.mean(np.array(found) == labels[~calibrated]) * 100)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.npy"
        np.save(path, images[calibrated])
        (Path(folder) / "export").mkdir()
        source = frontend.load(str(trained.DATA / "mobilenetv2_100_224_dequant.onnx"), folder=Path(folder) / "export")
        made = driver.build(
            source,
            Path(folder) / "bundle",
            driver.Options(
                bench=False, target_options=options, calib=str(path),
                passes=f"{EXACT},prune{{latency={ACCURACY},{variant}}}", strict=True,
            ),
        )  # fmt: skip
        report = json.loads((made.path / "report.json").read_text())["pruning"]
        ratio = against(source.graph, made, Path(folder) / "plain", source.feeds[0], options)
        base, found = top1(source.graph), top1(made.graph())
    return {
        "promised": report["latency"]["value"],
        "measured": ratio,
        "parameters": report["parameters"],
        "snr": [report["unrepaired"], report["snr"]],
        "top1": [base, found],
        "calibrated": int(calibrated.sum()),
        "judged": int((~calibrated).sum()),
    }


KINDS: dict[str, Callable[[str], dict[str, Any]]] = {"params": params, "latency": latency, "accuracy": accuracy}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the rows."""
    lines = ["| kind | what | parameters | promised | measured | result |", "|---|---|---|---|---|---|"]
    for row in rows:
        runs = [r for r in row.get("halves", [row]) if "measured" in r]
        measured = [r["measured"] for r in runs]
        time_ = " and ".join(f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for m in measured) or "-"
        if row["kind"] == "params":
            result = f"error {row['masked']:.0e}, {len(row['whole'])} of {row['groups']} groups whole"
        elif row["kind"] == "latency":
            result = "holds" if row["held"] and row["agrees"] else "misses"
        else:
            result = f"top-1 {row['top1'][0]:.1f} -> {row['top1'][1]:.1f}"
        promised = " and ".join(f"{r['promised']:.3f}" for r in runs) or "-"
        what = _job(row)[1]
        lines.append(f"| {row['kind']} | {what} | {row['parameters']:.3f} | {promised} | {time_} | {result} |")
    return "\n".join(lines)


def _job(row: dict[str, Any]) -> tuple[str, str]:
    """What made a row."""
    return row["kind"], row.get("variant") or row["model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--output", type=Path, help="JSON file of results; rows that are not measured again are kept")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(KINDS[options.one[0]](options.one[1])))
        return
    from edgecompile import models

    whole = {"params": list(models.ZOO), "latency": list(FAMILIES), "accuracy": list(VARIANTS)}
    jobs = [(kind, what) for kind in options.kinds or KINDS for what in whole[kind]
            if kind == "accuracy" or not options.models or what in options.models]  # fmt: skip
    common.rows(__file__, jobs, markdown, options.output, _job)


if __name__ == "__main__":
    main()
