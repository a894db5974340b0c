"""What runs beside the engine on a board: with Python 3.10, numpy and the runtime, and nothing else of ours installed.

:mod:`edgecompile.remote` sends this module and the few that it needs as one file, starts it over ssh and talks to it
through its standard input and output. A message is one line of JSON and, where the line says so, that many bytes. The
other side asks, this side answers; every request can be repeated, so that a lost connection costs the request only.

The same functions measure on this machine, without ssh.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # `-m` puts the working directory first, where anything may lie

import contextlib
import faulthandler
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import io
import json
import os
import platform
import random
import re
import select
import shutil
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from edgecompile import conditions
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError

if TYPE_CHECKING:  # numpy may be missing on the other side, which must be said and not be a traceback
    import numpy as np

    from edgecompile.bundle import Bundle
    from edgecompile.fingerprint import Fingerprint
    from edgecompile.measure import Samples

LINE_LIMIT, PAYLOAD_LIMIT = 4 << 20, 1 << 30
KEPT_DAYS = 30
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "tensorrt", "apache-tvm")
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Light:
    """What opens the engines of a target with numpy and the runtime alone.

    Attributes:
        modules: of ours that travel to a board, by package, besides those that every target needs.
        module: the one with ``load(folder, manifest)`` and ``probe()``.
        runtime: the runtime's module.
        package: its package, as the engine's versions name it.
        install: how to get it; ``{python}`` and ``{package}`` (with its version) are filled in.
    """

    modules: Mapping[str, tuple[str, ...]]
    module: str
    runtime: str
    package: str
    install: str = "{python} -m pip install {package}"


LIGHT = {
    "ort": Light(
        {"edgecompile.targets": ("ort_session",)}, "edgecompile.targets.ort_session", "onnxruntime", "onnxruntime"
    ),
    "trt": Light(
        {"edgecompile.targets.trt": ("__init__", "options", "plan", "probe", "session")},
        "edgecompile.targets.trt.session",
        "tensorrt",
        "tensorrt",
        "sudo apt-get install python3-libnvinfer (JetPack), or {python} -m pip install {package}",
    ),
}


class Running(Protocol):
    """What measuring needs of an engine; see :class:`edgecompile.target.Engine`.

    One whose clock is not in :data:`edgecompile.measure.CLOCKS` also has ``timer(feeds)``, see :func:`timer`. It may
    have ``times(feeds, calls)``, see :func:`phases`, and those of light targets have ``profile(feeds, repeats)``.
    """

    clock: str
    threads: int

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        ...

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that executes the engine once."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True)
class Plan:
    """One session: every arm opened anew, warmed up, then timed in alternating blocks.

    Attributes:
        seconds: wall time per arm after the warm-up.
        block_ms: length of a block.
        min_calls: calls per arm to make in any case.
        seed: of the order in which arms are opened and blocks are run.
        clock: ``thread_cpu``, ``wall`` or ``cuda_event``; ``""`` for the engines' own, which is ``wall`` where they
            differ.
    """

    seconds: float = 0.2
    block_ms: float = 15.0
    min_calls: int = 2
    seed: int = 0
    clock: str = ""


@dataclass(frozen=True)
class Footprint:
    """The start of an engine in a process of its own: seconds, and bytes of resident memory.

    Attributes:
        imports: seconds to import the runtime.
        opening: seconds to open the engine.
        first_call: seconds of the first run.
        baseline: resident memory before: Python, numpy and the inputs.
        peak: by how much it grew at most until the engine had run three times.
    """

    imports: float
    opening: float
    first_call: float
    baseline: int
    peak: int


# -- measuring ---------------------------------------------------------------------------------------------------------


def open_engine(bundle: Bundle) -> Running:
    """The engine of a bundle; without its graph where the target can do that, which is faster.

    Raises:
        EnvironmentMissing: its runtime is not installed, or it was built for another device or version.
    """
    name = bundle.manifest["target"]
    if name not in LIGHT:
        return bundle.engine()
    return importlib.import_module(LIGHT[name].module).load(bundle.path, bundle.engine_manifest)


def timer(engine: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """A function that executes an engine once and returns the seconds on a clock that only the engine can read.

    Raises:
        EnvironmentMissing: the engine has no such function.
    """
    make = getattr(engine, "timer", None)
    if make is None:
        raise EnvironmentMissing(
            f"the clock {engine.clock!r} cannot be read", f"the target {engine.manifest.target} has no timer for it"
        )
    return make(feeds)


def run_session(bundles: Mapping[str, Bundle], plan: Plan) -> dict[str, Samples]:
    """Open the engine of every bundle, in an order drawn from the seed, and time them interleaved.

    Args:
        bundles: by the name of the arm.
        plan: how.

    Returns:
        the samples by name, in the order of ``bundles``.
    """
    from edgecompile import measure

    engines: dict[str, Running] = {}
    calls: dict[str, Callable[[], object]] = {}
    spent = [0.0]  # seconds on the engines' own clock, which stands still between calls
    try:
        for name in random.Random(plan.seed).sample(list(bundles), len(bundles)):
            engines[name] = open_engine(bundles[name])
        clocks = {engine.clock for engine in engines.values()}
        clock = plan.clock or (clocks.pop() if len(clocks) == 1 else "wall")
        own = clock not in measure.CLOCKS
        for name, engine in engines.items():
            feeds = bundles[name].probe()[0]
            calls[name] = _adding(timer(engine, feeds), spent) if own else engine.call(feeds)
        samples = measure.interleave(
            {name: calls[name] for name in bundles},
            clock,
            now=(lambda: int(spent[0] * 1e9)) if own else None,
            seconds=plan.seconds,
            min_calls=plan.min_calls,
            block_ms=plan.block_ms,
            seed=plan.seed,
        )
    finally:
        calls.clear()
        for engine in engines.values():
            engine.close()
    return {name: replace(one, threads=engines[name].threads) for name, one in samples.items()}


def _adding(once: Callable[[], float], to: list[float]) -> Callable[[], None]:
    def call() -> None:
        to[0] += once()

    return call


def phases(bundle: Bundle, calls: int = 100) -> dict[str, Any] | None:
    """Compute, enqueue and end-to-end time of an engine that tells them apart; None for the others.

    Returns:
        ``compute``, ``enqueue`` and ``end_to_end``: medians in seconds; ``calls``: how many there were; ``pinned``:
        what they depend on.
    """
    import numpy as np

    engine: Any = open_engine(bundle)
    try:
        if not hasattr(engine, "times"):
            return None
        found = engine.times(bundle.probe()[0], calls)
    finally:
        engine.close()
    medians = {name: float(np.median(getattr(found, name))) for name in ("compute", "enqueue", "end_to_end")}
    return medians | {"calls": calls, "pinned": dict(found.pinned)}


def profile(bundle: Bundle, repeats: int) -> dict[str, Any]:
    """What the runtime's profiler tells of an engine's layers, for :meth:`edgecompile.target.Target.layers`."""
    engine: Any = open_engine(bundle)
    try:
        return engine.profile(bundle.probe()[0], repeats)
    finally:
        engine.close()


def run_once(bundle: Bundle, feeds: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The engine's outputs by name; on the bundle's own inputs without ``feeds``."""
    engine = open_engine(bundle)
    try:
        return engine.run(bundle.probe()[0] if feeds is None else feeds)
    finally:
        engine.close()


