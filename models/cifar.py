"""Small members of four families for images of 32 x 32 and the ten classes of CIFAR-10.

They are built by the code of the full-size models, with a smaller stem stride and reduced width and depth, and exist so
that what a rewrite costs in accuracy can be measured on trained weights within seconds. ``examples/train_cifar.py``
trains them; its results are the checkpoints of ``create(name, pretrained=True)``.

Accuracy in per cent of 5,000 test images that are lossy JPEG, as are the training images; minutes of CPU time on one
core; parameters and multiply-accumulates of the training form:

| name               | parameters | MACs    | epochs | minutes | accuracy |
|--------------------|------------|---------|--------|---------|----------|
| shvit_cifar        |    583,064 |  8.90 M |     10 |      10 |    79.52 |
| efficientvit_cifar |    383,876 |  7.47 M |      9 |       9 |    78.18 |
| repavit_cifar      |    228,690 |  4.60 M |     45 |      24 |    79.22 |
| repvgg_cifar       |    367,978 | 14.91 M |     12 |       7 |    81.68 |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from . import efficientvit, repavit, repvgg, shvit

_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "shvit_cifar": partial(
        shvit.create,
        "shvit_s1",
        embed_dim=(48, 96, 128),
        depth=(1, 2, 1),
        partial_dim=(16, 24, 28),
        types="sss",  # the first stage has as few positions here as the second has at 224 x 224
        patch_size=4,
    ),
    "efficientvit_cifar": partial(
        efficientvit.create,
        "efficientvit_m0",
        embed_dim=(48, 64, 96),
        depth=(1, 1, 1),
        num_heads=(2, 2, 3),
        window_size=4,
        img_size=32,
        patch_size=4,
    ),
    "repavit_cifar": partial(
        repavit.create, "repavit_tiny", dim=64, heads=4, depth=4, img_size=32, patch_size=8, conv_stem=True
    ),
    "repvgg_cifar": partial(
        repvgg.create, "repvgg_a0", widths=(16, 32, 64, 128), depths=(1, 2, 3, 2), strides=(1, 2, 2, 2)
    ),
}


def create(name: str, num_classes: int = 10) -> nn.Module:
    """Build ``shvit_cifar``, ``efficientvit_cifar``, ``repavit_cifar`` (idle ratio 0.75) or ``repvgg_cifar``.

    Args:
        name: the variant.
        num_classes: classes of the head.

    Raises:
        InputError: there is no class.
    """
    return _VARIANTS[name](num_classes=num_classes)
