"""Int8 on trained networks: accuracy and latency of the pass `quantize` beside ONNX Runtime's own quantizer.

Every arm quantises the same float graph with the same calibration samples and is judged with the CPU provider's own
kernels. `top1` is the share of right answers in percent, `loss` what int8 costs of it in points, `agreement` the share
of samples on which int8 and float answer alike, `snr_db` the signal-to-noise ratio of the logits over all samples, and
`simulated_db` the same of the simulation in floating point. `against` compares the top-1 with that of the best arm of
ONNX Runtime, sample by sample. Latency is one thread's CPU time per call at batch 1, float and int8 interleaved in
fresh sessions; the ratio's interval has 95 % confidence.

MobileNetV2 is calibrated on every eighth of the 500 ImageNet photographs it is judged on, by all arms alike; the
CIFAR-10 networks on 128 training images, evenly spread over an archive that is sorted by class, and judged on the 5,000
test images. `ours searched` reverts layers until no more than 0.2 % of the top-1 on 1,000 other training images is
lost; the networks of ours, `*_cifar`, are held to that arm. With --zoo, models of the zoo with random weights and
random inputs: latency, and the real kernels against their simulation, mean more there than the ratio to float does.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trained

os.environ.setdefault("OMP_NUM_THREADS", "1")
ORT_METHODS = ("MinMax", "Entropy", "Percentile")
OURS = ("mse", "minmax", "percentile", "entropy")
OWN = ("shvit_cifar", "efficientvit_cifar", "repavit_cifar", "repvgg_cifar")
SEARCHED = "ours searched"
# Points of top-1 that int8 may lose, and the least agreement in percent.
LIMITS = {"mobilenetv2": (0.5, 96.0), "resnet20": (0.3, 0.0), "resnet32": (0.3, 0.0)} | dict.fromkeys(OWN, (0.5, 0.0))
# Latency of int8 over that of fp32, at most.
GOALS = {"repvgg_a0": 0.52, "damoyolo_t": 0.58, "shvit_s4": 0.60, "efficientvit_m5": 0.63}
CALIBRATION, SCORED = 128, 1000  # training images of CIFAR-10
DROP = "0.2%"
SESSIONS = 6
FRESH = 32  # samples that real kernels and simulation are compared on: of fewer, one rounding decides


@dataclass(frozen=True)
class Subject:
    """A trained network: its float graph, samples to calibrate and judge on, labels, and how to read its logits.

    `scored` are samples and labels that a search for layers may score on: neither calibrated nor judged on.
    """

    graph: Any
    calibration: Sequence[np.ndarray]
    samples: Sequence[np.ndarray]
    labels: np.ndarray
    first: int = 0
    scored: tuple[Sequence[np.ndarray], np.ndarray] | None = None


def mobilenetv2() -> Subject:
    from edgecompile.graph import Graph

    pictures, labels = trained.images("imagenet_500.npz")
    samples = [(p.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None] for p in pictures]
    graph = prepared(Graph.load(trained.DATA / "mobilenetv2_100_224_dequant.onnx"), samples[0])
    return Subject(graph, samples[::8], samples, labels, first=1)


def resnet(name: str) -> Subject:
    return cifar(trained.resnet(name), *(np.array(v, np.float32) for v in trained.IMAGENET))


def own(name: str) -> Subject | None:
    """One of the networks that `examples/train_cifar.py` trains; None without its checkpoint."""
    from edgecompile import models

    if name not in models.pretrained_names():
        return None
    entry = models.ZOO[name]
    return cifar(models.create(name, pretrained=True).eval(), entry.mean, entry.std)


def cifar(model: Any, mean: Any, std: Any) -> Subject:
    """A torch module for the images of CIFAR-10."""
    import torch

    from edgecompile.graph import Graph

    shift, scale = (np.asarray(v, np.float32) for v in (mean, std))

    def samples(archive: str, count: int | None = None, part: float = 0.0) -> tuple[list[np.ndarray], np.ndarray]:
        pictures, labels = trained.images(f"cifar10_{archive}.npz", count, part)
        return [((p / np.float32(255) - shift) / scale).transpose(2, 0, 1)[None] for p in pictures], labels

    calibration, _ = samples("train", CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (torch.zeros(1, 3, 32, 32),), path, input_names=["input"], output_names=["logits"],
                          opset_version=18, dynamo=True, verbose=False, external_data=False)  # fmt: skip
        graph = prepared(Graph.load(path), calibration[0])
    return Subject(graph, calibration, *samples("test"), scored=samples("train", SCORED, 0.5))


def prepared(graph: Any, sample: np.ndarray) -> Any:
    """The float graph that every arm starts from."""
    from edgecompile.pipeline import Pipeline

    Pipeline.parse("clean,fold_norm,reparam").run(graph, [{graph.inputs[0].name: sample}], verify=False, strict=True)
    return graph


SUBJECTS: Mapping[str, Callable[[], Subject | None]] = {
    "mobilenetv2": mobilenetv2,
    "resnet20": lambda: resnet("resnet20"),
    "resnet32": lambda: resnet("resnet32"),
    **{name: functools.partial(own, name) for name in OWN},
}


# -- arms --------------------------------------------------------------------------------------------------------------


def ours(
    graph: Any, calibration: Sequence[np.ndarray], evaluate: Callable | None = None, **options: Any
) -> tuple[Any, list[str]]:
    from edgecompile.calibration_data import open_data
    from edgecompile.passes.quantize import Quantize
    from edgecompile.pipeline import Context

    made, context = graph.copy(), Context(evaluate=evaluate)
    port = graph.inputs[0].name
    context.calibration = open_data([{port: x} for x in calibration], graph.signature().inputs)
    context.begin("quantize")
    result = Quantize(**options).run(made, context)
    made.check(graph.signature())
    return made, [str(n) for n in result.notes]


def runtime(graph: Any, calibration: Sequence[np.ndarray], method: str) -> Any:
    """ONNX Runtime's ``quantize_static`` with per-channel int8 weights and uint8 activations as Q/DQ."""
    from onnxruntime import quantization as tool

    from edgecompile.graph import Graph

    port, samples = graph.inputs[0].name, iter(calibration)

    class Reader(tool.CalibrationDataReader):
        def get_next(self):
            x = next(samples, None)
            return None if x is None else {port: x}

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        graph.save(source)
        tool.quantize_static(
            str(source), str(result), Reader(), tool.QuantFormat.QDQ, per_channel=True,
            activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8,
            calibrate_method=getattr(tool.CalibrationMethod, method),
        )  # fmt: skip
        return Graph.load(result)


