"""What tuning is worth: zoo models through the target `tvm`, tuned and untuned.

Usage: python benchmarks/tvm_tune.py [NAME ...] [--tune 10m] [--seconds 8] [--threads 1] [--output FILE]

Each model runs in a process of its own, exported with random weights, and is tuned from nothing: no record of an
earlier search is used. Whatever engine tuning leaves is then interleaved with one that was built without, in ten
sessions of their own; ratios below 1 mean that tuning gained something, the interval in brackets has 95 % confidence.
Where tuning kept the untuned engine, both are the same code, and the row still says which kernels were faster each for
itself (``better_alone``, and ``kernels_ratio``, what all kernels would take together as a part of what they took). Rows
of other models in the file are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ["repvgg_a0", "shvit_s4", "efficientvit_m5", "damoyolo_t"]


def run_one(name: str, tune: str, seconds: float, threads: int) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from tvm_target import exported

    from edgecompile import measure, oracle
    from edgecompile.targets.tvm import TvmTarget
    from edgecompile.targets.tvm.tune import FACTS

    target, graph = TvmTarget(), exported(name)
    feeds = oracle.random_feeds(graph.signature().inputs)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGECOMPILE_CACHE"] = f"{scratch}/cache"
        manifests, spent = {}, {}
        for label, options in {"untuned": {}, "tuned": {"tune": tune}}.items():
            folder = Path(scratch) / label
            folder.mkdir()
            start = time.perf_counter()
            engine = target.build(graph, folder, {"threads": threads, **options}, say)
            spent[label] = time.perf_counter() - start
            manifests[label] = engine.manifest
            engine.close()
        (facts,) = Path(scratch).glob(f"cache/tuning/*/{FACTS}")
        found = json.loads(facts.read_text())
        kept = (Path(scratch) / "tuned" / FACTS).exists()

        @contextlib.contextmanager
        def open_arms():
            engines = {k: target.load(Path(scratch) / k, m, graph) for k, m in manifests.items()}
            yield {label: engine.call(feeds) for label, engine in engines.items()}
            for engine in engines.values():
                engine.close()

        clock = "thread_cpu" if threads == 1 else "wall"
        samples = measure.interleave_sessions(open_arms, clock, sessions=10, seconds=seconds, threads=threads)
    better = [k for k in found["kernels"] if k["tuned_us"] < k["untuned_us"]]
    alone, untuned = (sum(k["count"] * k[f"{of}_us"] for k in found["kernels"]) for of in ("tuned", "untuned"))
    return {
        "model": name,
        "threads": threads,
        "tune": tune,
        "clock": clock,
        "kept": kept,
        "rounds": found["rounds"],
        "trials": found["trials"],
        "kernels": len(found["kernels"]),
        "better_alone": better,
        "kernels_ratio": alone / untuned if untuned else None,
        "p50_ms": {k: s.p50 * 1e3 for k, s in samples.items()},
        "ratio": measure.ratio(samples["tuned"], samples["untuned"]).as_dict(),
        "ratio_when_tuned": found.get("ratio"),
        "last_words": said[-1],
        "build_s": spent,
        "load": list(samples["tuned"].load),
    }


def line(row: dict[str, Any]) -> str:
    ratio, p50 = row["ratio"], row["p50_ms"]
    return (
        f"| {row['model']} | {row['threads']} | {row['tune']} | {row['rounds']} | {row['trials']} "
        f"| {len(row['better_alone'])} of {row['kernels']} | {'yes' if row['kept'] else 'no'} "
        f"| {p50['untuned']:.2f} | {p50['tuned']:.2f} "
        f"| {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tune", default="10m")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.tune, options.seconds, options.threads)))
        return
    from common import earlier, machine

    print("| model | threads | tune | rounds | trials | kernels better alone | kept | untuned ms | tuned ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.names or MODELS:
        command = [sys.executable, __file__, "--one", name, "--tune", options.tune, "--seconds", str(options.seconds)]
        done = subprocess.run([*command, "--threads", str(options.threads)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed")
        row = json.loads(done.stdout.splitlines()[-1])
        print(line(row), flush=True)
        if options.output:
            rows = [r for r in earlier(options.output) if (r["model"], r["threads"]) != (name, options.threads)]
            document = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": [*rows, row]}
            options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
