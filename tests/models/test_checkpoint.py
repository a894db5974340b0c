from __future__ import annotations

import argparse
import os
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgecompile import models
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.models.checkpoint import load
from edgecompile.models.randomize import randomize

DATA = Path(os.environ.get("EDGECOMPILE_DATA", "../shared/data"))


def net(seed: int, features: int = 3) -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(4, features), nn.BatchNorm1d(features), nn.Linear(features, 2)), seed)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refused(path: Path, *words: str) -> str:
    """Loading fails with an InputError that holds the words, and leaves the model as it was."""
    model = net(1)
    before = state(model)
    with pytest.raises(InputError) as caught:
        load(model, path)
    assert equal(state(model), before)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message
    return message


WRAPPERS = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best_prec1": 91.8},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "ema": lambda s: {"ema": s, "model": {k: v + 1 for k, v in s.items()}},
    "model_ema": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "no ema": lambda s: {"ema": None, "model": s},
    "ema without weights": lambda s: {"ema": {"decay": 0.999}, "model": s},
    "ema module": lambda s: {"ema": {"module": s, "updates": 7}},
    "model state_dict": lambda s: {"model": {"state_dict": s}},
    "parallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "old torch": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", WRAPPERS)
def test_forms_of_a_checkpoint(form, tmp_path):
    wanted = state(net(2).half().float())
    torch.save(WRAPPERS[form](wanted), tmp_path / "c.pth")
    model = net(1)
    assert not equal(state(model), wanted)
    load(model, str(tmp_path / "c.pth"))
    assert equal(state(model), wanted)
    assert all(p.dtype == torch.float32 and p.grad_fn is None and p.is_leaf for p in model.parameters())


def test_a_model_whose_own_keys_start_with_module(tmp_path):
    wrapped = nn.Sequential(OrderedDict(module=net(2)))
    torch.save(wrapped.state_dict(), tmp_path / "c.pth")
    model = nn.Sequential(OrderedDict(module=net(1)))
    load(model, tmp_path / "c.pth")
    assert equal(state(model), state(wrapped))
    torch.save(
        {f"module.{k}" if i else k: v for i, (k, v) in enumerate(net(2).state_dict().items())}, tmp_path / "c.pth"
    )
    refused(tmp_path / "c.pth", "missing", "unexpected")  # a prefix on some keys is no wrapper


def test_keys_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "c.pth"
    content = state(net(2))
    torch.save({k: v for k, v in content.items() if not k.startswith("2.")}, path)
    refused(path, "2 missing: 2.weight, 2.bias", "Sequential")
    torch.save({**content, "3.a": torch.ones(1)}, path)
    refused(path, "1 unexpected: 3.a")
    torch.save({f"x.{k}": v for k, v in content.items()}, path)
    refused(path, "8 missing: 0.weight, 0.bias, 1.weight and 5 more", "9 unexpected: x.0.weight, x.0.bias")
    torch.save(net(2, features=5).state_dict(), path)
    refused(path, "7 of another shape or type: 0.weight (float32[5, 4] in the file, float32[3, 4] in the model)")
    torch.save({**content, "2.bias": torch.ones(2, dtype=torch.complex64)}, path)
    refused(path, "2.bias (complex64[2] in the file")
    torch.save({**content, "1.num_batches_tracked": torch.tensor(1.5)}, path)
    refused(path, "1.num_batches_tracked")


def test_tensors_that_cannot_be_copied(tmp_path):
    path = tmp_path / "c.pth"
    content = state(net(2))
    torch.save({**content, "2.bias": torch.ones(2, device="meta")}, path)
    refused(path, "cannot be copied")


