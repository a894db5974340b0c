"""Accuracy against cost of pruned CIFAR-10 networks: the pass `prune` beside torch-pruning.

    python benchmarks/prune_accuracy.py --output benchmarks/results/prune_accuracy.json [NAME ...]

Both cut the same network to about the same share of its multiply-accumulates (`macs`, measured on the cut graphs), to
multiples of 8 channels; ours chooses widths as the pass does, with operations in place of times. `top1` is in percent,
without training. `repaired` is after the pass's own repair on calibration images; torch-pruning, which has none, gets
the statistics of its norms taken anew on the same images. `tuned` is after a short fine-tune from there, the same for
both: the same training images in the same order, one epoch of SGD with momentum, a falling rate and no augmentation,
for each of some largest rates, of which the table shows the best. Ours is tuned as a TorchGraph of the cut graph, in
which norms are folded, torch-pruning's as its module, with the statistics of its norms fixed. `latency` is the ratio to
the original of thread CPU time on ONNX Runtime at batch 1, all arms interleaved.

Images are taken evenly from the archives, which are sorted by class. torch-pruning is optional; its rows name the
reason where it cannot cut a network, or does not in a minute. Layers whose cut makes the network fail are kept from it:
the residual stream of the ResNets, whose shortcuts are padded, and all but the feed-forward layers and the stem of
RePaViT, whose heads are reshaped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import common
import trained

NAMES = ("resnet20", "resnet32", "repvgg_cifar", "shvit_cifar", "efficientvit_cifar", "repavit_cifar")
SCORES = ("magnitude", "activation", "reconstruction", "taylor")
THEIRS = "torch-pruning magnitude"
PATIENCE = 60  # seconds for one cut by torch-pruning
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


def node_macs(graph: Any) -> list[int | None]:
    from edgecompile import stats

    return stats.node_macs(graph)


def macs(graph: Any) -> int:
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


def operations(graph: Any, found: Any, choices: dict[str, list[int]]) -> Any:
    """Multiply-accumulates of each layer by width, as the pass has times of them."""
    from edgecompile.passes.prune import widths
    from edgecompile.passes.prune.rules import key

    def each(one: Any) -> dict[str, int]:
        return dict(zip(map(key, one.nodes), (n or 0 for n in node_macs(one)), strict=True))

    whole = {layer: n for layer, n in each(graph).items() if n}
    shares: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for group in found.prunable:
        narrow = choices[group.name][-1]
        cut = graph.copy()
        found.cut(cut, {group.name: range(narrow)})
        for layer, n in each(cut).items():
            if layer in whole and n < whole[layer]:
                shares.setdefault(layer, {})[group.name] = [(narrow, n / whole[layer]), (group.units, 1.0)]
    return widths.Table(whole, shares)


def fitted(graph: Any, found: Any, scores: Any, share: float, feeds: list[dict[str, np.ndarray]]) -> Any:
    """Units to keep for a share of the operations: as the pass has it, operations in place of times."""
    from edgecompile.passes.prune import losses, widths

    choices = widths.candidates(found, graph, ALIGN)
    lost = losses.measured(graph, found, scores, choices, feeds, merge=True)
    way = widths.path(found, scores, choices, operations(graph, found, choices), losses=lost)
    return widths.keep(scores, way.at(share))


def ours(graph: Any, data: dict[str, Any], share: float, kind: str, rates: list[float]) -> tuple[dict[str, Any], Any]:
    from edgecompile.passes.prune import repair, scores
    from edgecompile.passes.prune.dependency import groups
    from edgecompile.torch_graph import TorchGraph

    found = groups(graph)
    feeds = [{"input": x[None]} for x in data["calibration"]]
    keep = fitted(graph, found, scores.compute(kind, graph, found, feeds), share, feeds)
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

    def kept(name: str, layer: Any) -> bool:
        if isinstance(layer, torch.nn.Linear) and layer.out_features == 10:
            return True
        kind = type(module).__name__
        if kind == "ResNet":
            return name == "conv1" or name.endswith(".conv2")
        return kind == "RepaDeit" and (".attn" in name or name.endswith(".fc2"))

    def cut(ratio: float) -> Any:
        made = copy.deepcopy(module)
        layers = ((n, m) for n, m in made.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
        whole = [m for n, m in layers if kept(n, m)]
        importance = tp.importance.MagnitudeImportance(p=2)
        with time_limit(PATIENCE):
            tp.pruner.MagnitudePruner(
                made, example, importance=importance, pruning_ratio=ratio, ignored_layers=whole, round_to=ALIGN
            ).step()
        return made

    low, high = 0.0, 0.75
    for _ in range(5):
        middle = (low + high) / 2
        above = macs(exported(cut(middle))) > share * macs(graph)
        low, high = (middle, high) if above else (low, middle)
    made = cut(high)
    own = exported(made)
    row: dict[str, Any] = {"macs": macs(own) / macs(graph), "top1": top1(own, *data["test"])}
    restate(made, data["calibration"])
    row["repaired"] = top1(exported(made), *data["test"])
    row["tuned"] = {}
    for rate in rates:
        again = copy.deepcopy(made).eval()
        tuned(again, data["train"], rate)
        row["tuned"][str(rate)] = top1(exported(again), *data["test"])
    return row, own


def restate(module: Any, images: np.ndarray) -> None:
    """Take the statistics of the norms anew, in place."""
    import torch

    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    module.train()
    with torch.no_grad():
        module(torch.from_numpy(images))
    module.eval()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some time."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no cut in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def latency(graphs: dict[str, Any], sample: np.ndarray, seconds: float) -> dict[str, Any]:
    """Ratio to the arm ``original``."""
    from edgecompile import measure, qdq

    @contextmanager
    def arms():
        yield {name: functools.partial(qdq.kernels(g), {"input": sample}) for name, g in graphs.items()}

    taken = measure.interleave_sessions(arms, "thread_cpu", sessions=6, seconds=seconds)
    return {n: measure.ratio(s, taken["original"]).as_dict() for n, s in taken.items() if n != "original"}


def run(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each share."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, mean, std = network(name)
    test = pictures("cifar10_test.npz", options.test, mean, std)
    train = pictures("cifar10_train.npz", options.train, mean, std)
    data = {"test": test, "train": train, "calibration": train[0][:: max(1, len(train[0]) // options.calibration)]}
    graph = exported(module)
    facts: dict[str, Any] = {"network": name, "test": options.test, "train": options.train,
                             "calibration": len(data["calibration"]), "macs": macs(graph),
                             "top1": top1(graph, *test)}  # fmt: skip
    print(f"{name}: {facts['top1']:.1f} %", file=sys.stderr, flush=True)
    for share in options.shares:
        makers: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
            f"ours {kind}": functools.partial(ours, graph, data, share, kind, options.rates) for kind in options.scores
        }
        makers[THEIRS] = functools.partial(theirs, module, graph, data, share, options.rates)
        arms: dict[str, dict[str, Any]] = {}
        graphs = {"original": graph}
        for arm, make in makers.items():
            try:
                arms[arm], graphs[arm] = make()
            except Exception as error:
                if arm != THEIRS:
                    raise
                arms[arm] = {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            print(f"  {share} {arm}", arms[arm], file=sys.stderr, flush=True)
        for arm, ratio in latency(graphs, test[0][:1], options.seconds).items():
            arms[arm]["latency"] = ratio
        yield {**facts, "share": share, "arms": arms}


def merged(known: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with one more; what it does not measure again of a row of the same network, share and images is kept."""

    def facts(one: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in one.items() if k != "arms"}

    old = next((one["arms"] for one in known if facts(one) == facts(row)), {})
    others = [one for one in known if (one["network"], one["share"]) != (row["network"], row["share"])]
    return [*others, {**row, "arms": old | row["arms"]}]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | arm | MACs | latency | pruned | repaired | tuned |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        best = {k: max(map(functools.partial(score, k), row["arms"].values())) for k in ("top1", "repaired", "tuned")}
        for number, (arm, own) in enumerate(row["arms"].items()):
            first = f"{row['network']}, {row['top1']:.1f}" if number == 0 else ""
            if "failed" in own:
                lines.append(f"| {first} | {arm} | {own['failed']} | | | | |")
                continue
            cells = [f"{own['macs']:.2f}", f"{own['latency']['value']:.2f}"]
            for kind, most in best.items():
                value = score(kind, own)
                cells.append(f"**{value:.1f}**" if value == most else f"{value:.1f}")
            lines.append(f"| {first} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score(kind: str, arm: dict[str, Any]) -> float:
    """Top-1 of an arm, of the best rate where it is tuned; 0 where it failed."""
    return max(arm["tuned"].values(), default=0.0) if kind == "tuned" and "tuned" in arm else arm.get(kind, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--output", type=Path, help="JSON file of results; what is not measured again is kept")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.7, 0.5], help="of the operations")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--train", type=int, default=2048, help="training images of the fine-tune")
    parser.add_argument("--calibration", type=int, default=128, help="of the training images")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.002, 0.0005], help="largest learning rates")
    parser.add_argument("--seconds", type=float, default=2.0, help="per arm of the latency")
    options = parser.parse_args()
    if not trained.DATA.is_dir():
        parser.error(f"{trained.DATA} is not there; set EDGECOMPILE_DATA")
    if unknown := [n for n in options.names if n not in NAMES]:
        parser.error(f"no network {', '.join(unknown)}")
    rows = common.earlier(options.output)
    for row in itertools.chain.from_iterable(run(name, options) for name in options.names or NAMES):
        print(table([row]), flush=True)
        rows = merged(rows, row)
        if options.output is not None:
            document = {"machine": common.machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
