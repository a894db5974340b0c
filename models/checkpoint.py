"""Load published checkpoints into zoo models: strictly, all or nothing, and without running code from the file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgecompile.errors import EnvironmentMissing, InputError

# Under what a training script files the weights, best first: where a file holds the moving average and the raw
# weights, the average is what its authors evaluated.
_WRAPPERS = ("ema", "model_ema", "state_dict", "model", "module")
_DEPTH = 4  # wrappers inside one another; a file may also contain itself
_SHOWN = 3


def load(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a checkpoint into a model, in place.

    The file is a state dict, or holds one under ``ema``, ``model_ema``, ``state_dict``, ``model`` or ``module`` (also
    one inside another); a ``module.`` before every key is dropped. It must have exactly the model's keys and shapes,
    except that ``num_batches_tracked``, which PyTorch before 0.4.1 did not save and inference does not use, may be
    absent. Floating-point weights are converted to the model's dtype.

    Args:
        model: the model; unchanged when an error is raised.
        path: a file ``torch.load(weights_only=True)`` can read, or a ``.safetensors`` file.

    Raises:
        InputError: the file cannot be read without running code from it, or does not fit the model.
        EnvironmentMissing: the file is a ``.safetensors`` and the package safetensors is not installed.
    """
    path = Path(path)
    own: dict[str, Tensor] = model.state_dict()
    content = _read(path)
    state = _find(content, _DEPTH)
    if state is None:
        raise InputError(
            f"no weights in the checkpoint {path}",
            f"it holds a {type(content).__name__}" + (f" of {_some(content)}" if isinstance(content, Mapping) else ""),
            f"a state dict is looked for at the top and under {', '.join(_WRAPPERS)}",
        )
    if all(key.startswith("module.") for key in state) and not all(key.startswith("module.") for key in own):
        state = {key.removeprefix("module."): value for key, value in state.items()}

    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shared = [k for k in own if k in state]
    differing = [
        f"{k} ({_describe(state[k])} in the file, {_describe(own[k])} in the model)"
        for k in shared
        if state[k].shape != own[k].shape or not torch.can_cast(state[k].dtype, own[k].dtype)
    ]
    problems = [
        f"{len(keys)} {kind}: {_some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape or type", differing))
        if keys
    ]
    if problems:
        raise InputError(
            f"the checkpoint {path} does not fit {type(model).__name__}",
            "; ".join(problems),
            "build the variant and options (for example num_classes) that the file was saved from",
        )
    with torch.no_grad():
        try:
            # Staged, because a sparse, quantized or meta tensor fails only when it is copied.
            staged = {k: torch.empty_like(own[k], device="cpu").copy_(state[k]) for k in shared}
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the checkpoint {path} holds a tensor that cannot be copied", reason) from None
        for key, value in staged.items():
            own[key].copy_(value)


def _read(path: Path) -> Any:
    """Whatever the file holds, on the CPU."""
    if not path.is_file():
        raise InputError(f"cannot read the checkpoint {path}", "it is a folder" if path.is_dir() else "no such file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file as read  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise EnvironmentMissing(
                f"cannot read the checkpoint {path}",
                "the package safetensors is not installed",
                "pip install safetensors",
            ) from None
    else:
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        return read(path)
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}", str(error.strerror or error)) from None
    except Exception as error:
        # Arbitrary bytes make an unpickler raise arbitrary exceptions. Their text stays out of the message: torch's
        # advises to switch its protection off.
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is None:
            why, fix = f"it is damaged or in another format ({type(error).__name__})", ""
        else:
            why = f"it holds a {refused[1]}, which only running code from the file could restore"
            fix = "where you trust its source, save the bare weights with torch.save(model.state_dict(), path)"
        raise InputError(f"cannot read the checkpoint {path}", why, fix) from None


def _find(content: Any, depth: int) -> dict[str, Tensor] | None:
    """The first mapping of names to tensors at the top or under the usual wrappers."""
    if not isinstance(content, Mapping) or not depth:
        return None
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return dict(content)
    inside = (_find(content.get(wrapper), depth - 1) for wrapper in _WRAPPERS)
    return next((state for state in inside if state is not None), None)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(keys: Iterable[object]) -> str:
    names = [str(k) for k in keys]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
