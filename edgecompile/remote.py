"""Measure here or on a board: the same few calls for both, and plain ssh between.

The other side needs an ssh server, Python 3.10 or newer, numpy and the runtime of the engine. One ssh connection
carries everything: a few lines of Python look for :mod:`edgecompile.board_runner` in the board's cache, take it if it
is not there, and run it; bundles travel through it piece by piece and are kept by digest, so that a copy that was cut
off goes on where it stopped. All that comes back is bounded in size and checked before it is used.

The system's ``ssh`` is used as it is configured: host aliases, keys, jump hosts and a shared connection of the user's
come from ``~/.ssh/config``. ``EDGECOMPILE_SSH_OPTIONS`` adds options of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgecompile import board_runner, conditions, measure, registry
from edgecompile.board_runner import LIGHT, LINE_LIMIT, PAYLOAD_LIMIT, Footprint, Plan
from edgecompile.bundle import MODEL, PROBE, Bundle
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.fingerprint import Fingerprint
from edgecompile.measure import Samples
from edgecompile.target import Capability, Target

SSH_OPTIONS = "EDGECOMPILE_SSH_OPTIONS"
RPC = "rpc://"
_PIECE = 4 << 20  # of a file, sent at once
_ANSWER_SECONDS = 900.0  # longer than any single request takes; a lost connection is noticed by ssh itself
_START_SECONDS = 60.0
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each new connection
_NOISE_LIMIT = 1 << 16
_TEXT_LIMIT = 4000
_MARK = b"edgecompile-board/1 "
# Modules that travel, besides those of the targets: enough to open and time an engine, and none that imports more than
# numpy.
_MODULES = {
    "edgecompile": (
        *("__init__", "board_runner", "bundle", "conditions", "device", "documents", "errors", "files"),
        *("fingerprint", "measure", "registry", "target"),
    ),
    "edgecompile.targets": ("__init__",),
}
_KEEP_ALIVE = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3")
_PLAIN = ("ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "RemoteCommand=none")

# The first program to run on the board; any Python 3 can read it. It leaves standard input after its own lines to the
# runner, hence the unbuffered reads.
_BOOT = r"""
import hashlib, os, runpy, sys
def read(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            sys.exit(1)
        data += piece
    return data
def say(text):
    os.write(1, MARK + text.encode() + b"\n")
def good():
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == digest
    except OSError:
        return False
say("python %d.%d" % sys.version_info[:2])
if sys.version_info < (3, 10):
    sys.exit(0)
digest, size = read(80).decode().split()
folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
folder = os.path.join(folder, "edgecompile", "runner")
path = os.path.join(folder, digest + ".pyz")
if not good():
    say("send")
    data = read(int(size))
    os.makedirs(folder, exist_ok=True)
    temporary = "%s.%d.tmp" % (path, os.getpid())
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if not good():
        say("damaged")
        sys.exit(1)
os.utime(path)
say("run")
sys.argv = [path]
runpy.run_path(path, run_name="__main__")
""".replace("MARK", repr(_MARK))

_USER = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]"
_URL = re.compile(
    rf"ssh://(?:({_USER})@)?({_HOST})(?::([0-9]{{1,5}}))?(?:/((?:~|[\w.+-]+)(?:/[\w.+-]+)+))?/?", re.ASCII
)

# What ssh says -> what helps.
_HELP = (
    ("could not resolve hostname", "check the name of the host, or name it in ~/.ssh/config"),
    ("permission denied", "set up a key that needs no passphrase or is in the agent: ssh-copy-id {login}"),
    ("host identification has changed", "if the board was set up anew, forget its old key with ssh-keygen -R"),
    ("host key verification failed", "connect once by hand and check the key it shows: ssh {login}"),
    ("too many authentication failures", "name the key in ~/.ssh/config, with IdentitiesOnly yes"),
    ("connection refused", "start the ssh server on the board, or give its port: ssh://host:port"),
)


@dataclass(frozen=True)
class Device:
    """Where a board is.

    Attributes:
        host: name, alias in ``~/.ssh/config``, or address.
        user: login name, or ``""`` for ssh's own choice.
        port: port, or 0 for ssh's own choice.
        python: path of the Python to use there, ``~/`` for the home folder; ``python3`` by default.
    """

    host: str
    user: str = ""
    port: int = 0
    python: str = "python3"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read ``ssh://[USER@]HOST[:PORT][/PATH/TO/PYTHON]``.

        Raises:
            InputError: it is something else, or a part holds characters that have a meaning to ssh or to a shell.
        """
        match = _URL.fullmatch(text)
        if not match or int(match[3] or 22) not in range(1, 65536):
            raise InputError(
                f"{text!r} is not a device",
                "it has the form ssh://[USER@]HOST[:PORT][/PATH/TO/PYTHON]",
                "give odd host names an alias in ~/.ssh/config",
            )
        user, host, port, python = match.groups()
        if python and not python.startswith("~"):
            python = f"/{python}"
        return cls(host.strip("[]"), user or "", int(port or 0), python or "python3")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        python = "" if self.python == "python3" else self.python if self.python[0] == "/" else f"/{self.python}"
        return f"ssh://{user}{host}{port}{python}"


_Place = TypeVar("_Place", bound="Place")


class Place(ABC):
    """Where bundles are measured: :class:`Board` and :class:`LocalBoard`; a context manager.

    Attributes:
        device: URL of the board, ``""`` for this machine.
        notes: what a reader of figures from there should know.
    """

    device: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The machine and what is installed there, see :func:`edgecompile.board_runner.facts`; and ``device``."""

    @abstractmethod
    def fingerprint(self, versions: Mapping[str, str], engine_options: Mapping[str, Any]) -> Fingerprint:
        """See :func:`edgecompile.fingerprint.fingerprint`."""

    @abstractmethod
    def require_locked(self, mode: str | int | None, clocks: bool = True, *, refuse: bool = True) -> tuple[str, ...]:
        """See :func:`edgecompile.conditions.require_locked`."""

    @abstractmethod
    def probe(self) -> list[Capability]:
        """Runtimes and providers that work there."""

    @abstractmethod
    def add(self, path: str | Path, progress: Callable[[int, int], object] | None = None) -> str:
        """Bring a bundle there, unless it is there.

        Args:
            path: the bundle.
            progress: told how many bytes are there, and how many in all.

        Returns:
            its key.

        Raises:
            InputError: it is no bundle, or damaged.
            EnvironmentMissing: it was prepared and holds no engine yet.
        """

    @abstractmethod
    def pair(
        self,
        arms: Mapping[str, str],
        *,
        seconds: float = 0.2,
        seed: int = 0,
        block_ms: float = 15.0,
        min_calls: int = 2,
        clock: str = "",
    ) -> tuple[dict[str, Samples], str]:
        """One session: every arm opened anew, in random order, and timed interleaved.

        Args:
            arms: name of the arm -> key of its bundle; the same key may have several names.
            seconds, seed, block_ms, min_calls, clock: see :class:`edgecompile.board_runner.Plan`.

        Returns:
            the samples by name, and what disturbed the machine meanwhile, ``""`` for nothing.
        """

    @abstractmethod
    def outputs(self, key: str, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """What the engine computes, by name; on the bundle's own inputs without ``feeds``."""

    @abstractmethod
    def phases(self, key: str, calls: int = 100) -> dict[str, Any] | None:
        """Compute, enqueue and end-to-end time, see :func:`edgecompile.board_runner.phases`."""

    @abstractmethod
    def profile(self, key: str, repeats: int = 10) -> dict[str, Any]:
        """What the profiler of the runtime tells, see :func:`edgecompile.board_runner.profile`."""

    @abstractmethod
    def footprint(self, key: str) -> Footprint:
        """Cold start and memory of the engine, in a fresh process."""

    def session(self, arms: Mapping[str, str], **plan: Any) -> dict[str, Samples]:
        """The samples of :meth:`pair`, however disturbed."""
        return self.pair(arms, **plan)[0]

    def peak_memory(self, key: str) -> int:
        """Resident memory in bytes that runtime and engine take at most; the median of three fresh processes."""
        return int(np.median([self.footprint(key).peak for _ in range(3)]))

    @abstractmethod
    def close(self) -> None:
        """Free what was needed."""

    def __enter__(self: _Place) -> _Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_board(device: str | None, options: Sequence[str] = (), say: Callable[[str], object] | None = None) -> Place:
    """The place to measure at, a context manager: a board by its URL, or this machine.

    Args:
        device: ``ssh://...``, see :meth:`Device.parse`, or ``rpc://...`` for boards of the target ``tvm``, see
            :mod:`edgecompile.targets.tvm.rpc`; None for this machine.
        options: more options for ssh, before those of the environment variable.
        say: told what is waited for.

    Raises:
        InputError: ``device`` is malformed.
        EnvironmentMissing: there is no ssh, the board does not answer or refuses, or lacks Python or numpy.
    """
    if device is None:
        return LocalBoard()
    if device.startswith(RPC):
        from edgecompile.targets.tvm import rpc

        return rpc.RpcBoards(rpc.Address.parse(device), say)
    return Board(Device.parse(device), options)


@contextlib.contextmanager
def open_target(name: str, device: str, say: Callable[[str], object]) -> Iterator[Target]:
    """A target that builds for this machine, or for a board and runs its engines there.

    Args:
        name: of the target.
        device: ``rpc://...``; ``""`` for this machine.
        say: told what is waited for.

    Raises:
        InputError: the target cannot build for the device.
    """
    if not device:
        yield registry.target(name)
        return
    if not device.startswith(RPC):
        raise InputError(
            f"nothing can be built for {device}", "a board behind ssh only measures",
            "build with --prepare and finish on the board; or build for its CPU and bench with --device",
        )  # fmt: skip
    if name != "tvm":
        raise InputError(f"{device} does not go with target {name}", "TVM's RPC runs the libraries of TVM",
                         "give --target tvm")  # fmt: skip
    from edgecompile.targets.tvm import rpc

    farm = rpc.Farm(rpc.Address.parse(device), say)
    try:
        yield rpc.RpcTarget(farm)
    finally:
        farm.close()


# -- this machine ------------------------------------------------------------------------------------------------------


class LocalBoard(Place):
    """This machine; sessions run in this process."""

    device = ""

    def __init__(self):
        self._bundles: dict[str, Bundle] = {}
        self._conditions = board_runner.Conditions()

    def facts(self) -> dict[str, Any]:
        """See :class:`Place`."""
        return {**board_runner.facts(), "device": self.device}

    def fingerprint(self, versions: Mapping[str, str], engine_options: Mapping[str, Any]) -> Fingerprint:
        """See :class:`Place`."""
        return board_runner.this_place(versions, engine_options)

    def require_locked(self, mode: str | int | None, clocks: bool = True, *, refuse: bool = True) -> tuple[str, ...]:
        """See :class:`Place`."""
        return conditions.require_locked(mode, clocks, refuse=refuse)

    def probe(self) -> list[Capability]:
        """See :class:`Place`."""
        return [Capability(**c) for c in board_runner.probe()]

    def add(self, path: str | Path, progress: Callable[[int, int], object] | None = None) -> str:
        """See :class:`Place`."""
        bundle = _complete(path)
        key = hashlib.sha256(_parcel(bundle)).hexdigest()
        self._bundles[key] = bundle
        return key

    def pair(self, arms: Mapping[str, str], **plan: Any) -> tuple[dict[str, Samples], str]:
        """See :class:`Place`."""
        return self._conditions.session({name: self._bundles[key] for name, key in arms.items()}, Plan(**plan))

    def outputs(self, key: str, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """See :class:`Place`."""
        return board_runner.run_once(self._bundles[key], feeds)

    def phases(self, key: str, calls: int = 100) -> dict[str, Any] | None:
        """See :class:`Place`."""
        return board_runner.phases(self._bundles[key], calls)

    def profile(self, key: str, repeats: int = 10) -> dict[str, Any]:
        """See :class:`Place`."""
        return board_runner.profile(self._bundles[key], repeats)

    def footprint(self, key: str) -> Footprint:
        """See :class:`Place`."""
        return board_runner.footprint(self._bundles[key].path)

    def close(self) -> None:
        """See :class:`Place`."""
        self._conditions.close()


# -- a board -----------------------------------------------------------------------------------------------------------


class _LostConnection(Exception):
    """The connection ended before the answer was complete; the text says what ssh said."""


class _NoConnection(EnvironmentMissing):
    """No connection could be made."""


class Board(Place):
    """A board behind ssh; connected from its making on.

    A connection that is lost is made again and the request repeated; a session that was under way starts over, those
    before it are with the caller already.

    Raises:
        EnvironmentMissing: also from every method: ssh is missing; the board cannot be reached, refuses, or is
            lost for good; or it lacks something, with what installs it.
    """

    def __init__(self, device: Device, options: Sequence[str] = ()):
        self.device, self._device = str(device), device
        self._options = [*options, *shlex.split(os.environ.get(SSH_OPTIONS, ""))]
        self._paths: dict[str, Path] = {}
        self._channel: _Channel | None = _Channel(device, self._options)
        try:
            self.facts()  # says at once if numpy is missing
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection, and with it what runs on the board."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def facts(self) -> dict[str, Any]:
        """See :class:`Place`."""
        return {**_plain(self._ask("facts")[0]), "device": self.device}

    def fingerprint(self, versions: Mapping[str, str], engine_options: Mapping[str, Any]) -> Fingerprint:
        """See :class:`Place`."""
        told = self._ask("fingerprint", versions=dict(versions), options=dict(engine_options))[0]
        try:
            return Fingerprint.from_json(_plain(told))
        except InputError as error:
            raise self._nonsense("a fingerprint", error.why) from None

    def require_locked(self, mode: str | int | None, clocks: bool = True, *, refuse: bool = True) -> tuple[str, ...]:
        """See :class:`Place`."""
        told = self._ask("locked", mode=mode, clocks=clocks, refuse=refuse)[0]
        with self._checked("whether its clocks are locked"):
            return tuple(clean(str(text)) for text in told["wrong"])

    def probe(self) -> list[Capability]:
        """See :class:`Place`."""
        told = self._ask("probe")[0]
        with self._checked("a list of what is there"):
            return [Capability(**c) for c in _plain(told)["found"]]

    def add(self, path: str | Path, progress: Callable[[int, int], object] | None = None) -> str:
        """See :class:`Place`; what the engine does not need to run stays here."""
        bundle = _complete(path)
        manifest = _parcel(bundle)
        key, files = hashlib.sha256(manifest).hexdigest(), json.loads(manifest)["files"]
        self._paths[key] = bundle.path
        total = sum(entry["bytes"] for entry in files.values())
        for _ in range(2):  # a piece that a power cut spoiled is found at the end, and sent again
            state = self._ask("begin", payload=manifest, key=key)[0]
            with self._checked("the state of a copy"):
                if state["complete"]:
                    return key
                there = {name: state["sizes"][name] for name in files}
                if not all(_is_size(there[name], entry["bytes"]) for name, entry in files.items()):
                    raise ValueError(f"it would hold {there}")
            done = 0
            for name, entry in files.items():
                self._send(key, bundle.path / name, there[name], entry["bytes"], done, total, progress)
                done += entry["bytes"]
            answer = self._ask("finish", payload=manifest, key=key)[0]
            with self._checked("the state of a copy"):
                damaged = [clean(str(name)) for name in answer["damaged"]]
            if not damaged:
                return key
        raise EnvironmentMissing(
            f"the copy of {bundle.path} on {self.device} is damaged",
            f"{', '.join(damaged)} has another digest there",
            "check the disk of the board, and that nobody changes the bundle meanwhile",
        )

    def _send(
        self,
        key: str,
        file: Path,
        offset: int,
        size: int,
        before: int,
        total: int,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        """One file from ``offset`` on."""
        setbacks = 0
        with open(file, "rb") as source:
            while offset < size:
                source.seek(offset)
                piece = source.read(min(_PIECE, size - offset))
                if not piece:
                    raise InputError(f"{file} became shorter while it was copied")
                reached: Any = self._ask("put", payload=piece, key=key, name=file.name, offset=offset)[0].get("size")
                setbacks += reached != offset + len(piece)  # it has lost a part that it had, as after a power cut
                if not _is_size(reached, offset + len(piece)) or setbacks > 3:
                    raise self._nonsense("the state of a copy", repr(reached))
                offset = int(reached)
                if progress is not None:
                    progress(before + offset, total)

    def pair(self, arms: Mapping[str, str], **plan: Any) -> tuple[dict[str, Samples], str]:
        """See :class:`Place`."""
        answer, content = self._ask("session", arms=dict(arms), plan=asdict(Plan(**plan)))
        with self._checked("samples"), tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
            path = Path(scratch) / "samples.npz"
            path.write_bytes(_bounded(content))
            try:
                found, _ = measure.load(path)
            except InputError as error:
                raise ValueError(error.why) from None
            if list(found) != list(arms):
                raise ValueError(f"of {', '.join(found)}")
            for name, one in found.items():
                _check_samples(name, one)
            return found, clean(answer["disturbed"])

    def outputs(self, key: str, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """See :class:`Place`."""
        _, content = self._ask("outputs", payload=b"" if feeds is None else board_runner.pack(feeds), key=key)
        with self._checked("outputs"):
            return board_runner.unpack(_bounded(content))

    def phases(self, key: str, calls: int = 100) -> dict[str, Any] | None:
        """See :class:`Place`."""
        told = self._ask("phases", key=key, calls=calls)[0]
        with self._checked("the times of an engine"):
            found = _plain(told["found"])
            if found is None:
                return None
            times = {name: float(found[name]) for name in ("compute", "enqueue", "end_to_end")}
            if not all(map(np.isfinite, times.values())):
                raise ValueError("they are no times")
            return times | {"calls": int(found["calls"]), "pinned": dict(found["pinned"])}

    def profile(self, key: str, repeats: int = 10) -> dict[str, Any]:
        """See :class:`Place`."""
        _, content = self._ask("profile", key=key, repeats=repeats)
        with self._checked("a profile"):
            found = json.loads(content)
            if not isinstance(found, dict):
                raise ValueError("it is not an object")
            return found

    def footprint(self, key: str) -> Footprint:
        """See :class:`Place`."""
        told = self._ask("footprint", key=key)[0]
        with self._checked("the footprint of an engine"):
            return Footprint(*(kind(told[name]) for name, kind in _FOOTPRINT.items()))

    def _ask(self, op: str, payload: bytes | memoryview = b"", **request: Any) -> tuple[dict[str, Any], bytes]:
        """One request, over a new connection where the old one is lost."""
        lost = ""
        for pause in (*_PAUSES, None):
            try:
                if self._channel is None:
                    self._channel = _Channel(self._device, self._options)
                return self._channel.ask({"op": op, **request}, payload)
            except _LostConnection as error:
                lost = str(error)
            except _NoConnection as error:
                lost = error.why
            except BaseException as error:  # an interrupt too: its answer must not be taken for the next request's
                if self._channel is not None and not self._channel.in_step:
                    self.close()
                if isinstance(error, EdgecompileError):
                    raise self._placed(error) from None
                raise
            self.close()
            if pause is not None:
                time.sleep(pause)
        raise EnvironmentMissing(
            f"the connection to {self.device} was lost {len(_PAUSES) + 1} times during {op!r}",
            lost,
            "check the network and the power of the board, then run it again: what was copied stays there",
        )

    def _placed(self, error: EdgecompileError) -> EdgecompileError:
        """The error with the bundles called as they are called here, not as their copies on the board."""

        def here(match: re.Match[str]) -> str:
            return str(self._paths.get(match[1], match[0]))

        return type(error)(*(_COPY.sub(here, text) for text in (error.what, error.why, error.fix)))

    @contextlib.contextmanager
    def _checked(self, what: str) -> Iterator[None]:
        """The other side is not trusted: whatever it answers instead of ``what`` is one clear error."""
        try:
            yield
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            EOFError,
            MemoryError,
            RecursionError,
            zipfile.BadZipFile,
        ) as error:
            raise self._nonsense(what, str(error)) from None

    def _nonsense(self, what: str, why: str) -> EnvironmentMissing:
        return EnvironmentMissing(f"{self.device} did not send {what}", clean(why))


_COPY = re.compile(r"\S*/bundles/([0-9a-f]{64})")
_FOOTPRINT = {"imports": float, "opening": float, "first_call": float, "baseline": int, "peak": int}


class _Channel:
    """One ssh process with the runner at its other end."""

    def __init__(self, device: Device, options: Sequence[str]):
        self._device, self._buffer, self._number = device, bytearray(), 0
        self._said, self.in_step = bytearray(), True
        program = shutil.which("ssh")
        if program is None:
            raise EnvironmentMissing(
                "there is no ssh client", "the program ssh is not on PATH", "install openssh-client"
            )
        boot = _BOOT.encode()
        settings = [part for one in (*_KEEP_ALIVE, *_PLAIN) for part in ("-o", one)]
        where = [*(["-p", str(device.port)] if device.port else []), *(["-l", device.user] if device.user else [])]
        # Runs in every shell. The working directory goes off the path: nothing that lies there is to be imported.
        start = f'{device.python} -c "import sys;sys.path.pop(0);exec(sys.stdin.buffer.read({len(boot)}))"'
        self._process = subprocess.Popen(
            [program, "-T", *options, *settings, *where, "--", device.host, start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._start(boot)
        except _LostConnection as error:
            reason = self._no_connection(str(error))
            self.close()
            raise reason from None
        except BaseException:
            self.close()
            raise

    def _start(self, boot: bytes) -> None:
        """Let the board run the runner, sending it if it is not there."""
        deadline = time.monotonic() + _START_SECONDS
        self._write(boot)
        kind, _, release = self._hear(deadline).partition(" ")
        numbers = re.fullmatch(r"(\d+)\.(\d+)", release)
        if kind != "python" or numbers is None or (int(numbers[1]), int(numbers[2])) < (3, 10):
            raise EnvironmentMissing(
                f"Python on {self._device} is too old",
                f"{self._device.python} there is {clean(release)}, and 3.10 is needed",
                "name a newer one: ssh://host/path/to/python3",
            )
        archive = runner()
        self._write(f"{hashlib.sha256(archive).hexdigest()} {len(archive)}".ljust(80).encode())
        said = self._hear(deadline)
        if said == "send":
            self._write(archive)
            said = self._hear(deadline)
        if said != "run":
            raise EnvironmentMissing(
                f"the runner could not be copied to {self._device}",
                "it has another digest there",
                "check the disk of the board",
            )

    def _hear(self, deadline: float) -> str:
        """What the first program says; whatever the login shell prints before is passed over."""
        skipped = 0
        while True:
            line = self._line(deadline, _NOISE_LIMIT)
            _, mark, said = line.partition(_MARK)
            if mark:
                return said.decode("ascii", "replace").strip()
            skipped += len(line)
            if skipped > _NOISE_LIMIT:
                raise _LostConnection("the login shell there prints too much")

    def ask(self, request: Mapping[str, Any], payload: bytes | memoryview) -> tuple[dict[str, Any], bytes]:
        """One request and its answer.

        Raises:
            _LostConnection: the connection ended.
            EdgecompileError: what the board reports.
        """
        self._number += 1
        self.in_step = False
        deadline = time.monotonic() + _ANSWER_SECONDS
        self._write(json.dumps({**request, "id": self._number, "bytes": len(payload)}).encode() + b"\n")
        self._write(payload)
        try:
            answer = json.loads(self._line(deadline, LINE_LIMIT))
            size = answer["bytes"]
            if answer["id"] != self._number or not _is_size(size, PAYLOAD_LIMIT):
                raise ValueError("it is not what was asked for")
            content = self._exactly(size, deadline)
            self.in_step = True
            if "crash" in answer:
                raise RuntimeError(f"the runner on {self._device} failed:\n{clean(answer['crash'])}")
            if "error" in answer:
                raise self._told(answer["error"])
            if not isinstance(answer["ok"], dict):
                raise ValueError("it is not an object")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EnvironmentMissing(
                f"{self._device} sent something that is not an answer", clean(str(error)), "is it running edgecompile?"
            ) from None
        return answer["ok"], content

    def _told(self, told: Mapping[str, Any]) -> EdgecompileError:
        error = board_runner.error_from({key: clean(str(value)) for key, value in told.items()})
        return type(error)(f"{error.what} (on {self._device})", error.why, error.fix)

    def _write(self, data: bytes | memoryview) -> None:
        assert self._process.stdin is not None
        left = memoryview(data)
        try:
            while left:
                left = left[self._process.stdin.write(left) :]
        except OSError:
            raise self._lost() from None

    def _line(self, deadline: float, limit: int) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > limit:
                raise _LostConnection("it sent a line without an end")
            self._fill(deadline)
        return self._take(end + 1)

    def _exactly(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._fill(deadline)
        return self._take(size)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _fill(self, deadline: float) -> None:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        if not select.select([handle], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise _LostConnection("it did not answer in time")
        piece = os.read(handle, 1 << 20)
        if not piece:
            raise self._lost()
        self._buffer += piece

    def _listen(self) -> None:
        """Keep the end of what ssh and the board write to standard error."""
        assert self._process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(self._process.stderr.fileno(), 1 << 16):
                self._said += piece
                del self._said[:-_TEXT_LIMIT]

    def _complaint(self) -> str:
        """What was written to standard error, once the process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._listener.join(1)
        return clean(bytes(self._said).decode(errors="replace"))

    def _lost(self) -> Exception:
        """Why there is no more to read: the connection is gone, or what ran over there ended by itself."""
        complaint = self._complaint()
        crashed = "Fatal Python error" in complaint
        if not crashed and _without_status(self._process):
            said = complaint.strip().splitlines() or [
                "ssh gave no reason; the runner may have been killed for want of memory"
            ]
            return _LostConnection(said[-1])
        if self._number == 0 and not crashed:
            return _LostConnection(complaint)
        return EnvironmentMissing(
            f"the runner on {self._device} ended in the middle of its work",
            complaint.strip() or f"its status is {self._process.returncode}",
            "out of memory there, or a defect of the runtime: try it on the board itself",
        )

    def _no_connection(self, reason: str) -> EnvironmentMissing:
        """Why the runner could not be started, from how ssh ended and what it said, or else for ``reason``."""
        if self._process.poll() is None:
            self._process.kill()
        complaint = self._complaint().strip() or reason
        device, status = self._device, self._process.returncode
        if status == 127 or (status == 126 and device.python in complaint):
            return EnvironmentMissing(
                f"there is no {device.python} on {device}",
                complaint,
                "install Python 3.10 or newer there, or name one: ssh://host/path/to/python3",
            )
        login = f"{device.user}@{device.host}" if device.user else device.host
        help_ = next((text for sign, text in _HELP if sign in complaint.lower()), "try it by hand: ssh {login}")
        what = "cannot connect to" if _without_status(self._process) else "Python does not start on"
        return _NoConnection(f"{what} {device}", complaint, help_.format(login=login))

    def close(self) -> None:
        """End the ssh process; the runner ends when its input does."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.join(1)
        if process.stderr is not None and not self._listener.is_alive():  # a shared connection may hold it open
            process.stderr.close()


def _without_status(process: subprocess.Popen[bytes]) -> bool:
    """True if ssh did not end with the status of the program there: it failed itself, was ended, or still runs."""
    return process.returncode is None or process.returncode < 0 or process.returncode == 255


# -- what travels ------------------------------------------------------------------------------------------------------


@functools.cache
def runner() -> bytes:
    """The runner as a zipapp; equal modules give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        travelling = [*_MODULES.items(), *(part for light in LIGHT.values() for part in light.modules.items())]
        for package, modules in travelling:
            folder = resources.files(package)
            for module in modules:
                content = folder.joinpath(f"{module}.py").read_bytes()
                archive.writestr(zipfile.ZipInfo(f"{package.replace('.', '/')}/{module}.py"), content)
        archive.writestr(zipfile.ZipInfo("__main__.py"), b"from edgecompile.board_runner import main\n\nmain()\n")
    return buffer.getvalue()


def _complete(path: str | Path) -> Bundle:
    """A bundle that holds an engine."""
    bundle = Bundle.open(path)
    if bundle.prepared:
        raise EnvironmentMissing(
            f"{bundle.path} holds no engine yet",
            str(bundle.manifest.get("missing", "it was prepared for another machine")),
            "copy it to the board, run `edgecompile build` on it there, and copy it back",
        )
    return bundle


def _parcel(bundle: Bundle) -> bytes:
    """The manifest of what a board needs of a bundle: engine and inputs, or the model where the engine has no file.

    It is a manifest by itself, and its digest names the copy: a report that is written again changes nothing.
    """
    engine = bundle.manifest["engine"]
    files = {
        name: entry
        for name, entry in bundle.manifest["files"].items()
        if name == PROBE or name in engine["files"] or (not engine["files"] and name.startswith(MODEL))
    }
    kept = {key: bundle.manifest[key] for key in ("schema", "target", "engine")}
    return json.dumps({**kept, "files": files}, sort_keys=True, indent=1).encode()


# -- what comes back ---------------------------------------------------------------------------------------------------


def clean(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Text from elsewhere, safe to print: no control characters but line ends and tabs, and not too long."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[-limit:].replace("\r\n", "\n"))


def _plain(value: Any) -> Any:
    """A JSON value whose texts are safe to print."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {clean(k): _plain(v) for k, v in value.items()}
    return value


def _is_size(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _bounded(content: bytes) -> bytes:
    """An archive that does not unpack to more than a message may hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > PAYLOAD_LIMIT:
            raise ValueError("it would unpack to more than 1 GiB")
    return content


def _check_samples(name: str, samples: Samples) -> None:
    """Refuse arrays that are not what :class:`edgecompile.measure.Samples` says."""
    seconds, rounds = samples.seconds, samples.rounds
    sound = (
        seconds.dtype == np.float64
        and rounds.dtype.kind in "iu"
        and seconds.ndim == 1
        and seconds.shape == rounds.shape
        and seconds.size > 0
        and bool(np.isfinite(seconds).all() and (seconds >= 0).all() and (np.diff(rounds) >= 0).all())
        and samples.label == name
        and samples.sessions is None
        and samples.clock in (*measure.CLOCKS, "cuda_event")
        and type(samples.threads) is int
        and all(isinstance(x, (int, float)) for x in (samples.overhead, *samples.load))
    )
    if not sound:
        raise ValueError(f"those of {name!r} are malformed")
