"""The small networks for CIFAR-10: built by the code of the full-size ones, trained, and still right when fused."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from export_parity import export
from PIL import Image
from torch import Tensor, nn

from edgecompile import models, oracle
from edgecompile.errors import InputError
from edgecompile.graph import Graph
from edgecompile.models.efficientvit import EfficientViT, WindowAttention
from edgecompile.models.randomize import randomize
from edgecompile.models.repavit import ChannelIdleFfn, RepaDeit
from edgecompile.models.repvgg import RepVGG
from edgecompile.models.shvit import SHSA, SHViT
from edgecompile.pipeline import Pipeline

DATA = Path(os.environ.get("EDGECOMPILE_DATA", "../shared/data"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_cifar.py"
FAMILIES = {
    "shvit_cifar": SHViT,
    "efficientvit_cifar": EfficientViT,
    "repavit_cifar": RepaDeit,
    "repvgg_cifar": RepVGG,
}
NAMES = list(FAMILIES)
# Accuracy on every fifth of the 5,000 test images (which are sorted by class, and lossy JPEG), in per cent.
MEASURED = {"shvit_cifar": 79.8, "efficientvit_cifar": 77.1, "repavit_cifar": 78.4, "repvgg_cifar": 82.1}


def test_names():
    assert [name for name in models.names() if name.endswith("_cifar")] == NAMES
    assert models.pretrained_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_size(name):
    entry = models.ZOO[name]
    model = models.create(name)
    assert type(model) is FAMILIES[name]
    assert entry.input_shape == (1, 3, 32, 32)
    assert model(torch.zeros(2, *entry.input_shape[1:])).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert models.create(name, num_classes=3)(torch.zeros(entry.input_shape)).shape == (1, 3)
    with pytest.raises(InputError, match="num_classes"):
        models.create(name, num_classes=0)


def test_every_mechanism_of_the_family_is_there():
    shvit, efficientvit, repavit, repvgg = (models.create(name) for name in NAMES)
    assert sum(isinstance(m, SHSA) for m in shvit.modules()) == 4
    windows = [m for m in efficientvit.modules() if isinstance(m, WindowAttention)]
    assert [(m.resolution, m.window) for m in windows] == [(8, 4), (4, 4), (2, 2)]
    idle = [m for m in repavit.modules() if isinstance(m, ChannelIdleFfn)]
    assert [(m.active, m.fc1.out_features) for m in idle] == [(64, 256)] * 4
    assert len([m for m in repvgg.modules() if isinstance(m, nn.BatchNorm2d)]) == 8 * 2 + 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repavit_tiny", {"heads": 5}, "heads is 5"),
        ("repavit_tiny", {"patch_size": 15}, "patch_size is 15"),
        ("repavit_tiny", {"patch_size": 7, "conv_stem": True}, "patch_size is 7"),
        ("repavit_tiny", {"dim": 0}, "dim"),
        ("repavit_tiny", {"depth": 1.5}, "depth"),
        ("repaswin_tiny", {"dim": 96}, "no option 'dim'"),
    ],
)
def test_impossible_shapes_of_a_repavit(name, options, message):
    models.create("repavit_tiny", depth=1, dim=24, heads=4, patch_size=32)
    with pytest.raises(InputError) as caught:
        models.create(name, **options)
    assert message in str(caught.value)


# --- reparameterization ------------------------------------------------------------------------------------------


def deployed_parameters(model: nn.Module) -> int | None:
    """Of the form its authors deploy, from the shapes of the training form; None where they keep more than we do."""
    if isinstance(model, RepVGG):
        kernels = [v for k, v in model.state_dict().items() if k.endswith("rbr_dense.conv.weight")]
        return sum(v.numel() + len(v) for v in kernels) + sum(p.numel() for p in model.linear.parameters())
    if isinstance(model, RepaDeit):
        ffns = [m for m in model.modules() if isinstance(m, ChannelIdleFfn)]
        before = sum(p.numel() for m in ffns for p in m.parameters())
        after = sum((m.fc1.in_features + 2 * m.active + 1) * m.fc1.in_features + m.active for m in ffns)
        stem = [m for m in model.patch_embed.modules() if isinstance(m, nn.BatchNorm2d)]
        folded = sum(m.num_features for m in stem)  # a norm's weight and bias become the convolution's bias
        return sum(p.numel() for p in model.parameters()) - before + after - folded
    return None


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["legacy", "dynamo"])
@pytest.mark.parametrize("name", NAMES)
def test_training_form_is_the_fused_form(name, dynamo, tmp_path):
    x = torch.randn(models.ZOO[name].input_shape, generator=torch.Generator().manual_seed(0))
    model = randomize(models.create(name), 5, x)
    path = tmp_path / "x.onnx"
    export(model, x, path, dynamo=dynamo)
    graph = Graph.load(path)
    feeds = {"x": x.numpy()}
    with torch.no_grad():
        wanted = {graph.outputs[0].name: model(x).numpy()}
    trace = Pipeline.parse("clean,fold_norm,reparam").run(graph, [feeds], strict=True)

    def error() -> float:
        return max(e.max_rel for e in oracle.compare_all(wanted, oracle.run(graph, feeds)).values())

    assert error() <= 1e-5
    assert not any(node.op == "BatchNormalization" for node in graph.nodes)
    deployed = deployed_parameters(model)
    if deployed is not None:
        assert trace.steps[-1].after.parameters == deployed
    with torch.no_grad():  # a shift that the folds did not see
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None)
        assert norm.running_mean is not None
        norm.running_mean += 0.1
        wanted = {graph.outputs[0].name: model(x).numpy()}
    assert error() > 1e-3


# --- weights of our own ------------------------------------------------------------------------------------------


def every_fifth(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and their classes."""
    if not (DATA / file).is_file():
        pytest.skip(f"no {DATA / file}: set EDGECOMPILE_DATA to the folder of images")
    packed = np.load(DATA / file)
    jpeg, offsets = packed["jpeg"], packed["offsets"]
    files = [jpeg[a:b].tobytes() for a, b in itertools.pairwise(offsets)][::5]
    pixels = [np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files]
    return np.stack(pixels), packed["labels"][::5]


