"""From what a person has to an ONNX graph: a zoo name, a Python file, an exported program or an ONNX file.

A Python file is code. It runs in a child process of its own, with its folder first on the path, and this process sees
only what the child wrote: an ONNX file, arrays, and JSON. Neither the file nor torch is imported here. Its
``evaluate(run)`` runs in another such process, once there is an engine to score.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx

from edgecompile import errors, models, oracle
from edgecompile.blame import User
from edgecompile.errors import InputError, missing_extra
from edgecompile.graph import Graph, Port
from edgecompile.oracle import OutputError, Outputs

if TYPE_CHECKING:
    from torch import nn

    from edgecompile.target import EngineManifest

Progress = Callable[[str], None]

_SOURCES = "SOURCE is a zoo name, model.py, model.py:FACTORY, a .onnx file, or a .pt2 file"
DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_SCORES = "edgecompile.scores/1"
_KEPT_OUTPUT = 64 << 10  # bytes of what the user's code prints that are kept for the case of a failure


@dataclass(frozen=True)
class InputSpec:
    """Shape of one input, and its element type or None for that of the example, else float32."""

    shape: tuple[int, ...]
    dtype: str | None = None


class Range(NamedTuple):
    """Least, usual and largest extent of a dynamic axis."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class Attempt:
    """One rung of the export ladder.

    Attributes:
        rung: ``"dynamo"`` or ``"torchscript"``.
        ok: whether its graph computes what the module does.
        error: one line saying why not, ``""`` when ok.
        where: the user's source line that broke it, as ``model.py:12``; ``""`` if unknown.
        errors: per output, the largest difference of the exported graph from eager torch over the probe inputs.
        seconds: time it took.
    """

    rung: str
    ok: bool
    error: str
    where: str
    errors: Mapping[str, OutputError]
    seconds: float


