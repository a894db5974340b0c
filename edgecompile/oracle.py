"""What a graph computes: the reference that every rewrite is checked against.

The oracle is ONNX Runtime's CPU provider with all optimisations off, or ``onnx.reference`` where no runtime is
installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from edgecompile.errors import InputError
from edgecompile.graph import Graph, Port

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]

# Sizes to try for a dynamic dimension that is not the first, from the most usual input size to the least demanding one.
_DYNAMIC_SIZES = (64, 224, 16, 4, 1)


@dataclass(frozen=True)
class OutputError:
    """How far an output is from its reference.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: ``max_abs`` over the largest absolute reference value.
        cosine: cosine of the angle between the two, as vectors.
        snr_db: signal-to-noise ratio in dB, ``inf`` when equal.
    """

    max_abs: float
    max_rel: float
    cosine: float
    snr_db: float

    def as_dict(self) -> dict[str, float]:
        """The four figures by name."""
        return asdict(self)


def compare(reference: np.ndarray, candidate: np.ndarray) -> OutputError:
    """Measure the difference of two arrays; non-finite values must stand in the same places, else all is lost.

    Raises:
        InputError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise InputError("outputs cannot be compared", f"their shapes are {reference.shape} and {candidate.shape}")
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return OutputError(math.inf, math.inf, 0.0, -math.inf)
    a, b = a[finite], b[finite]
    if not a.size:
        return OutputError(0.0, 0.0, 1.0, math.inf)
    error, scale = float(np.abs(a - b).max()), float(np.abs(a).max())
    noise, signal = float(np.sum((a - b) ** 2)), float(np.sum(a**2))
    if not error:
        return OutputError(0.0, 0.0, 1.0, math.inf)
    norms = math.sqrt(signal) * float(np.linalg.norm(b))
    return OutputError(
        error,
        error / scale if scale else math.inf,
        float(a @ b) / norms if norms else 0.0,
        10 * math.log10(signal / noise) if signal and noise else -math.inf,
    )


def compare_all(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> dict[str, OutputError]:
    """:func:`compare` for each output of the reference, by name."""
    return {name: compare(value, candidate[name]) for name, value in reference.items()}


def worst(errors: Iterable[Mapping[str, OutputError]]) -> dict[str, OutputError]:
    """For each output the comparison with the largest relative error."""
    found: dict[str, OutputError] = {}
    for per_output in errors:
        for name, error in per_output.items():
            if name not in found or error.max_rel > found[name].max_rel:
                found[name] = error
    return found


def random_feeds(
    ports: Iterable[Port], seed: int = 0, sizes: Mapping[str, int] | None = None, other: int = 64
) -> Outputs:
    """Inputs for a signature: normal floats, small non-negative integers, random booleans.

    Args:
        ports: the inputs.
        seed: of the generator.
        sizes: extents of named dynamic dimensions.
        other: extent of a dynamic dimension that is neither named in ``sizes`` nor the first (which is 1).
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    for port in ports:
        shape = tuple(
            d if isinstance(d, int) else (sizes or {}).get(str(d), 1 if i == 0 else other)
            for i, d in enumerate(port.shape or ())
        )
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(port.dtype))
        if dtype.kind == "b":
            feeds[port.name] = rng.integers(0, 2, shape).astype(bool)
        elif dtype.kind in "iu":
            feeds[port.name] = rng.integers(0, 2, shape).astype(dtype)
        elif dtype.kind in "OUS":
            feeds[port.name] = np.full(shape, "a", dtype=object)
        else:
            feeds[port.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def probe_feeds(graph: Graph, seed: int = 0) -> list[Outputs]:
    """Two sets of random inputs that the graph accepts; dynamic dimensions are tried at several sizes.

    Raises:
        InputError: no size tried is accepted.
    """
    ports = graph.signature().inputs
    dynamic = any(not isinstance(d, int) for p in ports for d in p.shape or ())
    failure: InputError | None = None
    for other in _DYNAMIC_SIZES if dynamic else (1,):
        feeds = [random_feeds(ports, seed, other=other)]
        try:
            run(graph, feeds[0])
        except InputError as error:
            failure = failure or error
            continue
        batches = {p.shape[0] for p in ports if p.shape and isinstance(p.shape[0], str)}
        return [*feeds, random_feeds(ports, seed + 1, dict.fromkeys(batches, 2), other)]
    assert failure is not None
    raise InputError(
        "the model does not run on random inputs",
        failure.why or failure.what,
        "give shapes it accepts with --input NAME:1x3x224x224" if dynamic else "",
    )


def check_feeds(graph: Graph, feeds: Feeds) -> None:
    """Compare names, types and shapes of feeds with the graph's inputs.

    Raises:
        InputError: an input is missing, unknown, or has another type or shape than the model declares.
    """
    ports = {p.name: p for p in graph.signature().inputs}
    if unknown := [n for n in feeds if n not in ports]:
        raise InputError(
            f"the model has no input {unknown[0]!r}", f"its inputs are {', '.join(map(repr, ports)) or 'none'}"
        )
    for name, port in ports.items():
        if name not in feeds:
            raise InputError(f"input {name!r} is missing", fix=f"give it with --input {name}:SHAPE")
        value, shape = feeds[name], port.shape
        wrong = shape is not None and (
            len(shape) != value.ndim
            or any(isinstance(d, int) and d != n for d, n in zip(shape, value.shape, strict=True))
        )
        if wrong:
            wanted = "x".join(str(d or "?") for d in shape or ())
            raise InputError(f"input {name!r} has shape {'x'.join(map(str, value.shape))}", f"the model wants {wanted}")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(port.dtype))
        if dtype.kind not in "OUS" and value.dtype != dtype:
            raise InputError(f"input {name!r} is {value.dtype}", f"the model wants {dtype}")


def run(graph: Graph, feeds: Feeds) -> Outputs:
    """Compute the outputs of a graph without any optimisation.

    Args:
        graph: the graph; it is not changed.
        feeds: one array per model input.

    Returns:
        the outputs by name, in the model's order.

    Raises:
        InputError: neither ONNX Runtime nor the reference evaluator can run the graph on these inputs.
    """
    model, weights = graph.to_probe()
    names = [t.name for t in graph.outputs]
    failure = ""
    try:
        import onnxruntime as ort
    except ImportError:
        pass
    else:
        try:
            return dict(zip(names, _session(ort, model).run(names, {**feeds, **weights}), strict=True))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            failure = _first_line(error)
    from onnx.reference import ReferenceEvaluator

    try:
        values = [np.asarray(v) for v in ReferenceEvaluator(model).run(names, {**feeds, **weights})]
        return dict(zip(names, values, strict=True))
    except Exception as error:
        raise InputError("the model does not run", failure or _first_line(error)) from None


def _session(ort, model: onnx.ModelProto):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # the peak is lower, and a session runs only a few times
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300]


def rounding(graph: Graph, feeds: Feeds, reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How strongly each output answers to rounding: its relative change when inputs change by a few ulps.

    A rewrite that is exact in real arithmetic moves the outputs of a well-conditioned network by a few ulps and those
    of an ill-conditioned one by more; this tells the two apart without a tolerance per network.
    """
    rng = np.random.default_rng(0)
    shaken = {
        name: (x * (1 + 4 * np.finfo(x.dtype).eps * rng.uniform(-1, 1, x.shape))).astype(x.dtype)
        if x.dtype.kind == "f"
        else x
        for name, x in feeds.items()
    }
    errors = compare_all(reference, run(graph, shaken))
    return {name: error.max_rel for name, error in errors.items()}