class Conditions:
    """Sessions, and what disturbed each of them; the machine is watched from the first one on."""

    def __init__(self):
        self._sampler: conditions.Sampler | None = None

    def session(self, bundles: Mapping[str, Bundle], plan: Plan) -> tuple[dict[str, Samples], str]:
        """:func:`run_session`, and what makes its samples void, ``""`` for nothing."""
        if self._sampler is None:
            # What throttles a GPU does not disturb an engine on the CPU.
            self._sampler = conditions.Sampler(nvml=any(map(_on_gpu, bundles.values())))
            self._sampler.__enter__()
        start = time.perf_counter()
        samples = run_session(bundles, plan)
        return samples, conditions.throttled(self._sampler.samples, start, time.perf_counter())

    def close(self) -> None:
        """Watch no more."""
        if self._sampler is not None:
            self._sampler.__exit__()
            self._sampler = None


def _on_gpu(bundle: Bundle) -> bool:
    providers = str(bundle.engine_manifest.options.get("providers", ""))
    return bundle.manifest["target"] == "trt" or "cuda" in providers or "tensorrt" in providers


def footprint(folder: Path) -> Footprint:
    """Measure :class:`Footprint` in a fresh process.

    Raises:
        EdgecompileError: the engine cannot be opened or run.
    """
    archive = next((p for p in Path(__file__).parents if p.is_file()), None)
    start = ["-m", "edgecompile.board_runner"] if archive is None else [str(archive)]
    command = [sys.executable, *start, "footprint", str(folder.resolve())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        text = done.stderr.decode(errors="replace").strip() or f"its process ended with status {done.returncode}"
        raise InputError(f"the engine in {folder} does not run", text.splitlines()[-1]) from None
    if "error" in answer:
        raise error_from(answer["error"])
    return Footprint(**answer)


def _footprint(folder: Path) -> Footprint:
    from edgecompile.bundle import Bundle

    bundle = Bundle.open(folder)
    feeds, target = bundle.probe()[0], bundle.manifest["target"]
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    baseline, start = _memory("VmRSS"), time.perf_counter()
    if target in LIGHT:
        with contextlib.suppress(ImportError):  # opening the engine says it better
            importlib.import_module(LIGHT[target].runtime)
    imported = time.perf_counter()
    engine = open_engine(bundle)
    opened = time.perf_counter()
    engine.run(feeds)
    first = time.perf_counter()
    for _ in range(2):
        engine.run(feeds)
    grown = max(_memory("VmHWM") - baseline, 0)
    return Footprint(imported - start, opened - imported, first - opened, baseline, grown)


def _memory(key: str) -> int:
    """A line of Linux's /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


def facts() -> dict[str, Any]:
    """The machine and what is installed on it.

    Keys: ``host``, ``python``, ``executable``, ``versions`` (numpy and the runtimes that are installed), ``machine``
    (see :func:`edgecompile.measure.machine`).
    """
    import numpy as np

    from edgecompile import measure

    versions = {"numpy": np.__version__}
    for package in _RUNTIMES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": versions,
        "machine": measure.machine(),
    }


def probe() -> list[dict[str, Any]]:
    """What each light target can use here, as :class:`edgecompile.target.Capability` in JSON."""
    return [asdict(c) for light in LIGHT.values() for c in importlib.import_module(light.module).probe()]


def this_place(versions: Mapping[str, str], options: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of this machine, for engines with these versions and options; remarks on a build do not count."""
    from edgecompile.fingerprint import fingerprint

    options = {name: value for name, value in options.items() if not name.startswith("_")}
    found = conditions.board()
    if found is None:
        return fingerprint(versions, options)
    board = {
        "board": found.name,
        "l4t": found.l4t,
        "power_mode": found.mode.name if found.mode else "",
        "jetson_clocks": bool(found.clocks) and all(clock.fixed for clock in found.clocks),
    }
    return fingerprint(versions, options, board)


# -- messages ----------------------------------------------------------------------------------------------------------


def error_to(error: EdgecompileError) -> dict[str, str]:
    """An error as JSON."""
    return {"type": type(error).__name__, "what": error.what, "why": error.why, "fix": error.fix}


def error_from(told: Mapping[str, Any]) -> EdgecompileError:
    """The error that :func:`error_to` wrote; of the root class if it is of a kind that is not known here."""
    kinds = {kind.__name__: kind for kind in (InputError, EnvironmentMissing)}
    kind = kinds.get(str(told.get("type")), EdgecompileError)
    return kind(*(str(told.get(key, "")) for key in ("what", "why", "fix")))


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name as the bytes of an ``.npz`` file.

    Raises:
        InputError: one holds Python objects (strings), which cannot be sent safely.
    """
    import numpy as np

    for name, value in arrays.items():
        if value.dtype.hasobject:
            raise InputError(f"{name!r} cannot be sent", "it holds Python objects")
    # By number: a tensor may have any name, also one that is a keyword of savez.
    stored: dict[str, Any] = {str(i): value for i, value in enumerate(arrays.values())}
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array(list(arrays), dtype=str), **stored)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """What :func:`pack` made.

    Raises:
        ValueError, KeyError, OSError, zipfile.BadZipFile: it is something else.
    """
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return {str(name): stored[str(i)] for i, name in enumerate(stored["names"])}


# -- the runner --------------------------------------------------------------------------------------------------------


class _Runner:
    """Answers requests; one method for each kind."""

    def __init__(self, cache: Path):
        self._bundles = cache / "bundles"
        self._runners = cache / "runner"
        self._verified: dict[str, tuple[object, Bundle]] = {}
        self._conditions = Conditions()

    def facts(self, request: Mapping[str, Any], payload: bytes):
        return facts(), b""

    def probe(self, request: Mapping[str, Any], payload: bytes):
        return {"found": probe()}, b""

    def fingerprint(self, request: Mapping[str, Any], payload: bytes):
        return this_place(request["versions"], request["options"]).to_json(), b""

    def locked(self, request: Mapping[str, Any], payload: bytes):
        wrong = conditions.require_locked(request["mode"], request["clocks"], refuse=request["refuse"])
        return {"wrong": wrong}, b""

    def begin(self, request: Mapping[str, Any], payload: bytes):
        """Is this bundle here, or else how much of each of its files?"""
        key, files = _parcel(request, payload)
        with self._alone():
            self._expire()
            if (self._bundles / key).exists():
                try:
                    self._bundle(key)
                    return {"complete": True}, b""
                except EdgecompileError:
                    shutil.rmtree(self._bundles / key)
            part = self._part(key)
            part.mkdir(exist_ok=True)
            sizes = {}
            for name, entry in files.items():
                size = (part / name).stat().st_size if (part / name).is_file() else 0
                sizes[name] = size if size <= entry["bytes"] else 0
            return {"complete": False, "sizes": sizes}, b""

    def put(self, request: Mapping[str, Any], payload: bytes):
        """A piece of a file. Two that send the same file write the same bytes to the same places."""
        key, name, offset = _key(request), _name(request["name"]), int(request["offset"])
        with self._alone():
            if (self._bundles / key).exists():  # another was faster
                return {"size": offset + len(payload)}, b""
            handle = os.open(self._part(key) / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with open(handle, "r+b") as file:
                size = os.fstat(handle).st_size
                if offset > size:
                    return {"size": size}, b""
                file.seek(offset)
                file.write(payload)
            return {"size": offset + len(payload)}, b""

    def finish(self, request: Mapping[str, Any], payload: bytes):
        """All pieces were sent: prove the digests and put the bundle in its place; damaged files are dropped."""
        from edgecompile.bundle import MANIFEST, file_digest
        from edgecompile.files import write_atomic

        key, files = _parcel(request, payload)
        part, damaged = self._part(key), []
        with self._alone():
            if (self._bundles / key).exists():
                return {"damaged": []}, b""
            for name, entry in files.items():
                if not (part / name).is_file() or file_digest(part / name) != entry["sha256"]:
                    (part / name).unlink(missing_ok=True)
                    damaged.append(name)
                    continue
                with open(part / name, "rb") as file:
                    os.fsync(file.fileno())
            if not damaged:
                write_atomic(part / MANIFEST, [payload])
                part.rename(self._bundles / key)
        return {"damaged": damaged}, b""

    def session(self, request: Mapping[str, Any], payload: bytes):
        from edgecompile import measure

        bundles = {label: self._ready(key) for label, key in request["arms"].items()}
        samples, disturbed = self._conditions.session(bundles, Plan(**request["plan"]))
        with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
            path = Path(scratch) / "samples.npz"
            measure.save(path, samples)
            return {"disturbed": disturbed}, path.read_bytes()

    def outputs(self, request: Mapping[str, Any], payload: bytes):
        return {}, pack(run_once(self._ready(_key(request)), unpack(payload) if payload else None))

    def phases(self, request: Mapping[str, Any], payload: bytes):
        return {"found": phases(self._ready(_key(request)), request["calls"])}, b""

    def profile(self, request: Mapping[str, Any], payload: bytes):
        return {}, json.dumps(profile(self._ready(_key(request)), request["repeats"])).encode()

    def footprint(self, request: Mapping[str, Any], payload: bytes):
        return asdict(footprint(self._ready(_key(request)).path)), b""

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the copies meanwhile."""
        self._bundles.mkdir(parents=True, exist_ok=True)
        with open(self._bundles / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _part(self, key: str) -> Path:
        return self._bundles / f".{key}.part"

    def _ready(self, key: str) -> Bundle:
        """A bundle whose target can run here."""
        bundle = self._bundle(key)
        target = bundle.manifest["target"]
        if target not in LIGHT:
            raise EnvironmentMissing(
                f"the target {target} cannot be measured over ssh", f"only {', '.join(LIGHT)} can", "measure it there"
            )
        light = LIGHT[target]
        if importlib.util.find_spec(light.runtime) is None:
            built = bundle.engine_manifest.versions.get(light.package, "")
            wanted = f"'{light.package}=={built}'" if built else light.package
            raise EnvironmentMissing(
                f"there is no {light.package}",
                f"{sys.executable} cannot import it",
                light.install.format(python=sys.executable, package=wanted),
            )
        return bundle

    def _bundle(self, key: str) -> Bundle:
        """A bundle that is here. Its digests are proved once, and again when a file has been touched since."""
        from edgecompile.bundle import Bundle

        path = self._bundles / key
        if not _KEY.fullmatch(key) or not path.is_dir():
            raise EnvironmentMissing("the bundle is not there any more", f"{path} is missing", "run it again")
        state = sorted((f.name, s.st_size, s.st_mtime_ns, s.st_ino) for f in os.scandir(path) if (s := f.stat()))
        if self._verified.get(key, (None,))[0] != state:
            try:
                bundle = Bundle.open(path)
            except EdgecompileError as error:
                raise EnvironmentMissing(
                    "the copy of the bundle is damaged", f"{error.what}: {error.why}", "run again: it is copied anew"
                ) from None
            self._verified[key] = state, bundle
            os.utime(path)
        return self._verified[key][1]

    def _expire(self) -> None:
        """Forget what nobody has used for long."""
        oldest = time.time() - KEPT_DAYS * 86400
        for entry in [*self._bundles.glob("*"), *self._bundles.glob(".*.part"), *self._runners.glob("*")]:
            with contextlib.suppress(OSError):
                if entry.stat().st_mtime < oldest:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _key(request: Mapping[str, Any]) -> str:
    if not _KEY.fullmatch(request["key"]):
        raise InputError(f"{request['key']!r} is not the key of a bundle")
    return request["key"]


def _name(name: str) -> str:
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} is not the name of a file of a bundle")
    return name


def _parcel(request: Mapping[str, Any], content: bytes) -> tuple[str, dict[str, Any]]:
    """Key and files of the manifest that was sent."""
    key = _key(request)
    if hashlib.sha256(content).hexdigest() != key:
        raise InputError("the manifest was damaged on its way")
    files = json.loads(content)["files"]
    return key, {_name(name): entry for name, entry in files.items()}


def _answer(runner: _Runner, request: Mapping[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        answer, content = getattr(runner, request["op"])(request, payload)
        return {"ok": answer}, content
    except EdgecompileError as error:
        return {"error": error_to(error)}, b""
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        missing = EnvironmentMissing(
            f"there is no {package}", f"{sys.executable} cannot import it", f"{sys.executable} -m pip install {package}"
        )
        return {"error": error_to(missing)}, b""
    except OSError as error:
        where = f"cannot use {error.filename}" if error.filename else "a file cannot be used"
        return {"error": error_to(EnvironmentMissing(where, error.strerror or str(error)))}, b""
    except Exception:
        return {"crash": traceback.format_exc()}, b""


def _leave_when_alone(handle: int) -> None:
    """End this process as soon as nobody holds the other end, also in the middle of a session."""
    poll = select.poll()
    poll.register(handle, 0)
    poll.poll()
    os._exit(1)


def _serve(incoming: BinaryIO, outgoing: BinaryIO, cache: Path) -> None:
    runner = _Runner(cache)
    threading.Thread(target=_leave_when_alone, args=(incoming.fileno(),), daemon=True).start()
    while line := incoming.readline(LINE_LIMIT):
        request = json.loads(line)
        payload = incoming.read(request["bytes"])
        if len(payload) < request["bytes"]:
            return
        answer, content = _answer(runner, request, payload)
        outgoing.write(json.dumps({"id": request["id"], "bytes": len(content), **answer}).encode() + b"\n")
        outgoing.write(content)
        outgoing.flush()


def main() -> None:
    """Serve on standard input and output; or, with ``footprint FOLDER``, print that of an engine."""
    # Whatever a runtime prints must not get between the messages: it goes to standard error from here on.
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    faulthandler.enable()
    if sys.argv[1:2] == ["footprint"]:
        try:
            answer = asdict(_footprint(Path(sys.argv[2])))
        except EdgecompileError as error:
            answer = {"error": error_to(error)}
        outgoing.write(json.dumps(answer).encode())
        outgoing.flush()
        return
    with contextlib.suppress(BrokenPipeError):
        _serve(incoming, outgoing, Path(sys.argv[0]).parent.parent)


if __name__ == "__main__":
    main()