@dataclass(frozen=True)
class UserFile:
    """How to run a user's Python file once more.

    Attributes:
        request: what the child process is told, as JSON: path, factory, inputs, seed.
        defines: which of ``calibration_data`` and ``evaluate`` the file has.
    """

    request: Mapping[str, Any]
    defines: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """What the user's ``evaluate(run)`` returned; higher is better.

    Attributes:
        engine: score of the engine.
        reference: score of the module in eager torch, None if there is none.
        note: why there is none, else ``""``.
    """

    engine: float
    reference: float | None
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A model, ready for passes.

    Attributes:
        name: short name for people: ``shvit_s1``, ``model.py``, ``net.onnx``.
        kind: ``"zoo"``, ``"python"``, ``"pt2"``, ``"onnx"``, or what else opened it.
        graph: the exported graph; its large weights may be mapped from the scratch folder.
        feeds: probe inputs by name; the first are the example inputs.
        reference: what eager torch returns for each feed, by output name; empty for an ONNX file.
        attempts: what the export ladder tried.
        versions: of torch and what else made the graph.
        notes: what a reader of the result should know, e.g. ``random weights (seed 0)``.
        file: the user's file, None if the model does not come from one.
    """

    name: str
    kind: str
    graph: Graph
    feeds: tuple[Outputs, ...]
    reference: tuple[Outputs, ...]
    attempts: tuple[Attempt, ...]
    versions: Mapping[str, str]
    notes: tuple[str, ...]
    file: UserFile | None = None


# -- options -----------------------------------------------------------------------------------------------------------


def parse_input(text: str) -> tuple[str, InputSpec]:
    """Read ``NAME:1x3x224x224`` or ``NAME:1x3x224x224:float32``; the name may hold colons.

    Raises:
        InputError: it is not of that form.
    """
    match = re.fullmatch(rf"(.+?):([1-9]\d*(?:x[1-9]\d*)*)(?::({'|'.join(DTYPES)}))?", text)
    if match is None:
        raise InputError(
            f"cannot read the input {text!r}",
            f"it must be NAME:SHAPE or NAME:SHAPE:TYPE, with TYPE one of {', '.join(DTYPES)}",
            "for example --input x:1x3x224x224 or --input ids:1x128:int64",
        )
    return match[1], InputSpec(tuple(map(int, match[2].split("x"))), match[3])


def parse_dynamic(text: str) -> tuple[str, int, Range]:
    """Read ``NAME:AXIS=MIN:OPT:MAX``; the name may hold colons.

    Raises:
        InputError: it is not of that form, or not ``1 <= MIN <= OPT <= MAX`` with ``MIN < MAX``.
    """
    match = re.fullmatch(r"(.+):(\d+)=(\d+):(\d+):(\d+)", text)
    if match is None:
        raise InputError(
            f"cannot read the dynamic axis {text!r}",
            "it must be NAME:AXIS=MIN:OPT:MAX",
            "for example --dynamic x:0=1:4:16, for a batch of 1 to 16 that is mostly 4",
        )
    extent = Range(*(int(match[i]) for i in (3, 4, 5)))
    _check_range(extent, text)
    return match[1], int(match[2]), extent


def parse_dynamics(texts: Iterable[str]) -> dict[str, dict[int, Range]]:
    """Read several dynamic axes, by input name and axis.

    Raises:
        InputError: one is malformed, or an axis is given twice.
    """
    found: dict[str, dict[int, Range]] = {}
    for text in texts:
        name, axis, extent = parse_dynamic(text)
        if axis in found.get(name, {}):
            raise InputError(f"axis {axis} of {name!r} is given twice", f"the second time as {text!r}")
        found.setdefault(name, {})[axis] = extent
    return found


def _check_range(extent: Range, what: str) -> None:
    if not (1 <= extent.min <= extent.opt <= extent.max and extent.min < extent.max):
        raise InputError(
            f"the range {extent.min}:{extent.opt}:{extent.max} of {what!r} is empty or not in order",
            "it must be MIN <= OPT <= MAX, with MIN at least 1 and less than MAX",
        )


def _specs(inputs: Mapping[str, Any]) -> dict[str, InputSpec]:
    return {n: s if isinstance(s, InputSpec) else InputSpec(tuple(s)) for n, s in inputs.items()}


def _ranges(dynamic: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Range]]:
    found = {n: {int(a): Range(*r) for a, r in axes.items()} for n, axes in dynamic.items()}
    for name, axes in found.items():
        for axis, extent in axes.items():
            _check_range(extent, f"{name}:{axis}")
    return found


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    source: str,
    *,
    inputs: Mapping[str, InputSpec | tuple[int, ...]] = {},
    dynamic: Mapping[str, Mapping[int, tuple[int, int, int]]] = {},
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    folder: Path,
    progress: Progress | None = None,
) -> Source:
    """Turn a SOURCE into a graph with probe inputs and, unless it is an ONNX file, eager torch's outputs.

    Args:
        source: a zoo name, ``model.py``, ``model.py:FACTORY``, a ``.pt2`` or a ``.onnx`` file.
        inputs: shapes and types by input name; they replace those of ``example_inputs()``.
        dynamic: least, usual and largest extent of dynamic axes, by input name and axis.
        checkpoint: weights for a zoo model.
        seed: of random weights and random inputs.
        folder: a scratch folder, used by nothing else, that outlives the result.
        progress: told in a few words what is being done; what the user's code prints then goes to stderr at once,
            otherwise only if it fails.

    Raises:
        InputError: SOURCE or an option cannot be used, the user's code fails (named by file and line), or no exporter
            exports the module faithfully.
        EnvironmentMissing: torch is needed and not installed.
    """
    path, _, factory = source.rpartition(":") if re.search(r"\.py:[^/]*$", source) else (source, "", "")
    kind = "zoo" if source in models.ZOO else {".py": "python", ".pt2": "pt2", ".onnx": "onnx"}.get(Path(path).suffix)
    _check_source(source, path, kind)
    if checkpoint is not None and kind != "zoo":
        raise InputError(
            f"{source} takes no checkpoint", "only zoo models are created without weights", "load it in model()"
        )
    specs, ranges = _specs(inputs), _ranges(dynamic)
    if kind == "onnx":
        graph = Graph.load(path)
        feeds = feeds_for(graph, specs, seed, ranges)
        note = f"random inputs (seed {seed}); no reference but the file itself"
        return Source(Path(path).name, kind, graph, tuple(feeds), (), (), {"onnx": onnx.__version__}, (note,))
    if importlib.util.find_spec("torch") is None:
        raise missing_extra(f"cannot export {source}", "torch", "torch")
    request = {
        "kind": kind,
        "path": path,
        "factory": factory or "model",
        "inputs": {n: dataclasses.astuple(s) for n, s in specs.items()},
        "dynamic": ranges,
        "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
        "seed": seed,
    }
    result = _run_child(_EXPORT, request, folder, progress)
    with np.load(folder / "probes.npz", allow_pickle=False) as arrays:
        feeds, reference = (
            tuple(
                {name: arrays[f"{what}.{probe}.{i}"] for i, name in enumerate(result[what])}
                for probe in range(result["probes"])
            )
            for what in ("inputs", "outputs")
        )
    return Source(
        name=f"{Path(path).name}:{factory}" if factory else Path(path).name,
        kind=str(kind),
        graph=Graph.load(folder / result["onnx"]),
        feeds=feeds,
        reference=reference,
        attempts=tuple(
            Attempt(**{**a, "errors": {n: OutputError(**e) for n, e in a["errors"].items()}})
            for a in result["attempts"]
        ),
        versions=result["versions"],
        notes=tuple(result["notes"]),
        file=UserFile({**request, "path": str(Path(path).resolve())}, tuple(result["defines"]))
        if kind == "python"
        else None,
    )


def evaluate(
    file: UserFile, bundle: Path, engine: EngineManifest, *, folder: Path, progress: Progress | None = None
) -> Accuracy:
    """Score an engine, and the module it was made from, by the ``evaluate(run)`` of the user's file.

    Args:
        file: the file; it defines ``evaluate``.
        bundle: the folder of the engine, with everything that a bundle holds but the manifest.
        engine: what the engine is.
        folder: a scratch folder, used by nothing else.
        progress: as for :func:`load`.

    Raises:
        InputError: the user's code fails on the engine (named by file and line), or the score is no finite number.
        EnvironmentMissing: the runtime does not open the engine.
    """
    request = {**file.request, "bundle": str(bundle.resolve()), "engine": dataclasses.asdict(engine)}
    return Accuracy(**_run_child(_EVALUATION, request, folder, progress))


@contextlib.contextmanager
def scorer(
    file: UserFile, *, folder: Path, cache: Path | None = None, progress: Progress | None = None
) -> Iterator[Scorer]:
    """A function from graphs to scores, by the ``evaluate(run)`` of the user's file.

    Args:
        file: the file; it defines ``evaluate``.
        folder: a scratch folder, used by nothing else.
        cache: folder that keeps scores.
        progress: as for :func:`load`.

    Raises:
        InputError: the user's code fails (named by file and line).
    """
    with _started(_SCORING, dict(file.request), folder, progress) as child:
        yield Scorer(child, file, cache)


class Scorer:
    """Scores of graphs by the user's ``evaluate(run)``, in one process that imports and loads once.

    A score is kept under the graph, the user's file and the versions. What ``evaluate`` reads besides is not known, so
    kept scores count only if the first graph scores as it did.

    Attributes:
        failure: why a graph could not be scored, None if all could.
    """

    def __init__(self, child: _Child, file: UserFile, cache: Path | None):
        self._child, self._asked, self._cache = child, 0, cache
        content = hashlib.sha256(Path(file.request["path"]).read_bytes()).hexdigest()
        names = ("edgecompile", "onnxruntime", "torch", "numpy")
        versions = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
        self._facts = {"file": content, "request": json.dumps(file.request, sort_keys=True), **versions}
        self._known: dict[str, float] | None = None
        self.failure: errors.EdgecompileError | None = None

    def __call__(self, graph: Graph, simulate: bool) -> float:
        """The score of a graph, minus infinity if it is not finite.

        Args:
            graph: with the inputs and outputs of the model.
            simulate: each operator by itself, else with fused kernels.

        Raises:
            InputError: the user's code fails (named by file and line).
        """
        from edgecompile import calibration

        key = f"{graph.digest()} {'simulated' if simulate else 'fused'}"
        if self._known is not None and key in self._known:
            return self._known[key]
        try:
            score = self._ask(graph, simulate)
        except errors.EdgecompileError as error:
            self.failure = error
            raise
        path = None if self._cache is None else calibration.entry_path(self._cache, _SCORES, self._facts)
        known = self._known
        if known is None:
            kept = (calibration.read_entry(path, self._facts) or {}).get("scores", {}) if path else {}
            self._known = known = kept if kept.get(key) == score else {}
        known[key] = score
        if path is not None:
            calibration.write_entry(path, {"schema": _SCORES, "facts": self._facts, "scores": known})
        return score

    def _ask(self, graph: Graph, simulate: bool) -> float:
        self._asked += 1
        name, process = f"graph{self._asked}.onnx", self._child.process
        answer = self._child.folder / f"score{self._asked}.json"
        files = graph.save(self._child.folder / name)
        answer.unlink(missing_ok=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its answer says why
            process.stdin.write(json.dumps([name, simulate, answer.name]).encode() + b"\n")
            process.stdin.flush()
        self._child.follow(answer.exists)
        for file in files:
            file.unlink()
        if not answer.exists():
            self._child.answer()
        return json.loads(answer.read_text())


def calibration_data(file: UserFile, inputs: Sequence[Port], *, folder: Path, progress: Progress | None = None) -> Path:
    """Read ``calibration_data()`` of the user's file into an ``.npz`` file.

    Args:
        file: the file; it defines ``calibration_data``.
        inputs: of the exported model.
        folder: a scratch folder that outlives the result.
        progress: as for :func:`load`.

    Raises:
        InputError: the user's code fails (named by file and line), or a sample does not fit the model.
    """
    request = {**file.request, "ports": [dataclasses.asdict(port) for port in inputs]}
    return folder / _run_child(_CALIBRATION, request, folder, progress)["file"]


def from_module(
    module: nn.Module,
    example_inputs: Any,
    *,
    inputs: Mapping[str, InputSpec | tuple[int, ...]] = {},
    dynamic: Mapping[str, Mapping[int, tuple[int, int, int]]] = {},
    seed: int = 0,
    folder: Path,
    progress: Progress | None = None,
) -> Source:
    """Export a module of this process; it is run in eval mode and left as it was.

    Args:
        module: the module.
        example_inputs: a tensor, a tuple of arguments, or a dict of arguments by parameter name.
        inputs: as for :func:`load`.
        dynamic: as for :func:`load`.
        seed: of random inputs.
        folder: a scratch folder that outlives the result.
        progress: as for :func:`load`.

    Raises:
        InputError: the module fails on the inputs, or no exporter exports it faithfully.
        EnvironmentMissing: torch is not installed.
    """
    try:
        from edgecompile import ladder
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise missing_extra("cannot export a module", "torch", "torch") from None

    args, kwargs = ladder.arguments(example_inputs, "example_inputs")
    made = ladder.export(
        module,
        args,
        kwargs,
        folder=folder,
        user=User(),
        inputs=_specs(inputs),
        dynamic=_ranges(dynamic),
        seed=seed,
        say=progress or (lambda _: None),
    )
    name = type(module).__name__
    return Source(name, "module", made.graph, made.feeds, made.reference, made.attempts, ladder.versions(), made.notes)


def feeds_for(
    graph: Graph,
    inputs: Mapping[str, InputSpec],
    seed: int = 0,
    dynamic: Mapping[str, Mapping[int, Range]] = {},
) -> list[Outputs]:
    """Two sets of random inputs for a graph; with dynamic axes the first has their usual extent, the second another.

    Args:
        graph: the graph.
        inputs: shapes and types that some inputs shall have.
        seed: of the values.
        dynamic: extents of dynamic axes, by input name and axis.

    Raises:
        InputError: an input or axis does not exist, has another type, or has a fixed extent.
    """
    if not inputs and not dynamic:
        return oracle.probe_feeds(graph, seed)
    ports = {p.name: p for p in graph.signature().inputs}
    for name in [*inputs, *dynamic]:
        if name not in ports:
            raise InputError(f"the model has no input {name!r}", f"its inputs are {', '.join(map(repr, ports))}")
    for name, axes in dynamic.items():
        for axis in axes:
            shape = ports[name].shape
            if shape is not None and (axis >= len(shape) or isinstance(shape[axis], int)):
                has = f"its shape is {'x'.join(str(d or '?') for d in shape)}"
                raise InputError(f"axis {axis} of {name!r} cannot be dynamic", has, "export it with a dynamic axis")
    feeds = []
    for number, pick in enumerate((lambda r: r.opt, lambda r: r.min if r.min != r.opt else r.max)):
        extents = {n: {a: pick(r) for a, r in axes.items()} for n, axes in dynamic.items()}
        sizes: dict[str, int] = {}  # one extent per named dimension, wherever it occurs
        shapes = {}
        for name, port in ports.items():
            shape = list(inputs[name].shape if name in inputs else port.shape or ())
            for axis, extent in extents.get(name, {}).items():
                if axis < len(shape):
                    shape[axis] = extent
            named = zip(port.shape or (), shape, strict=False)
            sizes |= {d: extent for d, extent in named if isinstance(d, str) and isinstance(extent, int)}
            shapes[name] = tuple(shape)
        concrete = [
            dataclasses.replace(
                port,
                shape=shapes[name],
                dtype=_onnx_type(inputs[name].dtype, port.dtype) if name in inputs else port.dtype,
            )
            for name, port in ports.items()
        ]
        feeds.append(oracle.random_feeds(concrete, seed + number, sizes))
        oracle.check_feeds(graph, feeds[-1])
    return feeds


def _onnx_type(dtype: str | None, otherwise: int) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if dtype else otherwise


def _check_source(source: str, path: str, kind: str | None) -> None:
    """Refuse what is no SOURCE, or is not there."""
    if kind == "zoo":
        return
    file = Path(path)
    if kind and file.is_file():
        return
    if kind:
        raise InputError(f"cannot read {path}", "it is a folder" if file.is_dir() else "no such file", _SOURCES)
    if file.suffix in (".pt", ".pth", ".ckpt", ".safetensors", ".bin") and file.is_file():
        raise InputError(
            f"cannot build {source}",
            "a checkpoint holds weights but no model",
            "write a model.py whose model() makes the module and loads it, or use --checkpoint with a zoo name",
        )
    if file.exists():
        raise InputError(f"cannot build {source}", "it is a folder" if file.is_dir() else "unknown kind", _SOURCES)
    matches = difflib.get_close_matches(source.lower(), models.ZOO, 4)
    close = ", ".join(n for n in models.ZOO if n in matches)
    why = f"no such file, and no such model in the zoo{f'; close names: {close}' if close else ''}"
    raise InputError(f"cannot build {source}", why, f"{_SOURCES}; `edgecompile models` lists the zoo")


# -- the child process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a child process does: its module, the word for it, what helps when it dies, and whether it is asked more."""

    module: str
    word: str
    crashed: str
    out_of_memory: str
    asked: bool = False


