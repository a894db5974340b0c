"""Accuracy against cost of pruned CIFAR-10 networks: the pass `prune` beside torch-pruning.

    python benchmarks/prune_accuracy.py --output benchmarks/results/prune_accuracy.json [NAME ...]

Both cut the same network to about the same share of its multiply-accumulates (`macs`, measured on the cut graphs), to
multiples of 8 channels. `top1` is in percent, without training; `repaired` after the pass's own repair on calibration
images; `tuned` after a short fine-tune, the same for both: the same training images in the same order, one epoch of SGD
with momentum, a falling rate and no augmentation, for each of some largest rates, of which the table shows the best.
Ours is tuned as a TorchGraph of the repaired cut graph, in which norms are folded, torch-pruning's as its module, with
the running statistics of its norms fixed. `latency` is the ratio to the original of thread CPU time on ONNX Runtime at
batch 1, all arms interleaved.

Images are taken evenly from the archives, which are sorted by class. torch-pruning is optional; its rows name the
reason where it cannot cut a network. It fails on the padded shortcuts of the ResNets unless their residual stream stays
whole (the stem and every second convolution of a block), so that is what it is given there.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import common
import trained

NAMES = ("resnet20", "resnet32", "repvgg_cifar", "shvit_cifar", "efficientvit_cifar", "repavit_cifar")
SCORES = ("magnitude", "activation", "taylor")
LEAST = 0.25  # of each group stays
ALIGN = 8  # channels: other widths are slower on ONNX Runtime than the originals


def pictures(name: str, count: int, mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """``count`` images spread evenly over an archive, float32 [count, 3, 32, 32], and their labels."""
    raw, labels = trained.images(name, count)
    scaled = (np.stack(list(raw)) / np.float32(255) - np.array(mean, np.float32)) / np.array(std, np.float32)
    return scaled.transpose(0, 3, 1, 2).copy(), labels


def network(name: str) -> tuple[Any, Sequence[float], Sequence[float]]:
    """A trained module, and what its images have subtracted and are divided by."""
    from edgecompile import models

    if name in models.ZOO:
        entry = models.ZOO[name]
        assert entry.mean is not None and entry.std is not None
        return models.create(name, pretrained=True), entry.mean, entry.std
    return trained.resnet(name), *trained.IMAGENET


def exported(module: Any) -> Any:
    """The graph of a module after the exact passes."""
    import torch

    from edgecompile.graph import Graph
    from edgecompile.pipeline import Pipeline

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module.eval(), (torch.zeros(1, 3, 32, 32),), path, input_names=["input"], dynamo=True,
                          output_names=["logits"], opset_version=18, verbose=False, external_data=False)  # fmt: skip
        graph = Graph.load(path)
    Pipeline.parse("clean,fold_norm,reparam").run(graph, verify=False, strict=True)
    return graph


def macs(graph: Any) -> int:
    from edgecompile.stats import node_macs

    return sum(n or 0 for n in node_macs(graph))


def top1(graph: Any, images: np.ndarray, labels: np.ndarray) -> float:
    from edgecompile import qdq

    call = qdq.kernels(graph)
    answers = [int(next(iter(call({"input": x[None]}).values())).argmax()) for x in images]
    return 100 * float((np.array(answers) == labels).mean())


def tuned(module: Any, train: tuple[np.ndarray, np.ndarray], rate: float, batch: int = 32) -> None:
    """One epoch of SGD, in place; the order of the images is the same for every module."""
    import torch

    images, labels = train
    order = np.random.default_rng(0).permutation(len(images))
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)
    steps = len(order) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        out = module(torch.from_numpy(images[chosen]))
        loss = torch.nn.functional.cross_entropy(out, torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()


def fitted(graph: Any, found: Any, scores: Any, share: float) -> dict[str, np.ndarray]:
    """Units to keep for a share of the operations: those go first that matter least per operation they cost."""
    whole = macs(graph)

    def cost(keep: dict[str, np.ndarray]) -> int:
        cut = graph.copy()
        found.cut(cut, keep)
        return macs(cut)

    each = {g.name: max(1, whole - cost({g.name: np.arange(g.units - 1)})) for g in found.prunable}
    worth = {name: values / each[name] for name, values in scores.items()}

    def keep(limit: float) -> dict[str, np.ndarray]:
        made = {}
        for name, values in worth.items():
            least = max(1, round(LEAST * len(values)))
            count = max(least, int((values >= limit).sum()))
            if len(values) >= ALIGN:
                count = min(len(values), max(1, round(count / ALIGN)) * ALIGN)
            made[name] = np.sort(np.argsort(-values, kind="stable")[:count])
        return made

    levels = np.unique(np.concatenate(list(worth.values())))
    low, high = 0, len(levels) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(keep(levels[middle])) > share * whole else (low, middle)
    return keep(levels[high])


def ours(graph: Any, data: dict[str, Any], share: float, kind: str, rates: list[float]) -> tuple[dict[str, Any], Any]:
    from edgecompile.passes.prune import repair, scores
    from edgecompile.passes.prune.dependency import groups
    from edgecompile.torch_graph import TorchGraph

    found = groups(graph)
    feeds = [{"input": x[None]} for x in data["calibration"]]
    keep = fitted(graph, found, scores.compute(kind, graph, found, feeds), share)
    cut = graph.copy()
    found.cut(cut, keep)
    row: dict[str, Any] = {"macs": macs(cut) / macs(graph), "top1": top1(cut, *data["test"])}
    repaired = cut.copy()
    repair.repair(graph, repaired, found, keep, feeds)
    row["repaired"] = top1(repaired, *data["test"])
    row["tuned"] = {}
    for rate in rates:
        module = TorchGraph(repaired)
        tuned(module, data["train"], rate)
        row["tuned"][str(rate)] = top1(module.to_graph(), *data["test"])
    return row, cut


def theirs(
    module: Any, graph: Any, data: dict[str, Any], share: float, rates: list[float]
) -> tuple[dict[str, Any], Any]:
    """torch-pruning's magnitude pruner, the same ratio for every layer, at the same operations."""
    import torch
    import torch_pruning as tp

    example = torch.zeros(1, 3, 32, 32)

    def cut(ratio: float) -> Any:
        made = copy.deepcopy(module)
        kept = [m for m in made.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 10]
        if type(made).__name__ == "ResNet":
            kept += [m for n, m in made.named_modules() if n == "conv1" or n.endswith(".conv2")]
        importance = tp.importance.MagnitudeImportance(p=2)
        tp.pruner.MagnitudePruner(
            made, example, importance=importance, pruning_ratio=ratio, ignored_layers=kept, round_to=ALIGN
        ).step()
        return made

    whole = tp.utils.count_ops_and_params(module, example)[0]
    low, high = 0.0, 0.75
    for _ in range(6):
        middle = (low + high) / 2
        above = tp.utils.count_ops_and_params(cut(middle), example)[0] > share * whole
        low, high = (middle, high) if above else (low, middle)
    made = cut(high)
    own = exported(made)
    row: dict[str, Any] = {"macs": macs(own) / macs(graph), "top1": top1(own, *data["test"])}
    row["tuned"] = {}
    for rate in rates:
        again = copy.deepcopy(made).eval()
        tuned(again, data["train"], rate)
        row["tuned"][str(rate)] = top1(exported(again), *data["test"])
    return row, own


