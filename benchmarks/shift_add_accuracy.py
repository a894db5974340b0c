"""What shift-add costs of accuracy: the networks trained on CIFAR-10, after training and after a short fine-tune.

Linear layers and 1x1 convolutions are coded with each code and width, and softmax attention is written in its binary
forms. `top1` is the share of right answers on the test images in percent, judged by ONNX Runtime on the rewritten
graph; `drop` what it lost against the float graph in points; `tuned` and `tuned_drop` the same after the fine-tune, and
`bytes` the size of the coded weights over that in float32. The fine-tune runs over the training images `epochs` times:
AdamW, the float network's answers as the target beside the labels, and the trained codes are written back into the
graph.

    python benchmarks/shift_add_accuracy.py --output benchmarks/results/shift_add_accuracy.json repavit_cifar
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import common
import trained

NETWORKS = ("repavit_cifar", "shvit_cifar", "efficientvit_cifar", "repvgg_cifar")
# What the pass is asked for, and the epochs of the fine-tune that follows.
CODES = (
    ("code=binary,bits=4", 1),
    ("code=sp2,bits=4", 1),
    ("code=pot,bits=4", 1),
    ("code=binary,bits=3", 1),
    ("code=binary,bits=2", 1),
    ("code=sp2,bits=8", 0),
    ("code=binary,bits=0,size=0.11", 0),
)
ATTENTION = (
    ("attention=angular,threshold=image,window=9,linear=false", 1),
    ("attention=angular,threshold=image,window=9,linear=false", 3),
    ("attention=angular,threshold=image,window=9,linear=false", 12),
    ("attention=angular,threshold=image,linear=false", 1),
    ("attention=angular,window=9,code=binary,bits=4", 1),
    ("attention=hamming,linear=false", 1),
)
CALIBRATION = 64


def images(name: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of an archive, uint8 ``[N, 3, 32, 32]``, and their labels."""
    found, labels = trained.images(name, count)
    return np.stack(list(found)).transpose(0, 3, 1, 2), labels