_EXPORT = _Job(
    "edgecompile.export_child", "export", "run model() and the module in Python to see where",
    "try a smaller batch or image with --input, or a larger machine",
)  # fmt: skip
_EVALUATION = _Job(
    "edgecompile.evaluate_child", "evaluation", "run evaluate() on the module in Python to see where",
    "read the data piece by piece, or use a larger machine",
)  # fmt: skip

_SCORING = dataclasses.replace(_EVALUATION, asked=True)
_CALIBRATION = _Job(
    "edgecompile.calibration_child", "reading of calibration data", "run calibration_data() in Python to see where",
    "yield smaller samples, or use a larger machine",
)  # fmt: skip


def _run_child(job: _Job, request: dict[str, Any], folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Run a job on a request and return its result; the child never outlives the call."""
    with _started(job, request, folder, progress) as child:
        return child.answer()


@contextlib.contextmanager
def _started(job: _Job, request: dict[str, Any], folder: Path, progress: Progress | None) -> Iterator[_Child]:
    """Start a job on a request; the child never outlives the context."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / "result.json", folder / "crash.txt"):
        stale.unlink(missing_ok=True)
    reader, writer = os.pipe()
    request_file = folder / "request.json"
    request_file.write_text(json.dumps({**request, "folder": str(folder.resolve()), "progress": writer}))
    command = [sys.executable, "-m", job.module, str(request_file.resolve())]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if job.asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            start_new_session=True,  # an interrupt reaches this process only, which then ends the child's whole group
        )
    finally:
        os.close(writer)
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            child = _Child(job, request, folder, progress, process, selector)
            for stream, handle in ((process.stdout.fileno(), child.show), (reader, child.report)):
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                selector.register(stream, selectors.EVENT_READ, (decoder, handle))
            yield child
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        process.wait()