def latency(graphs: dict[str, Any], sample: np.ndarray, seconds: float) -> dict[str, Any]:
    """Ratio to the arm ``original``."""
    from edgecompile import measure, qdq

    @contextmanager
    def arms():
        yield {name: functools.partial(qdq.kernels(g), {"input": sample}) for name, g in graphs.items()}

    taken = measure.interleave_sessions(arms, "thread_cpu", sessions=6, seconds=seconds)
    return {n: measure.ratio(s, taken["original"]).as_dict() for n, s in taken.items() if n != "original"}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, mean, std = network(name)
    test = pictures("cifar10_test.npz", options.test, mean, std)
    train = pictures("cifar10_train.npz", options.train, mean, std)
    data = {"test": test, "train": train, "calibration": train[0][:: max(1, len(train[0]) // options.calibration)]}
    graph = exported(module)
    row: dict[str, Any] = {"network": name, "test": options.test, "train": options.train, "macs": macs(graph),
                           "top1": top1(graph, *test), "points": []}  # fmt: skip
    print(f"{name}: {row['top1']:.1f} %", file=sys.stderr, flush=True)
    for share in options.shares:
        makers: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
            f"ours {kind}": functools.partial(ours, graph, data, share, kind, options.rates) for kind in options.scores
        }
        makers["torch-pruning magnitude"] = lambda share=share: theirs(module, graph, data, share, options.rates)
        point: dict[str, Any] = {"share": share, "arms": {}}
        graphs = {"original": graph}
        for arm, make in makers.items():
            try:
                point["arms"][arm], graphs[arm] = make()
            except Exception as error:
                if arm.startswith("ours"):
                    raise
                point["arms"][arm] = {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            print(f"  {share} {arm}", point["arms"][arm], file=sys.stderr, flush=True)
        for arm, ratio in latency(graphs, test[0][:1], options.seconds).items():
            point["arms"][arm]["latency"] = ratio
        row["points"].append(point)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | arm | MACs | latency | top-1 | repaired | tuned |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['network']} | original | 1 | 1 | {row['top1']:.1f} | | |")
        for point in row["points"]:
            for arm, own in point["arms"].items():
                cells = [f"{own['macs']:.2f}" if "macs" in own else own["failed"],
                         f"{own['latency']['value']:.2f}" if "latency" in own else "",
                         *(f"{own[k]:.1f}" if k in own else "" for k in ("top1", "repaired")),
                         f"{max(own['tuned'].values()):.1f}" if "tuned" in own else ""]  # fmt: skip
                lines.append(f"| {row['network']} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--output", type=Path, help="JSON file of results; rows of other networks in it stay")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.7, 0.5], help="of the operations")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--train", type=int, default=2048, help="training images of the fine-tune")
    parser.add_argument("--calibration", type=int, default=128, help="of the training images")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.002], help="largest learning rates")
    parser.add_argument("--seconds", type=float, default=2.0, help="per arm of the latency")
    options = parser.parse_args()
    if not trained.DATA.is_dir():
        parser.error(f"{trained.DATA} is not there; set EDGECOMPILE_DATA")
    if unknown := [n for n in options.names if n not in NAMES]:
        parser.error(f"no network {', '.join(unknown)}")
    for name in options.names or NAMES:
        row = run(name, options)
        print(table([row]), flush=True)
        if options.output is not None:
            known = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
            rows = [r for r in known if r["network"] != name] + [row]
            document = {"machine": common.machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