@pytest.mark.parametrize("name", list(MEASURED))
def test_pretrained_reaches_its_accuracy(name):
    pixels, labels = every_fifth("cifar10_test.npz")
    assert len(labels) == 1000 and set(np.bincount(labels)) == {100}
    entry = models.ZOO[name]
    x = (pixels / np.float32(255) - np.float32(entry.mean)) / np.float32(entry.std)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2)).float()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(x).argmax(1).numpy() == labels).mean())

    assert accuracy(models.create(name, pretrained=True)) >= MEASURED[name] - 1
    assert accuracy(models.create(name)) < 30


@pytest.mark.parametrize("name", list(MEASURED))
def test_pretrained_weights_are_small_and_plain(name):
    path = Path(models.__file__).parent / "checkpoints" / str(models.ZOO[name].checkpoint)
    assert path.stat().st_size <= 4_000_000
    saved = torch.load(path, weights_only=True)
    model = models.create(name, pretrained=True)
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved[key])
    assert all(torch.isfinite(v).all() for v in saved.values())
    assert not torch.equal(next(models.create(name).parameters()), next(model.parameters()))


def test_every_file_belongs_to_a_model():
    folder = Path(models.__file__).parent / "checkpoints"
    assert {p.name for p in folder.glob("*.pt")} == {entry.checkpoint for entry in models.ZOO.values()} - {None}
    for entry in models.ZOO.values():
        if entry.checkpoint is not None:
            assert entry.mean is not None and entry.std is not None and min(entry.std) > 0


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="no weights for shvit_s1"):
        models.create("shvit_s1", pretrained=True)
    with pytest.raises(InputError, match="one set of weights"):
        models.create("repvgg_cifar", pretrained=True, checkpoint=tmp_path / "x.pt")
    torch.save(models.create("repvgg_cifar").state_dict(), tmp_path / "x.pt")
    models.create("repvgg_cifar", checkpoint=tmp_path / "x.pt")