def executed(marker: str) -> None:
    Path(marker).touch()


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return executed, (str(self.marker),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "c.pth"
    torch.save({"model": state(net(2)), "evil": Evil(marker)}, path)
    refused(path, "executed", "torch.save(model.state_dict(), path)")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_whole_modules_and_arguments_are_refused(tmp_path):
    path = tmp_path / "c.pth"
    torch.save(net(2), path)
    refused(path, "torch.nn.modules.container.Sequential")
    torch.save({"model": state(net(2)), "args": argparse.Namespace(lr=1)}, path)
    refused(path, "argparse.Namespace")


def damaged(path: Path) -> None:
    torch.save(state(net(2)), path)
    path.write_bytes(path.read_bytes()[:-200])


def circular(path: Path) -> None:
    content: dict = {}
    content["model"] = content
    torch.save(content, path)


FILES = {
    "missing": (lambda p: None, "no such file"),
    "folder": (Path.mkdir, "folder"),
    "empty": (Path.touch, "cannot read"),
    "text": (lambda p: p.write_text("weights\n" * 50), "cannot read"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "cannot read"),
    "truncated": (damaged, "damaged"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "cannot read"),
    "number": (lambda p: torch.save(3, p), "a int"),
    "empty dict": (lambda p: torch.save({}, p), "no weights"),
    "no weights": (lambda p: torch.save({"epoch": 3, "a": 1, "b": 2, "c": 3}, p), "epoch, a, b and 1 more"),
    "circular": (circular, "no weights"),
    "number keys": (lambda p: torch.save({1: torch.ones(1)}, p), "no weights"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(kind, tmp_path):
    write, word = FILES[kind]
    write(tmp_path / "c.pth")
    message = refused(tmp_path / "c.pth", word)
    assert "\n" not in message
    assert "weights_only" not in message  # torch advises to switch the protection off


def safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """The format: header length, JSON header, data."""
    import json

    kinds = {torch.float32: "F32", torch.int64: "I64"}
    header, data = {}, b""
    for key, value in tensors.items():
        blob = value.contiguous().numpy().tobytes()
        span = [len(data), len(data) + len(blob)]
        header[key] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": span}
        data += blob
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "c.safetensors"
    path.write_bytes(safetensors(state(net(2))))
    model = net(1)
    load(model, path)
    assert equal(state(model), state(net(2)))
    path.write_bytes(b"not safetensors at all")
    refused(path, "cannot read")


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "c.safetensors"
    path.write_bytes(safetensors(state(net(2))))
    with pytest.raises(EnvironmentMissing, match="pip install safetensors"):
        load(net(1), path)


def test_create_loads_a_checkpoint(tmp_path):
    path = tmp_path / "s1.pth"
    options = {"num_classes": 10, "embed_dim": (16, 24, 40), "depth": (1, 1, 1), "partial_dim": (5, 7, 12)}
    trained = randomize(models.create("shvit_s1", **options), 3)
    torch.save({"model": trained.state_dict()}, path)
    loaded = models.create("shvit_s1", checkpoint=path, **options)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), trained(x))
    with pytest.raises(InputError, match=r"head\.l\.weight \(float32\[10, 40\] in the file, float32\[1000, 40\]"):
        models.create("shvit_s1", checkpoint=path, **{**options, "num_classes": 1000})


class ResNet20(nn.Module):
    """He et al., CVPR 2016, section 4.2, with option A shortcuts, in the key names of the checkpoint."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.ModuleList(self._block(16, 16) for _ in range(3))
        self.layer2 = nn.ModuleList(self._block(cin, 32) for cin in (16, 32, 32))
        self.layer3 = nn.ModuleList(self._block(cin, 64) for cin in (32, 64, 64))
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _block(cin: int, width: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "conv1": nn.Conv2d(cin, width, 3, stride=width // cin, padding=1, bias=False),
                "bn1": nn.BatchNorm2d(width),
                "conv2": nn.Conv2d(width, width, 3, padding=1, bias=False),
                "bn2": nn.BatchNorm2d(width),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            assert isinstance(block, nn.ModuleDict)
            y = F.relu(block["bn1"](block["conv1"](x)))
            y = block["bn2"](block["conv2"](y))
            grown = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, grown // 2, grown // 2)) if grown else x
            x = F.relu(x + y)
        return self.linear(x.mean((2, 3)))


def test_a_published_checkpoint():
    """Wrapped in state_dict, every key prefixed, saved before num_batches_tracked existed."""
    path = DATA / "resnet20-12fca82f.th"
    if not path.is_file():
        pytest.skip(f"no {path}: set EDGECOMPILE_DATA to the folder of trained weights")
    model = randomize(ResNet20(), 1).eval()
    load(model, path)
    raw = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    own = model.state_dict()
    assert {f"module.{k}" for k in own if not k.endswith("num_batches_tracked")} == set(raw)
    assert all(torch.equal(own[k.removeprefix("module.")], v) for k, v in raw.items())
