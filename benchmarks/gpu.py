"""The zoo on a GPU: ONNX Runtime's CUDA provider, TensorRT and, in float32, TVM where they are, against eager torch.

Usage: python benchmarks/gpu.py [NAME ...] [--precision fp16] [--seconds 6] [--output benchmarks/results/gpu.json]

Each model runs in a process of its own, in float32 without TF32 and in float16. The arms are interleaved in one run and
timed on the wall clock from the call until the GPU is done, inputs and outputs on the device, six times with fresh
sessions: the engines, torch in inference mode, and torch with channels last. Beside it stands what the engine takes
between two CUDA events. Weights are random, BatchNorm statistics too; parity is against the source in float32 on the
CPU. Ratios below 1 mean that the engine is faster; the interval in brackets has 95 % confidence.

The exit status is 4 without a GPU, or without a package that can use it; nothing is written then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARITY = {"fp32": 1e-3, "fp16": 2e-2}
EVENTS = 100


def missing() -> str:
    """What this machine lacks, ``""`` if nothing."""
    from edgecompile.errors import EdgecompileError
    from edgecompile.targets import ort_session

    try:
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU"
        ort_session.parse(ort_session.runtime(), {"providers": "cuda"})
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    except EdgecompileError as error:
        return str(error)
    return next((c.detail for c in ort_session.probe() if "cuda" in c.name and not c.available), "")


def gpu() -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", **cuda}


def run_one(name: str, precision: str, seconds: float, providers: str = "cuda") -> dict[str, Any]:
    import numpy as np
    import torch

    from edgecompile import driver, frontend, measure, models, oracle, registry
    from edgecompile.models.randomize import randomize
    from edgecompile.pipeline import Pipeline

    here = "cuda" if providers == "cuda" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    options: dict[str, Mapping[str, Any]] = {"ort": {"providers": providers}}
    if here == "cuda" and registry.target("trt").missing() is None:
        options["trt"] = {}
    if here == "cuda" and precision == "fp32" and importlib.util.find_spec("tvm") is not None:
        from edgecompile.targets.tvm import cuda

        if cuda.device().exist and cuda.compiler() is not None:
            options["tvm"] = {"arch": f"sm_{cuda.device().compute_version.replace('.', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "export").mkdir()
        source = frontend.load(name, folder=Path(folder) / "export")
        feeds = source.feeds[0]
        wanted = oracle.run(source.graph, feeds)
        built, found = {}, {}
        for label, chosen in options.items():
            graph, place, target = source.graph.copy(), Path(folder) / label, registry.target(label)
            place.mkdir()
            spec = driver.pipeline_spec(driver.Options(target=label, precision=precision))
            Pipeline.parse(spec).run(graph, source.feeds, verify=False)
            engine = target.build(graph, place, chosen)
            built[label] = (target, place, engine.manifest, graph)
            errors = oracle.compare_all(wanted, engine.run(feeds))
            found[label] = {
                "parity": max(e.max_rel for e in errors.values()),
                "cuda_event_ms": _events(engine, feeds),
                "on_cpu": engine.manifest.options.get("_on_cpu"),
                "notes": engine.manifest.options.get("_notes", []),
            }
            engine.close()
        dtype = torch.float16 if precision == "fp16" else torch.float32
        module = randomize(models.create(name), 0, torch.randn(models.ZOO[name].input_shape)).eval().to(here, dtype)
        inputs = [torch.from_numpy(np.array(v)).to(here) for v in feeds.values()]
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        order = random.Random(0)

        def eager(arguments: list[Any]) -> None:
            with torch.inference_mode():
                module(*arguments)
            if here == "cuda":
                torch.cuda.synchronize()

        def layout(memory_format: Any) -> list[Any]:
            module.to(memory_format=memory_format)
            return [t.to(memory_format=memory_format) if t.ndim == 4 else t for t in inputs]

        @contextlib.contextmanager
        def open_arms(torch_format: Any):
            engines = {}
            for label in order.sample(list(built), len(built)):  # what is opened first lies elsewhere in memory
                target, place, manifest, graph = built[label]
                engines[label] = target.load(place, manifest, graph)
            arguments = layout(torch_format)
            yield {label: engines[label].call(feeds) for label in built} | {"eager": lambda: eager(arguments)}
            for engine in engines.values():
                engine.close()

        ratios, p50 = {}, {}
        for baseline, torch_format in (("eager", torch.contiguous_format), ("channels_last", torch.channels_last)):
            samples = measure.interleave_sessions(lambda f=torch_format: open_arms(f), "wall", seconds=seconds)
            p50[baseline] = samples["eager"].p50 * 1e3
            for label in built:
                p50[label] = samples[label].p50 * 1e3
                ratios[f"{label} to {baseline}"] = measure.ratio(samples[label], samples["eager"]).as_dict()
    return {
        "model": name,
        "precision": precision,
        "engines": found,
        "parity_ok": all(e["parity"] <= PARITY[precision] for e in found.values()),
        "p50_ms": p50,
        "ratios": ratios,
    }


def _events(engine: Any, feeds: Mapping[str, Any]) -> float | None:
    """Median time between two CUDA events around an execution; None where the engine cannot record them."""
    import numpy as np

    if engine.clock != "cuda_event":
        return None
    timer = engine.timer(feeds)
    return float(np.median([timer() for _ in range(EVENTS)])) * 1e3


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | precision | engine | parity | CUDA events | p50 | / eager | / channels last |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        for label, found in row["engines"].items():
            event = "" if found["cuda_event_ms"] is None else f"{found['cuda_event_ms']:.3f} ms"
            eager, last = (row["ratios"][f"{label} to {name}"] for name in ("eager", "channels_last"))
            lines.append(
                f"| {row['model']} | {row['precision']} | {label} | {found['parity']:.0e} | {event} "
                f"| {row['p50_ms'][label]:.3f} ms | {eager['value']:.3f} [{eager['low']:.3f}, {eager['high']:.3f}] "
                f"| {last['value']:.3f} [{last['low']:.3f}, {last['high']:.3f}] |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--precision", choices=PARITY, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, options.seconds)))
        return
    if why := missing():
        print(f"nothing to measure: {why}", file=sys.stderr)
        raise SystemExit(4)
    import common

    from edgecompile import models

    precisions = options.precision or list(PARITY)
    jobs = [
        (name, p, "--seconds", str(options.seconds)) for name in options.names or models.names() for p in precisions
    ]
    rows = common.rows(__file__, jobs, markdown, options.output, **gpu())
    wrong = [f"{r['model']} {r['precision']}" for r in rows if not r["parity_ok"]]
    if wrong:
        raise SystemExit(f"parity: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
