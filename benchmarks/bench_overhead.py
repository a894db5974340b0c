"""What `edgecompile bench` adds to a call of about 0.2 ms, against a loop that does nothing but call.

Usage: python benchmarks/bench_overhead.py [--rounds 400] [--output benchmarks/results/bench_overhead.json]

Both loops run the same session and make equally many calls, some 25 ms of them, one loop after the other in random
order. The figure is how much longer a call of the timed loop takes, all in all, in the thread's CPU time: the median
over the rounds, with the interval of the sign test. A second bare loop is the control: it should differ by nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from common import machine
from onnx import TensorProto, helper

from edgecompile import bench, measure, oracle, registry, sequential
from edgecompile.graph import Graph

BLOCK = 0.025


def small_net(side: int, width: int = 32) -> Graph:
    """Three 3x3 convolutions on ``side`` x ``side`` pixels."""
    rng = np.random.default_rng(0)
    weights, nodes, inputs = [], [], 3
    for number in range(3):
        values = rng.standard_normal((width, inputs, 3, 3)).astype(np.float32) * 0.1
        weights.append(onnx.numpy_helper.from_array(values, f"w{number}"))
        given, made = (f"t{number - 1}" if number else "x"), ("y" if number == 2 else f"t{number}")
        nodes.append(helper.make_node("Conv", [given, f"w{number}"], [made], f"conv{number}", pads=[1] * 4))
        inputs = width
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, side, side])
        for name, channels in (("x", 3), ("y", width))
    ]
    graph = helper.make_graph(nodes, "small", ports[:1], ports[1:], weights)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def compare(call, rounds: int) -> dict[str, object]:
    measure._warm_up(call, time.thread_time_ns, 15_000_000)
    typical = float(bench._by_clock(call, time.thread_time_ns)(0.0)[0].min()) / 1e9
    every = bench._every(typical)
    timed = bench._by_clock(call, time.thread_time_ns, every)
    sampled = max(1, round(BLOCK / typical / every))
    calls = sampled * every

    def bare() -> None:
        for _ in range(calls):
            call()

    arms = {"bare": bare, "timed": lambda: timed(0, sampled), "control": bare}
    took: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(arms), len(arms)):
            start = time.thread_time_ns()
            arms[name]()
            took[name].append((time.thread_time_ns() - start) / calls)
    bare_ns = np.array(took["bare"])
    row: dict[str, object] = {"timed_every": every, "bare_us": round(float(np.median(bare_ns)) / 1e3, 2)}
    for name, label in (("timed", "overhead"), ("control", "control")):
        ratios = 100 * (np.array(took[name]) / bare_ns - 1)
        row[f"{label}_percent"] = round(float(np.median(ratios)), 3)
        row[f"{label}_interval"] = [round(x, 3) for x in sequential.percentile_interval(ratios, 50, 0.95)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    for side in (16, 24, 34):
        graph = small_net(side)
        with tempfile.TemporaryDirectory() as folder:
            engine = registry.target("ort").build(graph, Path(folder), {"threads": "1"})
            call = engine.call(oracle.random_feeds(graph.signature().inputs, 0))
            rows.append({"side": side} | compare(call, options.rounds))
            engine.close()
        print(
            "{bare_us:.1f} us: {overhead_percent} % {overhead_interval}, control {control_percent} %".format(**rows[-1])
        )
    if options.output:
        load = {"load_before": before, "load_after": os.getloadavg()[0]}
        document = {
            "machine": machine(),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": options.rounds,
            **load,
            "rows": rows,
        }
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