@dataclass
class _Child:
    """A process at work; ``printed`` is the end of what it printed."""

    job: _Job
    request: Mapping[str, Any]
    folder: Path
    progress: Progress | None
    process: subprocess.Popen[bytes]
    selector: selectors.BaseSelector
    printed: str = ""

    def show(self, text: str) -> None:
        self.printed = (self.printed + text)[-_KEPT_OUTPUT:]
        if self.progress is not None:
            sys.stderr.write(text)

    def report(self, text: str) -> None:
        for line in filter(None, text.splitlines()):
            if self.progress is not None:
                self.progress(line)

    def follow(self, until: Callable[[], bool] = lambda: False) -> None:
        """Pass on what the child reports and prints until it ends, or until there is what is waited for."""
        while self.selector.get_map() and not until():
            ended = self.process.poll() is not None  # a process it left behind may hold the pipes open
            ready = self.selector.select(0 if ended else 0.2)
            if ended and not ready:
                break
            for key, _ in ready:
                decoder, handle = key.data
                data = os.read(key.fd, 1 << 16)
                if not data:
                    self.selector.unregister(key.fd)
                handle(decoder.decode(data, not data))

    def answer(self) -> dict[str, Any]:
        """Wait for its end and return its result."""
        self.follow()
        self.process.wait()
        try:
            answer = json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            crash = self.folder / "crash.txt"
            answer = {"error": _death(self.job, self.request, self.process.returncode, crash)}
        if "crash" in answer:
            raise RuntimeError(f"the {self.job.word} process failed\n{answer['crash']}")
        if "error" in answer:
            if self.progress is None and self.printed:
                sys.stderr.write(self.printed)
            kind = getattr(errors, answer["error"].pop("type"))
            raise kind(**answer["error"])
        return answer


def _death(job: _Job, request: Mapping[str, Any], status: int, crash: Path) -> dict[str, str]:
    """The error for a child that ended without an answer."""
    name = Path(request["path"]).name
    places = crash.read_text() if crash.is_file() else ""
    at = User(Path(request["path"]).parent if request["kind"] != "zoo" else None).quoted(places) or name
    if status >= 0:
        what, why = f"{name}: the process ended with status {status} before the {job.word} was done", ""
        fix = "the file or something it imports calls os._exit"
    else:
        kind = signal.Signals(-status).name
        what, why = f"{at}: the {job.word} process was killed by {kind}", ""
        fix = job.crashed if request["kind"] == "python" else ""
        if kind == "SIGKILL":
            why, fix = "out of memory, most likely", job.out_of_memory
    return {"type": "InputError", "what": what, "why": why, "fix": fix}
