"""How often the gate is wrong, and how long it takes: live runs with real work injected, and resampled ones.

Three convolutional networks of about 0.2, 2 and 20 ms, each beside two copies with an extra convolution (into an
output of its own, so that parity holds) that costs about 5 and 10 %. What it really costs is measured with the same
runs. Every live run is the whole gate, with fresh sessions. The resampled runs draw pairs of sessions, with
replacement, from the live ones of the same scenario.

    python benchmarks/gate.py --aa 34 --injected 20
    python benchmarks/gate.py --hogs 2 --aa 100 --injected 0 --sizes 2 --out benchmarks/results/gate_hogs.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import machine
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import binomtest

from edgecompile import bundle, driver, frontend, gate, judge, measure, remote, sequential
from edgecompile.config import GateConfig
from edgecompile.judge import BASELINE, CANDIDATE
from edgecompile.sequential import Plan

# About how many ms a call takes -> image size and channels of the network; blocks are added until it takes as long.
SIZES = {0.2: (32, 32), 2.0: (56, 64), 20.0: (96, 96)}
INJECTED = (0.05, 0.10)


def network(size: int, channels: int, blocks: int, extra: tuple[int, int], path: Path) -> None:
    """Conv3x3 and ReLU, ``blocks`` times; and beside them a Conv3x3 of the image with ``extra`` (channels, stride)."""
    rng = np.random.default_rng(7)
    weights, nodes, last, width = [], [], "x", 3

    def conv(source: str, inputs: int, outputs: int, to: str, stride: int = 1) -> None:
        kernel = rng.standard_normal((outputs, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
        weights.append(numpy_helper.from_array(kernel.astype("f4"), f"w_{to}"))
        nodes.append(helper.make_node("Conv", [source, f"w_{to}"], [to], pads=[1, 1, 1, 1], strides=[stride, stride]))

    for number in range(blocks):
        conv(last, width, channels, f"c{number}")
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last, width = f"r{number}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, 1, 1])]
    if extra[0]:
        conv("x", 3, extra[0], "z", extra[1])
        out = -(-size // extra[1])
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, extra[0], out, out]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])]
    graph = helper.make_graph(nodes, "network", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def build(folder: Path, name: str, *args: Any) -> bundle.Bundle:
    """The bundle of a network; the same graph for ONNX Runtime whatever the passes do."""
    folder.mkdir(parents=True, exist_ok=True)
    network(*args, folder / f"{name}.onnx")
    options = driver.Options(bench=False, target_options={"threads": 1})
    return driver.build(frontend.load(str(folder / f"{name}.onnx"), folder=folder), folder / name, options)


def slower_by(board: remote.Place, a: bundle.Bundle, b: bundle.Bundle, pairs: int) -> float:
    """Hodges-Lehmann estimate of log(b / a)."""
    keys = {"a": board.add(a.path), "b": board.add(b.path)}
    found = [board.session(keys, seconds=0.15, seed=i) for i in range(pairs)]
    return sequential.hodges_lehmann([measure.log_ratio(s["b"], s["a"]) for s in found])


def prepare(folder: Path, board: remote.Place, milliseconds: float) -> dict[float, bundle.Bundle]:
    """The baseline (0.0) and its copies with about so much more work."""
    size, channels = SIZES[milliseconds]

    def time_of(made: bundle.Bundle) -> float:
        return board.session({"x": board.add(made.path)}, seconds=0.3)["x"].percentile(25)

    none = (0, 1)
    few, many = (time_of(build(folder, f"of{n}", size, channels, n, none)) for n in (2, 6))
    blocks = max(2, round(2 + 4 * (milliseconds / 1e3 - few) / (many - few)))
    made = {0.0: build(folder, "base", size, channels, blocks, none)}
    # From little work to much: the channels of the extra convolution, and its stride.
    channels_of = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    offers = sorted(((c, s) for s in (8, 4, 2, 1) for c in channels_of), key=lambda o: o[0] / o[1] ** 2)
    for wanted in INJECTED:  # the least work that costs as much
        low, high = 0, len(offers) - 1
        while low < high:
            middle = (low + high) // 2
            trial = build(folder, f"trial{middle}", size, channels, blocks, offers[middle])
            enough = slower_by(board, made[0.0], trial, 6) >= np.log1p(wanted)
            low, high = (low, middle) if enough else (middle + 1, high)
        made[wanted] = build(folder, f"plus{wanted}", size, channels, blocks, offers[low])
    return made


@dataclasses.dataclass
class Scenario:
    """A candidate against a baseline, and what the gate said so far."""

    name: str
    milliseconds: float
    injected: float
    verdicts: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    pairs: list[int] = dataclasses.field(default_factory=list)
    differences: list[float] = dataclasses.field(default_factory=list)
    machine: list[float] = dataclasses.field(default_factory=list)
    baseline: list[float] = dataclasses.field(default_factory=list)
    replayed: int = 0

    def run(self, contest: gate.Contest, board: remote.Place, seed: int, folder: Path) -> None:
        """One live run, and its replay."""
        kept: list[gate.Recording] = []
        result = gate.run([contest], GateConfig(), board, seed=seed, keep=kept.append)
        kept[0].save(folder / "samples.npz")
        self.replayed += gate.replay(folder) == result
        check = next(c for c in result.checks if c.metric == "latency")
        self.verdicts.append(check.verdict if check.reason_code != "aa_differs" else "INCONCLUSIVE (A/A)")
        self.seconds.append(check.seconds)
        self.pairs.append(check.pairs)
        self.baseline.append(check.baseline or 0.0)
        subject = kept[0].subjects[0]
        self.differences += subject.differences(BASELINE).tolist()
        self.machine += subject.machine_differences().tolist()

    def as_dict(self, resampled: int) -> dict:
        """The figures."""
        live = self.verdicts
        return {
            "scenario": self.name, "baseline_ms": float(np.median(self.baseline)) * 1e3, "nominal": self.injected,
            "realised": float(np.expm1(sequential.hodges_lehmann(self.differences[: sequential.MOST_PAIRS])))
            if self.differences else None,
            "pair_sd": float(np.std(self.differences)), "live_runs": len(live), "live": rates(live),
            "replay_equal": self.replayed, "seconds_p50": float(np.median(self.seconds)),
            "seconds_max": float(np.max(self.seconds)), "pairs_p50": float(np.median(self.pairs)),
            "resampled_runs": resampled, "resampled": rates(self.resample(resampled)) if resampled else {},
        }  # fmt: skip

    def resample(self, runs: int) -> list[str]:
        """Verdicts of runs whose pairs are drawn from the live ones."""
        rng, plan = np.random.default_rng(1), Plan()
        settings = judge.Settings(plan)
        found = []
        for _ in range(runs):
            subject = Drawn(judge.Facts("x", {"y": 0.0}, arms=(CANDIDATE, BASELINE)))
            subject.drawn = rng.choice(self.differences, plan.looks[-1])
            subject.same = rng.choice(self.machine, plan.aa_pairs(plan.looks[-1]))
            check = judge.judge([subject], settings)[1]
            found.append(check.verdict if check.reason_code != "aa_differs" else "INCONCLUSIVE (A/A)")
        return found


class Drawn(judge.Subject):
    """A subject whose pairs are known by what they say."""

    drawn: np.ndarray
    same: np.ndarray

    @property
    def count(self) -> int:
        """All pairs that any look may need."""
        return len(self.drawn)

    def differences(self, other: str) -> np.ndarray:
        """As drawn."""
        return self.drawn

    def machine_differences(self) -> np.ndarray:
        """As drawn."""
        return self.same


def rates(verdicts: list[str]) -> dict:
    """Verdict -> share, with its 95 % interval (Clopper-Pearson)."""
    found = {}
    for verdict in sorted(set(verdicts) | {"PASS", "FAIL", "INCONCLUSIVE"}):
        hits = verdicts.count(verdict)
        interval = binomtest(hits, len(verdicts)).proportion_ci(0.95)
        found[verdict] = {"runs": hits, "share": hits / len(verdicts), "low": interval.low, "high": interval.high}
    return found


def busy() -> None:
    """Load."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aa", type=int, default=34, help="live runs of each network against itself")
    parser.add_argument("--injected", type=int, default=20, help="live runs of each network with extra work")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="ms a call")
    parser.add_argument("--hogs", type=int, default=0, help="busy processes beside")
    parser.add_argument("--resampled", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further run after this time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gate.json")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, remote.open_board(None) as board:
        nets = {ms: prepare(Path(scratch) / str(ms), board, ms) for ms in given.sizes}
        scenarios = [
            (
                Scenario(f"{ms} ms {f'+{extra:.0%}' if extra else 'A/A'}", ms, extra),
                given.injected if extra else given.aa,
            )
            for ms in given.sizes
            for extra in (0.0, *INJECTED)
        ]
        hogs = [multiprocessing.Process(target=busy, daemon=True) for _ in range(given.hogs)]
        for hog in hogs:
            hog.start()
        loads = []
        try:
            for number in range(max(given.aa, given.injected)):
                for scenario, runs in scenarios:
                    if number >= runs or time.perf_counter() - start > 60 * given.minutes:
                        continue
                    made = nets[scenario.milliseconds]
                    contest = gate.Contest("net", made[scenario.injected], made[0.0])
                    scenario.run(contest, board, seed=number, folder=Path(scratch))
                    loads.append(os.getloadavg()[0])
                    print(scenario.name, number, scenario.verdicts[-1], f"{scenario.seconds[-1]:.1f} s", flush=True)
        finally:
            for hog in hogs:
                hog.terminate()
    done = [s for s, _ in scenarios if s.verdicts]
    document = {
        "machine": machine(), "date": datetime.date.today().isoformat(), "hogs": given.hogs,
        "load": {"p10": float(np.percentile(loads, 10)), "p90": float(np.percentile(loads, 90))},
        "plan": dataclasses.asdict(Plan()), "scenarios": [s.as_dict(given.resampled) for s in done],
    }  # fmt: skip
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["scenarios"]:
        shares = ", ".join(f"{k} {v['share']:.1%}" for k, v in row["live"].items() if v["runs"])
        drawn = ", ".join(f"{k} {v['share']:.2%}" for k, v in row["resampled"].items() if v["runs"])
        print(
            f"{row['scenario']:>14}: really {row['realised']:+.1%}, {row['live_runs']} live runs: {shares}; "
            f"{row['seconds_p50']:.0f} s (at most {row['seconds_max']:.0f}); resampled: {drawn}"
        )


if __name__ == "__main__":
    main()
