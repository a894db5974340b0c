"""edgecompile: PyTorch in, the fastest engine that is still the same model out.

The command line and this module do the same: :func:`build` a bundle, :func:`load` its engine, run a :class:`Pipeline`
of passes over a :class:`Graph`, and take models from ``edgecompile.models``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecompile.bundle import Bundle
    from edgecompile.graph import Graph
    from edgecompile.pipeline import Pipeline
    from edgecompile.target import Engine

__version__ = "0.1.0"
__all__ = ["Graph", "Pipeline", "build", "load"]

# In a checkout, passes/, targets/ and models/ lie beside this folder. With the checkout as working directory Python
# finds this folder before the installed mapping, and would not find those three.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))

_LAZY = {"Graph": "edgecompile.graph", "Pipeline": "edgecompile.pipeline"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("models", "passes", "targets"):
        return importlib.import_module(f"edgecompile.{name}")
    raise AttributeError(f"module 'edgecompile' has no attribute {name!r}")


def build(
    model: Any,
    example_inputs: Any = None,
    target: str = "ort",
    *,
    output: str | Path | None = None,
    precision: str = "fp32",
    passes: str | None = None,
    dynamic: Mapping[str, Mapping[int, tuple[int, int, int]]] | None = None,
    checkpoint: str | Path | None = None,
    strict: bool = False,
    bench: bool = True,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Bundle:
    """Compile a model to a verified engine; what ``edgecompile build`` does.

    Args:
        model: a ``torch.nn.Module``, or a SOURCE: ``model.py[:factory]``, a zoo name, ``.onnx`` or ``.pt2``.
        example_inputs: for a module: a tensor, a tuple of tensors, or a dict of them by the name of forward's argument.
        target: name of the target.
        output: folder of the bundle, ``build/NAME`` by default.
        precision: precision of the engine.
        passes: pass spec instead of the target's own.
        dynamic: input name -> axis -> (least, usual, largest) extent.
        checkpoint: weights for a zoo name.
        strict: raise when a pass fails instead of going on without it.
        bench: measure latency.
        seed: of random weights and inputs.
        options: options of the target.

    Returns:
        the bundle; ``.engine()`` opens its engine.

    Raises:
        EdgecompileError: see :mod:`edgecompile.errors`.
    """
    import tempfile

    from edgecompile import driver, frontend

    chosen = driver.Options(target, precision, passes, strict, bench, seed, options or {})
    driver.pipeline_spec(chosen)
    with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
        folder = Path(scratch)
        if isinstance(model, (str, Path)):
            source = frontend.load(str(model), dynamic=dynamic or {}, checkpoint=checkpoint, seed=seed, folder=folder)
        else:
            source = frontend.from_module(model, example_inputs, dynamic=dynamic or {}, folder=folder)
        return driver.build(source, Path(output) if output else driver.default_output(source.name), chosen)


def load(path: str | Path) -> Engine:
    """Open the engine of a bundle.

    Raises:
        InputError: not a bundle, or a damaged one.
        EnvironmentMissing: its runtime is not installed, or it was built for another device or version.
    """
    from edgecompile.bundle import Bundle

    return Bundle.open(path).engine()