# --- the training script -----------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_cifar", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_cifar", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    return module


def write_images(path: Path, count: int) -> None:
    """Images of one colour per class, with noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 3))
    labels = (np.arange(count) % 10).astype(np.int16)
    files = []
    for label in labels:
        pixels = np.clip(colours[label] + rng.normal(0, 10, (32, 32, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)


def test_training_goes_on_where_it_stopped(script, tmp_path, capsys, monkeypatch):
    for split, count in (("train", 160), ("test", 250)):
        write_images(tmp_path / f"cifar10_{split}.npz", count)

    def train(out: str, epochs: int = 3) -> float:
        return script.train("repvgg_cifar", tmp_path, tmp_path / out, tmp_path / f"{out}.state", epochs, 32, 0)

    assert train("whole.pt") > 0.5  # guessing gives 0.1
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    models.create("repvgg_cifar", checkpoint=tmp_path / "whole.pt")

    saved = script.save
    monkeypatch.setattr(script, "save", lambda content, path: (saved(content, path), stop(content)))

    def stop(content: dict) -> None:
        if content.get("epoch") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("parts.pt")
    assert not (tmp_path / "parts.pt").exists()
    monkeypatch.setattr(script, "save", saved)
    capsys.readouterr()
    train("parts.pt")
    assert "goes on after epoch 2" in capsys.readouterr().out
    parts = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    with pytest.raises(SystemExit, match="another run"):
        train("parts.pt", epochs=4)


def test_the_command_trains_and_reports(script, tmp_path, capsys, monkeypatch):
    for split, count in (("train", 64), ("test", 250)):
        write_images(tmp_path / f"cifar10_{split}.npz", count)
    out = tmp_path / "x.pt"
    monkeypatch.setattr(
        "sys.argv",
        [
            "train_cifar.py",
            "repavit_cifar",
            "--data",
            str(tmp_path),
            "--out",
            str(out),
            "--epochs",
            "1",
            "--batch",
            "32",
        ],
    )
    script.main()
    assert "of the test images, which are lossy JPEG" in capsys.readouterr().out
    models.create("repavit_cifar", checkpoint=out)
    with pytest.raises(InputError, match="does not fit"):
        models.create("repvgg_cifar", checkpoint=out)
    monkeypatch.delenv("EDGECOMPILE_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["train_cifar.py", "repavit_cifar"])
    with pytest.raises(SystemExit):
        script.main()
    assert "set EDGECOMPILE_DATA" in capsys.readouterr().err


def test_the_faster_ffn_is_the_same_function(script):
    layer = randomize(ChannelIdleFfn(24, 0.75), 1).double()
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    for mode in (layer.train(), layer.eval()):
        with torch.no_grad():
            torch.testing.assert_close(script.flat_ffn(mode, x), mode(x))
    layer.active += 1
    fast = script.flat_ffn(layer, x)
    layer.active -= 1
    assert not torch.allclose(fast, layer(x))


def test_augmentation_shifts_and_mirrors(script):
    x = torch.arange(1, 3 * 32 * 32 + 1).reshape(1, 3, 32, 32).expand(64, -1, -1, -1).clone()
    y = script.augmented(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.dtype == x.dtype
    padded = nn.functional.pad(x[:1], (4,) * 4)

    def variants(image: Tensor) -> list[Tensor]:
        shifted = [image[:, :, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        return [v for s in shifted for v in (s, s.flip(3))]

    known = torch.cat(variants(padded))
    found = [int((known == image).flatten(1).all(1).sum()) for image in y]
    assert found == [1] * 64  # each is one of the 162 variants
    assert len({tuple(image.flatten().tolist()) for image in y}) > 30