class Subject:
    """A trained network: its graph after the exact passes, and its images as it takes them."""

    def __init__(self, name: str, judged: int | None):
        from edgecompile import frontend, models
        from edgecompile.pipeline import Pipeline

        entry = models.ZOO[name]
        mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (entry.mean, entry.std))
        module, example = models.create(name, pretrained=True), np.zeros(entry.input_shape, np.float32)
        import torch

        with tempfile.TemporaryDirectory() as folder:
            self.graph = frontend.from_module(module, torch.from_numpy(example), folder=Path(folder)).graph
        Pipeline.parse("clean,fold_norm,reparam").run(self.graph)
        self.name, self.input = name, self.graph.inputs[0].name
        self.train, self.train_labels = images("cifar10_train.npz")
        test, self.labels = images("cifar10_test.npz", judged)
        self.scaled = lambda x: (x.astype(np.float32) / 255 - mean) / std
        self.test = self.scaled(test)

    def top1(self, graph) -> float:
        """Percentage of right answers, one image at a time."""
        import onnxruntime as ort

        session = ort.InferenceSession(graph.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
        answers = [int(np.argmax(session.run(None, {self.input: x[None]})[0])) for x in self.test]
        return 100 * float(np.mean(np.asarray(answers) == self.labels))

    def rewritten(self, spec: str):
        """The graph after the pass, and its notes."""
        from edgecompile.calibration_data import open_data
        from edgecompile.pipeline import Context, Pipeline

        graph = self.graph.copy()
        step = self.train[:: len(self.train) // CALIBRATION][:CALIBRATION]
        feeds = [{self.input: x[None]} for x in self.scaled(step)]
        context = Context(calibration=open_data(feeds, graph.signature().inputs))
        context.begin("shift_add")
        found = Pipeline.parse(f"shift_add{{{spec}}}").passes[0].run(graph, context)
        return graph, [str(n) for n in found.notes]

    def tuned(self, graph, epochs: float, rate: float, seed: int = 0):
        """The graph after a fine-tune."""
        import torch
        from torch.nn import functional as F

        from edgecompile.passes.shift_add import to_torch
        from edgecompile.torch_graph import TorchGraph

        torch.manual_seed(seed)
        student, teacher = to_torch(graph), TorchGraph(self.graph).requires_grad_(False)
        optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.01)
        batch, rng = 128, np.random.default_rng(seed)
        steps = int(epochs * len(self.train) / batch)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        order = np.concatenate([rng.permutation(len(self.train)) for _ in range(int(np.ceil(epochs)))])
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x = np.pad(self.train[chosen], ((0, 0), (0, 0), (4, 4), (4, 4)))
            at, flip = rng.integers(0, 9, (batch, 2)), rng.random(batch) < 0.5
            cut = [one[:, a : a + 32, b : b + 32] for one, (a, b) in zip(x, at, strict=True)]
            view = torch.from_numpy(
                self.scaled(np.stack([c[:, :, ::-1] if f else c for c, f in zip(cut, flip, strict=True)]))
            )
            answer, labels = student(view), torch.from_numpy(self.train_labels[chosen])
            with torch.no_grad():
                target = teacher(view).softmax(1)
            loss = F.cross_entropy(answer, target) + 0.5 * F.cross_entropy(answer, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            if step % 50 == 0:
                print(f"  {step}/{steps} {loss.item():.3f}", file=sys.stderr, flush=True)
        return student.to_graph()


def stored(graph) -> tuple[int, int]:
    """Bytes of the coded weights, and what they would take in float32."""
    from edgecompile.functions import CODED
    from edgecompile.passes.shift_add import ops, trainable

    found = [trainable.read(graph, n) for n in graph.nodes if n.domain == ops.DOMAIN and n.op in CODED]
    return sum(c.bytes for c in found), sum(4 * c.codes.size for c in found)


def measured(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a network."""
    subject = Subject(name, arguments.images)
    base = subject.top1(subject.graph)
    yield {"network": name, "spec": "float32", "top1": base, "images": len(subject.labels), "epochs": 0.0}
    attends = any(n.op == "Softmax" for n in subject.graph.nodes)
    # What the goals ask for comes first.
    for spec, epochs in [
        *CODES[:1],
        *(ATTENTION[:1] if attends else ()),
        *CODES[1:],
        *(ATTENTION[1:] if attends else ()),
    ]:
        if arguments.spec not in f"{spec} {epochs}":
            continue
        graph, notes = subject.rewritten(spec)
        coded, plain = stored(graph)
        row: dict[str, Any] = {"network": name, "spec": spec, "top1": subject.top1(graph), "notes": notes}
        row |= {"drop": base - row["top1"], "bytes": coded / plain if plain else None, "epochs": 0.0}
        if epochs := epochs * arguments.epochs:
            start = time.process_time()
            # Codes start next to what was trained, attention far from it.
            rate = arguments.rate if "attention" in spec else arguments.rate / 5
            row["tuned"] = subject.top1(subject.tuned(graph, epochs, rate))
            row |= {"epochs": epochs, "rate": rate, "tuned_drop": base - row["tuned"]}
            row["tune_cpu_s"] = time.process_time() - start
        yield row


def line(row: dict[str, Any]) -> str:
    """One row in Markdown."""
    cells = [row["network"], row["spec"]]
    cells += ["" if (v := row.get(k)) is None else f"{v:.3f}" if k == "bytes" else f"{v:.2f}"
              for k in ("top1", "drop", "epochs", "tuned", "tuned_drop", "bytes")]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--output", type=Path, help="JSON file of results; rows that are not measured again are kept")
    parser.add_argument("--images", type=int, help="test images; all by default")
    parser.add_argument("--spec", default="", help="only passes whose options, a space and epochs contain this text")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor of those of the fine-tunes")
    parser.add_argument("--rate", type=float, default=5e-4, help="largest learning rate; a fifth without attention")
    arguments = parser.parse_args()
    print(
        "| network | pass | top1 | drop | epochs | tuned | tuned drop | bytes |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in arguments.networks:
        rows = common.earlier(arguments.output)
        for row in measured(name, arguments):
            rows = [r for r in rows if any(r.get(k) != row[k] for k in ("network", "spec", "epochs"))] + [row]
            print(line(row), flush=True)
            if arguments.output:
                facts = {"date": time.strftime("%Y-%m-%d"), "machine": common.machine()}
                arguments.output.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