def logits(graph: Any, samples: Sequence[np.ndarray], first: int, run: Callable | None = None) -> np.ndarray:
    from edgecompile import qdq

    call = run or qdq.kernels(graph)
    port = graph.inputs[0].name
    return np.concatenate([next(iter(call({port: x}).values()))[:, first:] for x in samples])


def judged(reference: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from edgecompile import qdq

    answers, own = reference.argmax(1), outputs.argmax(1)
    return {
        "top1": 100 * float((own == labels).mean()),
        "loss": 100 * float((answers == labels).mean() - (own == labels).mean()),
        "agreement": 100 * float((answers == own).mean()),
        "snr_db": qdq.snr([{"y": reference}], [{"y": outputs}]),
    }


def latency(graphs: Mapping[str, Any], sample: np.ndarray, seconds: float) -> dict[str, Any]:
    """p50 in milliseconds of each arm, and its ratio to float."""
    from edgecompile import measure, qdq

    port = graphs["float"].inputs[0].name

    @contextmanager
    def arms():
        calls = {name: functools.partial(qdq.kernels(g), {port: sample}) for name, g in graphs.items()}
        yield calls
        calls.clear()
        gc.collect()

    taken = measure.interleave_sessions(arms, "thread_cpu", sessions=SESSIONS, seconds=seconds)
    found: dict[str, dict[str, Any]] = {name: {"p50_ms": s.p50 * 1e3} for name, s in taken.items()}
    for name, own in found.items():
        if name != "float":
            own["ratio"] = measure.ratio(taken[name], taken["float"]).as_dict()
    return found


def searched(subject: Subject) -> tuple[Any, list[str]]:
    """Ours, with the layers that a search under a score leaves in int8."""
    from edgecompile.pipeline import Drop

    assert subject.scored is not None
    samples, labels = subject.scored

    def evaluate(graph: Any, _: bool) -> float:
        return float((logits(graph, samples, subject.first).argmax(1) == labels).mean())

    return ours(subject.graph, subject.calibration, evaluate, method="mse", max_drop=Drop(DROP), seconds=240.0)


def run_subject(name: str, seconds: float) -> dict[str, Any] | None:
    """A trained network in floating point and in every arm; None where it is not there."""
    from edgecompile import qdq

    subject = SUBJECTS[name]()
    if subject is None:
        return None
    reference = logits(subject.graph, subject.samples, subject.first)
    right = 100 * float((reference.argmax(1) == subject.labels).mean())
    row: dict[str, Any] = {"subject": name, "samples": len(subject.samples), "calibration": len(subject.calibration)}
    row |= {"top1_float": right, "arms": {}}
    timed, right_by = {"float": subject.graph}, {}
    arms = [*(f"ours {m}" for m in OURS), *(f"ort {m}" for m in ORT_METHODS), *([SEARCHED] if name in OWN else [])]
    for arm in arms:
        who, method = arm.split()
        start = time.process_time()
        if arm == SEARCHED:
            graph, notes = searched(subject)
        elif who == "ours":
            graph, notes = ours(subject.graph, subject.calibration, method=method)
        else:
            graph, notes = runtime(subject.graph, subject.calibration, method), []
        spent = time.process_time() - start
        outputs = logits(graph, subject.samples, subject.first)
        right_by[arm] = outputs.argmax(1) == subject.labels
        found = judged(reference, outputs, subject.labels) | {"seconds": spent, "notes": notes}
        if who == "ours":
            few = slice(0, None, max(1, len(subject.samples) // 50))
            plain = logits(graph, subject.samples[few], subject.first, qdq.simulation(graph))
            found["simulated_db"] = qdq.snr([{"y": reference[few]}], [{"y": plain}])
            found["real_db"] = qdq.snr([{"y": reference[few]}], [{"y": outputs[few]}])
        row["arms"][arm] = found
        if arm in ("ours mse", "ort MinMax", SEARCHED):
            timed[arm] = graph
        print(f"  {arm:16}", {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}, flush=True)
    row["latency"] = latency(timed, subject.samples[0], seconds)
    loss, agreement = LIMITS[name]
    held = row["arms"][SEARCHED if name in OWN else "ours mse"]
    row["holds"] = held["loss"] <= loss and held["agreement"] >= agreement
    best = max((f"ort {m}" for m in ORT_METHODS), key=lambda arm: row["arms"][arm]["top1"])
    mine = right_by[SEARCHED if name in OWN else "ours mse"]
    row["against"] = compared(mine, right_by[best]) | {"arm": best}
    return row


def compared(mine: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Points of top-1 by which ours is ahead, and how likely so much is where neither is better (sign test).

    Args:
        mine, theirs: whether each sample was answered rightly, bool [samples].
    """
    from scipy import stats

    won, lost = int((mine & ~theirs).sum()), int((~mine & theirs).sum())
    p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    return {"ahead": 100 * (won - lost) / len(mine), "won": won, "lost": lost, "p": float(p)}


def run_zoo(name: str, seconds: float) -> dict[str, Any]:
    """A zoo model with random weights: is int8 faster, and do the kernels do what the simulation does?"""
    from edgecompile import frontend, qdq

    with tempfile.TemporaryDirectory() as folder:
        source = frontend.load(name, folder=Path(folder))
        port = source.graph.inputs[0].name
        rng = np.random.default_rng(0)
        shape = next(iter(source.feeds[0].values())).shape
        samples = [rng.standard_normal(shape).astype(np.float32) for _ in range(16 + FRESH)]
        graph = prepared(source.graph, samples[0])
        made, notes = ours(graph, samples[:16])
    fresh = [{port: x} for x in samples[16:]]
    reference = list(map(qdq.kernels(graph), fresh))
    row: dict[str, Any] = {"model": name, "notes": notes}
    row["real_db"] = qdq.snr(reference, map(qdq.kernels(made), fresh))
    row["simulated_db"] = qdq.snr(reference, map(qdq.simulation(made), fresh))
    row["latency"] = latency({"float": graph, "ours mse": made}, samples[0], seconds)
    if name in GOALS:
        row["goal"] = GOALS[name]
        row["holds"] = row["latency"]["ours mse"]["ratio"]["value"] <= GOALS[name]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} (all)")
    parser.add_argument("--zoo", nargs="+", default=[], metavar="NAME", help="zoo models instead")
    parser.add_argument("--seconds", type=float, default=4.0, help="per arm of the latency, over all sessions (4)")
    parser.add_argument("--out", type=Path, help="JSON file of results")
    options = parser.parse_args()
    if unknown := [n for n in options.subjects if n not in SUBJECTS]:
        parser.error(f"no subject {', '.join(unknown)}")
    if not options.zoo and not trained.DATA.is_dir():
        parser.error(f"{trained.DATA} is not there; set EDGECOMPILE_DATA")
    from common import machine

    document = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    failed = False
    work = [("zoo", n) for n in options.zoo] or [("subjects", n) for n in options.subjects or SUBJECTS]
    for section, name in work:
        print(name, flush=True)
        row = (run_zoo if section == "zoo" else run_subject)(name, options.seconds)
        if row is None:
            print("  left out: its checkpoint is not there", flush=True)
            continue
        row["date"] = time.strftime("%Y-%m-%d")
        failed |= not row.get("holds", True)
        shown = {k: v for k, v in row.items() if k not in ("arms", "notes")}
        print(" ", json.dumps(shown), flush=True)
        document |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        document.setdefault(section, {})[name] = row
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
