"""The zoo: SHViT, EfficientViT, LitePose, DAMO-YOLO, DEA-Net, RePaViT and RepVGG in their training form.

Every model has the parameter count of the authors' implementation and its state-dict keys and shapes, so published
checkpoints load unchanged; those named ``*_cifar`` are smaller ones of our own, with weights. Importing this package
does not import torch; creating a model does.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompile.errors import InputError, did_you_mean, missing_extra

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn


@dataclass(frozen=True)
class Entry:
    """One line of the zoo.

    Attributes:
        module: the file of this package that builds it; its ``create(name, **options)`` returns the module.
        resolution: native square input size in pixels; the input is float32 ``[1, 3, resolution, resolution]``.
        task: what its outputs are.
        paper: where the architecture is published.
        checkpoint: file in the folder ``checkpoints`` of this package that ``create(name, pretrained=True)`` loads, or
            None where we have trained none.
        mean: what that checkpoint expects to be subtracted from RGB pixels in [0, 1], per channel; with ``std`` the
            values of ``[preprocess]`` in a config file.
        std: what the difference is divided by.
    """

    module: str
    resolution: int
    task: str
    paper: str
    checkpoint: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of one example input, NCHW."""
        return (1, 3, self.resolution, self.resolution)


_SHVIT = "Yun & Ro, SHViT, CVPR 2024"
_EFFICIENTVIT = "Liu et al., EfficientViT, CVPR 2023"
_LITEPOSE = "Wang et al., Lite Pose, CVPR 2022"
_DAMO = "Xu et al., DAMO-YOLO, 2022"
_REPAVIT = "Xu et al., RePaViT, ICML 2025"

_REPVGG = "Ding et al., RepVGG, CVPR 2021"

# Mean and standard deviation of the training images of CIFAR-10.
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)

ZOO: dict[str, Entry] = {
    **{f"shvit_s{i}": Entry("shvit", 256 if i == 4 else 224, "classification", _SHVIT) for i in range(1, 5)},
    **{f"efficientvit_m{i}": Entry("efficientvit", 224, "classification", _EFFICIENTVIT) for i in range(6)},
    **{
        f"litepose_{v}": Entry("litepose", r, "pose", _LITEPOSE)
        for v, r in (("xs", 256), ("s", 448), ("m", 448), ("l", 512))
    },
    **{f"damoyolo_{v}": Entry("damoyolo", 640, "detection", _DAMO) for v in "tsml"},
    **{f"damoyolo_n{v}": Entry("damoyolo", 416, "detection", _DAMO) for v in "sml"},
    "deanet": Entry("deanet", 256, "dehazing", "Chen et al., DEA-Net, IEEE TIP 2024"),
    **{f"repavit_{v}": Entry("repavit", 224, "classification", _REPAVIT) for v in ("tiny", "small", "base")},
    "repaswin_tiny": Entry("repavit", 224, "classification", _REPAVIT),
    "repvgg_a0": Entry("repvgg", 224, "classification", _REPVGG),
    **{
        f"{family}_cifar": Entry("cifar", 32, "classification", paper, f"{family}_cifar.pt", _CIFAR_MEAN, _CIFAR_STD)
        for family, paper in (
            ("shvit", _SHVIT),
            ("efficientvit", _EFFICIENTVIT),
            ("repavit", _REPAVIT),
            ("repvgg", _REPVGG),
        )
    },
}


def names() -> list[str]:
    """Names of every model of the zoo, grouped by family."""
    return list(ZOO)


def options(name: str) -> dict[str, Any]:
    """Options that :func:`create` takes for a model beside ``checkpoint`` and ``pretrained``, with their defaults.

    None stands for the value the authors published for that variant.

    Raises:
        InputError: the name is unknown.
        EnvironmentMissing: torch is not installed.
    """
    parameters = inspect.signature(_family(name).create).parameters
    return {option: parameter.default for option, parameter in parameters.items() if option != "name"}


def pretrained_names() -> list[str]:
    """Names of the models that ``create(name, pretrained=True)`` gives weights to."""
    return [name for name, entry in ZOO.items() if entry.checkpoint is not None]


def create(name: str, *, checkpoint: str | Path | None = None, pretrained: bool = False, **given: Any) -> nn.Module:
    """Build a zoo model in its training form, in eval mode.

    Args:
        name: one of :func:`names`.
        checkpoint: a published or own checkpoint file, loaded strictly; see :func:`edgecompile.models.checkpoint.load`.
        pretrained: load the weights that this package carries, for one of :func:`pretrained_names`.
        given: options of the family, for example ``num_classes``, ``joints`` (LitePose) or ``idle_ratio`` (RePaViT);
            see :func:`options`.

    Raises:
        InputError: the name or an option is unknown, the checkpoint does not fit, or there are no weights of our own.
        EnvironmentMissing: torch is not installed.
    """
    valid = options(name)
    if pretrained:
        if checkpoint is not None:
            raise InputError(f"{name} got a checkpoint and pretrained=True", "it can have one set of weights")
        if ZOO[name].checkpoint is None:
            raise InputError(
                f"there are no weights for {name}",
                f"this package carries those of {', '.join(pretrained_names())}",
                "give the authors' with checkpoint=",
            )
        checkpoint = Path(__file__).parent / "checkpoints" / str(ZOO[name].checkpoint)
    for option in given:
        if option not in valid:
            raise InputError(
                f"{name} has no option {option!r}", did_you_mean(option, valid), f"its options are {', '.join(valid)}"
            )
    model = _family(name).create(name, **given).eval()
    if checkpoint is not None:
        from . import checkpoint as reader

        reader.load(model, checkpoint)
    return model


def _family(name: str) -> ModuleType:
    """The module that builds a model."""
    if name not in ZOO:
        raise InputError(
            f"no model named {name!r} in the zoo",
            did_you_mean(name, ZOO),
            "`edgecompile models` lists the names",
        )
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing_extra(f"cannot build {name}", "torch", "torch") from None
    return importlib.import_module(f"edgecompile.models.{ZOO[name].module}")
