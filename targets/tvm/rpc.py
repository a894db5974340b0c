"""Boards behind TVM's RPC tracker: build for them, run, measure and tune on them, with nothing of ours installed there.

A tracker knows the boards; each board runs a server that registers under a key, and boards of one key are of one kind.
Whoever asks the tracker for a key is lent one of them, or waits until one is free. On one machine of the network, and
then on every board, with ``pip install 'apache-tvm[rpc]==0.27.*' apache-tvm-ffi==0.1.14.post1``::

    python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190
    python -m tvm.exec.rpc_server --tracker TRACKER:9190 --key pi5 --port 9090

    edgecompile build model.py --target tvm --device rpc://TRACKER:9190/pi5
    edgecompile bench build/model --device rpc://TRACKER:9190/pi5

**The protocol has no authentication and no encryption.** Whoever reaches a server may run any code and write any file
as its user; whoever reaches the tracker may be lent every board. Keep both in a network where all are trusted, as an
unprivileged user, or bind them to ``127.0.0.1`` and come through an ssh tunnel. What boards send back is data only.

A library is compiled here, for the CPU that the board names, and uploaded. TVM's ``time_evaluator`` times each call on
the board, by the board's wall clock, and the library itself times its kernels: the network is in no figure. A board
that is lost in the middle of some work is replaced by another one of its key, where the work starts over.

A search for kernels (``--tune``) compiles here too and times on all boards of the key that the tracker lends. The
untuned library is uploaded to each of them once, and for each round the weights and the code that was compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import queue
import random
import re
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgecompile import board_runner, measure, oracle
from edgecompile.board_runner import Footprint, Plan
from edgecompile.bundle import Bundle
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.fingerprint import Fingerprint
from edgecompile.graph import Graph, named
from edgecompile.measure import Ratio, Samples
from edgecompile.remote import Place, clean
from edgecompile.target import BoardTarget, Capability, Engine, EngineManifest, LayerTime
from edgecompile.targets.tvm import ENGINE, TvmTarget, kernels_of, runtime, tune
from edgecompile.targets.tvm import options as tvm_options
from edgecompile.targets.tvm.engine import kernel_times, layers, set_pool, stamps
from edgecompile.targets.tvm.lower import Compiled
from edgecompile.targets.tvm.options import Options

PORT = 9190
_URL = re.compile(r"rpc://([A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/([\w.+-]+)", re.ASCII)
_FEATURE = re.compile(r'"([\w.-]+)": (?:T\.bool\()?(True|False)')
_CPU_OPTIONS = ("mtriple", "mcpu", "mattr")
_CONNECT_SECONDS, _PING_SECONDS, _POLL_SECONDS = 15.0, 10.0, 2.0
_WAIT_SECONDS = 600.0  # for a busy board
_LEASE_SECONDS = 7200.0  # after which a server takes the board back from a client that is gone
_WORK_SECONDS = 900.0  # longer than any work takes; a board without power would be waited for forever
_LOSSES = 3  # boards that one work may lose: it may be the library that kills them
_SESSIONS, _LEAST_CALLS = 6, 12
_REPEATS = 10  # of a model in a round
_NOTE = "timed on the board by TVM's time_evaluator, on the wall clock there: the network is in no figure"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """A key at a tracker.

    Attributes:
        host, port: of the tracker.
        key: that the boards registered under.
    """

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``rpc://HOST[:PORT]/KEY``; the port is 9190 by default.

        Raises:
            InputError: it is something else.
        """
        match = _URL.fullmatch(text)
        if not match or int(match[2] or PORT) not in range(1, 65536):
            raise InputError(
                f"{text!r} is not a device", "it has the form rpc://TRACKER[:PORT]/KEY", "e.g. rpc://tracker:9190/pi5"
            )
        return cls(match[1].strip("[]"), int(match[2] or PORT), match[3])

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"rpc://{host}:{self.port}/{self.key}"


@dataclass(frozen=True)
class Facts:
    """What a board tells about itself.

    Attributes:
        machine: ``x86_64`` or ``aarch64``; ``""`` where the server has no compiler to ask.
        cpu: as LLVM calls it.
        mattr: its features as the option ``mattr``.
        features: its features as Linux calls them, those that matter here.
        cpus, cores: processors that are online, and physical cores among them; 0 if it does not tell.
        governor, board: of the clocks; name in the device tree.
    """

    machine: str = ""
    cpu: str = ""
    mattr: str = ""
    features: tuple[str, ...] = ()
    cpus: int = 0
    cores: int = 0
    governor: str = ""
    board: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As :func:`edgecompile.measure.machine` calls them; what cannot be known is left out."""
        known = {"arch": self.machine, "cpu": self.cpu, "features": list(self.features), "cpus": self.cpus}
        known |= {"cores": self.cores, "governor": self.governor, "board": self.board}
        return {name: value for name, value in known.items() if value}


@dataclass(frozen=True)
class Library:
    """A compiled model and how to call it.

    Attributes:
        path: the library.
        inputs: names of the parameters of ``main``, in order.
        outputs: names of its results.
        threads: that one operator takes.
        kernels: how many it runs.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    threads: int
    kernels: int

    @classmethod
    def of(cls, path: Path, threads: int, kernels: Sequence[Mapping[str, Any]], graph: Graph) -> Library:
        """That of a graph."""
        inputs, outputs = (tuple(str(t.name) for t in tensors) for tensors in (graph.inputs, graph.outputs))
        return cls(path, inputs, outputs, threads, len(kernels))

    @classmethod
    def of_engine(cls, folder: Path, manifest: EngineManifest, graph: Graph) -> Library:
        """That of an engine.

        Raises:
            InputError: the folder does not tell its kernels.
        """
        return cls.of(folder / ENGINE, tvm_options.parse(manifest.options).threads, kernels_of(folder), graph)


class _Unreachable(Exception):
    """No board, or a board that is lost; the text says why."""


# -- a board that is lent ----------------------------------------------------------------------------------------------


class Link:
    """A session on one board.

    Attributes:
        name: address of the board.
    """

    def __init__(self, name: str, session: Any):
        self.name, self._session = name, session
        self._uploaded: set[str] = set()
        self._threads = 0
        self._facts: Facts | None = None

    def alive(self) -> bool:
        """Whether the board answers."""
        try:
            _within(_PING_SECONDS, lambda: self._session.get_function("runtime.config_threadpool"))
        except Exception:  # whatever it is, it is no answer
            return False
        return True

    def close(self) -> None:
        """End the session; also where something that was opened in it is still referred to."""
        with contextlib.suppress(Exception):  # it may have ended
            _within(_PING_SECONDS, self._session.get_function("CloseRPCConnection"))

    def facts(self) -> Facts:
        """What the board tells about itself; it is asked once."""
        self._facts = self._facts or self._told()
        return self._facts

    def _told(self) -> Facts:
        cores = [measure.core(cpu, self._read) for cpu in self._cpus()]
        facts = Facts(
            cpus=len(cores),
            cores=len(set(cores)),
            governor=self._read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            board=self._read("/sys/firmware/devicetree/base/model"),
        )
        try:
            triple, cpu = (str(self._session.get_function(f"target.llvm_get_system_{x}")()) for x in ("triple", "cpu"))
            flags = self._session.get_function("tvm.codegen.llvm.GetHostCPUFeatures")()
            printed = str(self._session.get_function("ffi.ReprPrint")(flags))
        except AttributeError:  # there is a runtime only
            return facts
        machine = clean(triple).partition("-")[0]
        names = tvm_options._LLVM_NAMES.get(machine, {})
        told = {name: value == "True" for name, value in _FEATURE.findall(printed)}
        # What LLVM does not tell of the CPU at hand, it knows of the CPU by its name.
        mattr = ",".join(f"{'+' if told[name] else '-'}{name}" for name in names.values() if name in told)
        made = {"kind": "llvm", "mtriple": f"{machine}-linux-gnu", "mcpu": clean(cpu), "mattr": mattr.split(",")}
        found: tuple[str, ...] = ()
        if names:
            from tvm.target import Target, codegen

            target = Target({k: v for k, v in made.items() if v != [""]})
            found = tuple(linux for linux, name in names.items() if codegen.target_has_features(name, target))
        return replace(facts, machine=machine, cpu=clean(cpu), mattr=mattr, features=found)

    def _cpus(self) -> Iterator[int]:
        for run in filter(None, self._read("/sys/devices/system/cpu/online").split(",")):
            first, _, last = run.partition("-")
            yield from range(int(first), int(last or first) + 1)

    def _read(self, path: str) -> str:
        """A small file of the board's; ``""`` if there is none. The kernel's files claim to be larger than they are."""
        try:
            content = bytes(self._session.download(path))
        except Exception as error:
            _raise_if_lost(error)
            return ""
        return clean(content.partition(b"\0")[0].decode(errors="replace")).strip()

    def open(self, library: Library, module: Any = None) -> Any:
        """A virtual machine of its own on a library, in the right pool.

        Args:
            library: it is uploaded if it is not there.
            module: what is loaded of it, if it is.
        """
        from tvm import relax

        if library.threads > 1 and self._threads != library.threads:
            set_pool(self._session.get_function, library.threads, measure.for_threads(self._cpus(), self._read))
            self._threads = library.threads
        return relax.VirtualMachine(module or self.module(library.path), self._session.cpu())

    def module(self, path: Path) -> Any:
        """A library, loaded; it is uploaded if it is not there."""
        name = _name(path)
        if name not in self._uploaded:  # it may be loaded, and to write over a loaded library crashes the server
            self._session.upload(str(path), name)
            self._uploaded.add(name)
        return self._session.load_module(name)

    def added(self, path: Path, base: Path) -> Any:
        """A library that is used once, loaded; the kernels that it lacks are taken from another one."""
        name = _name(path)
        self._session.upload(str(path), name)
        loaded = self._session.load_module(name)
        self._session.remove(name)  # its code stays where it is loaded, and a long search fills no disk
        loaded.import_module(self.module(base))
        return loaded

    def tensors(self, values: Sequence[np.ndarray]) -> list[Any]:
        """Arrays, copied to the board."""
        import tvm

        return [tvm.runtime.tensor(np.ascontiguousarray(value), self._session.cpu()) for value in values]

    def run(self, library: Library, machine: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        machine.set_input("main", *self.tensors([feeds[name] for name in library.inputs]))
        machine.invoke_stateful("main")
        result = machine.get_outputs("main")
        values = list(result) if isinstance(result, tuple) else [result]
        return {name: value.numpy() for name, value in zip(library.outputs, values, strict=True)}

    def timer(self, library: Library, machine: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """Executes the library twice and returns the seconds of the second time, on the board's wall clock."""
        arguments = self.tensors([feeds[name] for name in library.inputs])
        machine.save_function("main", "timed", *arguments, include_return=False)
        once = machine.time_evaluator("timed", self._session.cpu(), number=1, repeat=1)
        return lambda: float(once().results[0])

    def profile(self, library: Library, inputs: Sequence[Any], repeats: int, module: Any = None) -> dict[str, Any]:
        """What :func:`edgecompile.targets.tvm.engine.layers` takes.

        Args:
            library, module: as for :meth:`open`.
            inputs: of the model, on the board.
            repeats: profiled runs; each follows another one, since a CPU that waited for the network is slow at first.

        Raises:
            InputError: the library was built before it could tell.
        """
        machine = self.open(library, module)
        twice = machine.time_evaluator("invoke_stateful", self._session.cpu(), number=1, repeat=1)
        arguments = [*inputs, *self.tensors([stamps(library.kernels)])]
        return {"microseconds": np.median(kernel_times(machine, arguments, twice, repeats), axis=0).tolist()}


def _name(path: Path) -> str:
    """What a library is called on the boards."""
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}.so"


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises; it is left to itself when it takes longer.

    Raises:
        _Unreachable: it took longer.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((True, work()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        done, value = answers.get(timeout=seconds)
    except queue.Empty:
        raise _Unreachable(f"it did not answer within {seconds:.0f} s") from None
    if not done:
        raise value
    return value


def _raise_if_lost(error: Exception) -> None:
    """Raise again what is not an error that the board itself reports."""
    import tvm.error

    if not isinstance(error, tvm.error.RPCError):
        raise error


def _why(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return clean(lines[-1] if lines else type(error).__name__, 300)


# -- the boards of a key -----------------------------------------------------------------------------------------------


class Farm:
    """The boards of one key: lends one at a time and goes on with another where that one is lost.

    Args:
        address: of the tracker, and the key.
        say: told what is waited for, and what was lost.
        priority: the tracker serves higher ones first.
        wait: seconds to wait while all boards are busy.
    """

    def __init__(
        self,
        address: Address,
        say: Callable[[str], object] | None = None,
        priority: int = 1,
        wait: float = _WAIT_SECONDS,
    ):
        runtime()
        self.address, self._say, self._priority, self._wait = address, say or (lambda _: None), priority, wait
        self.losses: list[str] = []
        self._link: Link | None = None

    def run(self, work: Callable[[Link], _T], losses: int = _LOSSES) -> _T:
        """What ``work`` returns on a board; it starts over on another one where a board is lost.

        Args:
            work: what to do; everything it opens is its own.
            losses: boards that may be lost on the way.

        Raises:
            EnvironmentMissing: no board is left, or none became free.
            InputError: the work fails on the board.
        """
        why = ""
        for _ in range(losses):
            try:
                link = self.link()
            except _Unreachable as error:
                raise self.none_left(str(error), why) from None
            try:
                return _within(_WORK_SECONDS, lambda link=link: work(link))
            except EdgecompileError:
                raise
            except Exception as error:  # TVM raises types of many kinds
                if not isinstance(error, _Unreachable) and link.alive():
                    raise InputError(f"TVM cannot do this on {link.name}", _why(error)) from None
                why = _why(error)
                self._link = None
                self.losses.append(f"the board {link.name} was lost ({why}); the work went on on another {self.key}")
                self._say(self.losses[-1])
        raise EnvironmentMissing(
            f"the same work lost {losses} boards of {self.address}",
            why,
            "look at the output of their servers: the library may crash them",
        )

    @property
    def key(self) -> str:
        """Of the boards."""
        return self.address.key

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of figures from these boards should know."""
        return _NOTE, *self.losses

    @property
    def holds(self) -> bool:
        """Whether a board is lent."""
        return self._link is not None

    def link(self) -> Link:
        """The board that is lent, or else one that is lent now.

        Raises:
            _Unreachable: there is none.
            EnvironmentMissing: the tracker cannot be reached.
        """
        if self._link is None:
            with _Tracker(self.address) as tracker:
                self._link = tracker.borrow(self._say, self._priority, self._wait)
        return self._link

    def count(self) -> int:
        """How many boards have registered.

        Raises:
            EnvironmentMissing: the tracker cannot be reached.
        """
        with _Tracker(self.address) as tracker:
            return tracker.boards()[0]

    def none_left(self, reason: str, lost: str = "") -> EnvironmentMissing:
        """The error where there is no board, or none is left."""
        what = f"no board of {self.address} is left" if lost else f"there is no board at {self.address}"
        return EnvironmentMissing(
            what, reason + (f"; the last one was lost: {lost}" if lost else ""),
            f"start one: python -m tvm.exec.rpc_server --tracker {self.address.host}:{self.address.port} "
            f"--key {self.key}",
        )  # fmt: skip

    def close(self) -> None:
        """Give the board back."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def facts(self) -> Facts:
        """What the board tells about itself."""
        return self.run(lambda link: link.facts())

    def fitted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the target, made to fit the board: its CPU where none is named, its cores for ``threads=auto``.

        Raises:
            InputError: a GPU is asked for.
            EnvironmentMissing: the board does not tell its CPU, or lacks something that the options ask for.
        """
        if given.get("arch"):
            raise InputError(
                f"arch={given['arch']} does not go with {self.address}", "these boards run libraries for their CPU",
                "leave it out, or build the library on the board",
            )  # fmt: skip
        facts, options = self.facts(), dict(given)
        if not any(options.get(name) for name in _CPU_OPTIONS):
            if not facts.machine:
                raise EnvironmentMissing(
                    f"the boards of {self.address} do not tell their CPU", "their servers run TVM without its compiler",
                    "name it, e.g. --option mtriple=aarch64-linux-gnu --option mcpu=cortex-a78",
                )  # fmt: skip
            other = facts.machine != platform.machine()
            options |= {"mcpu": facts.cpu, "mattr": facts.mattr}
            options |= {"mtriple": f"{facts.machine}-linux-gnu"} if other else {}
        if str(options.get("threads", "auto")) == "auto" and facts.cores:
            options["threads"] = facts.cores
        self._require(tvm_options.device(tvm_options.parse(options)), facts)
        return options

    def require_fit(self, manifest: EngineManifest) -> None:
        """Refuse a library that the board cannot run.

        Raises:
            EnvironmentMissing: it is one, or it is not known whether it is.
        """
        facts = self.facts()
        if not facts.machine and not any(manifest.options.get(name) for name in _CPU_OPTIONS):
            raise EnvironmentMissing(
                "the library was built for this machine",
                f"the boards of {self.address} do not tell their CPU",
                f"build it again: edgecompile build model.onnx --target tvm --device {self.address} --option mcpu=...",
            )
        self._require(manifest.device, facts)

    def _require(self, device: str, facts: Facts) -> None:
        have = {facts.machine, *facts.features}
        if facts.machine and (missing := [part for part in device.split() if part not in have]):
            raise EnvironmentMissing(
                f"the boards of {self.address} are of another kind",
                f"the library needs {', '.join(missing)}, and the CPU there, {facts.cpu}, lacks that",
                f"build it for them: edgecompile build model.onnx --target tvm --device {self.address}",
            )


class _Tracker:
    """One connection to a tracker; a context manager."""

    def __init__(self, address: Address):
        from tvm.rpc import base

        self._address = address
        try:
            self._socket = socket.create_connection((address.host, address.port), _CONNECT_SECONDS)
            self._socket.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(self._socket, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise OSError("what answers there is no tracker")
        except OSError as error:
            raise EnvironmentMissing(
                f"no tracker answers at {address.host}:{address.port}", error.strerror or str(error),
                f"start it there: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {address.port}",
            ) from None  # fmt: skip

    def __enter__(self) -> _Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _ask(self, *request: Any) -> Any:
        from tvm.rpc import base

        try:
            base.sendjson(self._socket, list(request))
            code, value = base.recvjson(self._socket)
        except (OSError, ValueError, TypeError) as error:
            raise EnvironmentMissing(
                f"the tracker of {self._address} ended", clean(str(error)), "start it anew"
            ) from None
        return value if code == base.TrackerCode.SUCCESS else None

    def boards(self) -> tuple[int, int]:
        """How many boards of the key there are, and how many of them are free."""
        from tvm.rpc import base

        told = self._ask(base.TrackerCode.SUMMARY) or {}
        names = [str(entry.get("key")) for entry in told.get("server_info", [])]
        free = told.get("queue_info", {}).get(self._address.key, {}).get("free", 0)
        return names.count(f"server:{self._address.key}"), int(free)

    def borrow(self, say: Callable[[str], object], priority: int, wait: float) -> Link:
        """A board of the key, as soon as one is free.

        Raises:
            _Unreachable: there is none, or none that is free or answers.
        """
        from tvm import rpc
        from tvm.rpc import base

        deadline, tried = time.monotonic() + wait, ""
        while time.monotonic() < deadline:
            there, free = self.boards()
            if not there:
                raise _Unreachable(tried or "none has registered under this key")
            if not free:
                say(f"all {there} boards of {self._address} are busy, waiting for one")
            base.sendjson(self._socket, [base.TrackerCode.REQUEST, self._address.key, "", priority])
            while not select.select([self._socket], [], [], min(_POLL_SECONDS, max(deadline - time.monotonic(), 0)))[0]:
                if time.monotonic() >= deadline:
                    raise _Unreachable(f"none became free within {wait:.0f} s")
                with _Tracker(self._address) as other:
                    if not other.boards()[0]:
                        raise _Unreachable("the last one has gone while it was waited for")
            try:
                _, (host, port, key) = base.recvjson(self._socket)
                session = _within(
                    _CONNECT_SECONDS,
                    lambda host=host, port=port, key=key: rpc.connect(host, port, key, session_timeout=_LEASE_SECONDS),
                )
            except Exception as error:  # a board that has gone and that the tracker still knows
                tried = f"the board does not answer: {_why(error)}"
                continue
            return Link(f"{clean(str(host))}:{port}", session)
        raise _Unreachable(tried or f"none became free within {wait:.0f} s")


# -- engines on boards -------------------------------------------------------------------------------------------------


class RpcEngine(Engine):
    """A library on a board; :attr:`clock` is the board's wall clock, which :meth:`timer` reads."""

    def __init__(self, manifest: EngineManifest, farm: Farm, folder: Path, graph: Graph):
        self._library = Library.of_engine(folder, manifest, graph)
        self.manifest, self.clock, self.threads = manifest, "wall", self._library.threads
        self._farm, self._folder, self._graph = farm, folder, graph

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`edgecompile.target.Engine.run`.

        Raises:
            InputError: an input is missing, unknown or of the wrong type or shape, or a kernel fails on it.
            EnvironmentMissing: no board is left.
        """
        oracle.check_feeds(self._graph, feeds)
        return self._farm.run(lambda link: link.run(self._library, link.open(self._library), feeds))

    def call(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """See :meth:`edgecompile.target.Engine.call`; who times this times the network too: see :meth:`timer`."""
        return lambda: self.run(feeds)

    def layers(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[LayerTime]:
        """See :meth:`edgecompile.target.Engine.layers`; by the clock of the board.

        Raises:
            InputError, EnvironmentMissing: as :meth:`run`; or the library was built before it could tell.
        """
        oracle.check_feeds(self._graph, feeds)
        profile = self._farm.run(lambda link: _profile(link, self._library, feeds, repeats))
        return layers(kernels_of(self._folder), profile, self._graph)


def _profile(link: Link, library: Library, feeds: Mapping[str, np.ndarray], repeats: int) -> dict[str, Any]:
    return link.profile(library, link.tensors([feeds[name] for name in library.inputs]), repeats)


class RpcTarget(TvmTarget, BoardTarget):
    """The target ``tvm`` for the boards of a farm."""

    def __init__(self, farm: Farm):
        self._farm = farm

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know."""
        return self._farm.notes

    def machine(self) -> dict[str, Any]:
        """The board, as :func:`edgecompile.measure.machine` tells of this machine."""
        return self._farm.facts().as_dict()

    def build(
        self, graph: Graph, folder: Path, options: Mapping[str, Any], say: Callable[[str], None] | None = None
    ) -> Engine:
        """See :meth:`edgecompile.target.Target.build`; for the CPU of the board."""
        manifest = super().build(graph, folder, self._farm.fitted(options), say).manifest
        return RpcEngine(manifest, self._farm, folder, named(graph))

    def _runner(
        self, graph: Graph, chosen: Options, opened: tune.Opened, say: Callable[[str], None] | None
    ) -> tune.Runner:
        self._farm.close()  # it is one of those that the search is lent
        return RpcRunner(self._farm, graph, chosen, say)

    def load(self, folder: Path, manifest: EngineManifest, graph: Graph) -> Engine:
        """See :meth:`edgecompile.target.Target.load`."""
        self._farm.require_fit(manifest)
        return RpcEngine(manifest, self._farm, folder, named(graph))

    def measured(
        self,
        arms: Mapping[str, tuple[Graph, Path, EngineManifest]],
        feeds: Mapping[str, np.ndarray],
        seconds: float,
        seed: int,
        progress: Callable[[float], object],
    ) -> dict[str, Samples]:
        """See :meth:`edgecompile.target.BoardTarget.measured`."""
        libraries = {name: Library.of_engine(place, made, graph) for name, (graph, place, made) in arms.items()}
        return _sessions(self._farm, libraries, feeds, seconds, _SESSIONS, seed, progress)


def _sessions(
    farm: Farm,
    libraries: Mapping[str, Library],
    feeds: Mapping[str, np.ndarray],
    seconds: float,
    sessions: int,
    seed: int = 0,
    progress: Callable[[float], object] = lambda _: None,
) -> dict[str, Samples]:
    """Time libraries in so many sessions, see :meth:`RpcTarget.measured`."""
    inputs, runs = dict.fromkeys(libraries, feeds), []
    for number in range(sessions):
        plan = Plan(seconds / sessions, min_calls=-(-_LEAST_CALLS // sessions), seed=seed + number)
        runs.append(farm.run(lambda link, plan=plan: _session(link, libraries, inputs, plan)))
        progress((number + 1) / sessions)
    return {name: measure.joined([run[name] for run in runs]) for name in libraries}


def _session(
    link: Link, libraries: Mapping[str, Library], feeds: Mapping[str, Mapping[str, np.ndarray]], plan: Plan
) -> dict[str, Samples]:
    """Open every library anew, in random order, and time them interleaved; every timed call follows an untimed one."""
    spent = [0.0]  # seconds on the board's clock, which stands still while the network is at work
    calls: dict[str, Callable[[], object]] = {}
    for name in random.Random(plan.seed).sample(list(libraries), len(libraries)):
        library = libraries[name]
        calls[name] = board_runner._adding(link.timer(library, link.open(library), feeds[name]), spent)
    samples = measure.interleave(
        {name: calls[name] for name in libraries},
        "wall",
        now=lambda: int(spent[0] * 1e9),
        seconds=plan.seconds,
        min_calls=plan.min_calls,
        block_ms=plan.block_ms,
        seed=plan.seed,
    )
    # The load of this machine says nothing, and that of the board cannot be known.
    return {n: replace(one, threads=libraries[n].threads, load=(0.0, 0.0)) for n, one in samples.items()}


class RpcBoards(Place):
    """Where bundles of the target ``tvm`` are measured: a board of a key."""

    def __init__(self, address: Address, say: Callable[[str], object] | None = None):
        self.device, self._farm = str(address), Farm(address, say)
        self._known: dict[str, tuple[Library, Mapping[str, np.ndarray]]] = {}
        self._facts = self._farm.facts()  # says at once if there is no board

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know."""
        return self._farm.notes

    def facts(self) -> dict[str, Any]:
        """See :class:`edgecompile.remote.Place`; RPC tells of the machine, and of no versions."""
        return {"device": self.device, "machine": self._facts.as_dict(), "versions": {}}

    def fingerprint(self, versions: Mapping[str, str], engine_options: Mapping[str, Any]) -> Fingerprint:
        """See :class:`edgecompile.remote.Place`; boards of one key are one kind of device."""
        machine = self._facts.as_dict() | {"features": " ".join(self._facts.features)}
        soft = {"governor": machine.pop("governor", "")}
        hard = {
            **machine,
            **{f"versions.{name}": version for name, version in versions.items()},
            **{f"options.{name}": value for name, value in engine_options.items() if not name.startswith("_")},
        }
        return Fingerprint({name: str(value) for name, value in hard.items() if str(value)}, soft)

    def require_locked(self, mode: str | int | None, clocks: bool = True, *, refuse: bool = True) -> tuple[str, ...]:
        """See :class:`edgecompile.remote.Place`; RPC tells neither power mode nor clocks."""
        if mode is None and not refuse:
            return ()
        raise EnvironmentMissing(
            f"the clocks of {self.device} cannot be checked", "RPC does not tell power mode and clocks",
            "measure over ssh://, or leave nvpmodel and jetson_clocks out of the configuration",
        )  # fmt: skip

    def probe(self) -> list[Capability]:
        """See :class:`edgecompile.remote.Place`."""
        return [Capability("tvm runtime", True, detail=f"{self._farm.count()} boards of {self.device}")]

    def add(self, path: str | Path, progress: Callable[[int, int], object] | None = None) -> str:
        """See :class:`edgecompile.remote.Place`; the library is uploaded when it is opened.

        Raises:
            InputError: the bundle is of another target.
            EnvironmentMissing: the board cannot run it.
        """
        bundle = Bundle.open(path)
        if bundle.manifest["target"] != TvmTarget.name:
            raise InputError(
                f"{path} cannot be measured at {self.device}",
                f"it is of the target {bundle.manifest['target']}, and these boards run that of tvm",
                "build it with --target tvm, or reach the board over ssh://",
            )
        manifest = bundle.engine_manifest
        self._farm.require_fit(manifest)
        library = Library.of_engine(bundle.path, manifest, bundle.graph())
        key = hashlib.sha256(library.path.read_bytes()).hexdigest()
        self._known[key] = library, bundle.probe()[0]
        return key

    def pair(self, arms: Mapping[str, str], **plan: Any) -> tuple[dict[str, Samples], str]:
        """See :class:`edgecompile.remote.Place`; what disturbs a board cannot be known over RPC."""
        made = Plan(**plan)
        if made.clock not in ("", "wall"):
            raise InputError(f"{self.device} cannot be measured by {made.clock}", "TVM tells the wall clock there")
        libraries = {name: self._known[key][0] for name, key in arms.items()}
        feeds = {name: self._known[key][1] for name, key in arms.items()}
        return self._farm.run(lambda link: _session(link, libraries, feeds, made)), ""

    def outputs(self, key: str, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """See :class:`edgecompile.remote.Place`."""
        library, own = self._known[key]
        given = own if feeds is None else feeds
        return self._farm.run(lambda link: link.run(library, link.open(library), given))

    def phases(self, key: str, calls: int = 100) -> dict[str, Any] | None:
        """None: a library on a CPU has no phases."""
        return None

    def profile(self, key: str, repeats: int = 10) -> dict[str, Any]:
        """See :class:`edgecompile.remote.Place`.

        Raises:
            InputError: the library was built before it could tell.
        """
        library, feeds = self._known[key]
        return self._farm.run(lambda link: _profile(link, library, feeds, repeats))

    def footprint(self, key: str) -> Footprint:
        """Raises EnvironmentMissing: a server tells neither."""
        raise EnvironmentMissing("TVM's RPC tells neither memory nor cold start")

    def close(self) -> None:
        """See :class:`edgecompile.remote.Place`."""
        self._farm.close()


# -- tuning ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Job:
    """A round of a search: models that take turns on one board, in libraries."""

    models: Sequence[Compiled]
    libraries: Sequence[Library]
    loads: int
    done: Future[list[dict[int, float]]] = field(default_factory=Future)
    losses: int = 0


class RpcRunner(tune.Runner):
    """Times rounds of a search on all boards of a key at once.

    One thread for each board borrows it with the first round and keeps it. What was under way on a board that is lost
    is done on another; when the last one is lost, all that waits fails.

    Args:
        farm: knows the boards; it holds none itself before :meth:`compare`.
        graph: the model.
        chosen: the options.
        say: told what is waited for, and what was lost.

    Raises:
        EnvironmentMissing: the tracker cannot be reached, or knows no board of the key.
    """

    def __init__(self, farm: Farm, graph: Graph, chosen: Options, say: Callable[[str], object] | None = None):
        self._farm, self._graph, self._chosen, self._say = farm, graph, chosen, say
        self._feeds = oracle.random_feeds(graph.signature().inputs)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock, self._failure, self._lost = threading.Lock(), "", ""
        self._threads: list[threading.Thread] = []
        self._farms: list[Farm] = []
        self._plain: Library | None = None
        self.boards, self._working = farm.key, farm.count()
        if not self._working:
            raise farm.none_left("none has registered under this key")
        self.at_once = self._working + 1  # so that no board waits for what is being compiled
        self._scratch = tempfile.TemporaryDirectory(prefix="edgecompile-")
        self._files = 0

    @property
    def told(self) -> str:
        """See :class:`edgecompile.targets.tvm.tune.Runner`; those that are lent, as soon as any was asked for."""
        lent = sum(farm.holds for farm in self._farms) if self._farms else self._working
        return f" on {lent} board{'s' if lent != 1 else ''}"

    def submit(self, models: Sequence[Compiled], loads: int) -> Future[list[dict[int, float]]]:
        """See :meth:`edgecompile.targets.tvm.tune.Runner.submit`; the first model of all is the untuned one."""
        job = _Job(models, [self._library(made) for made in models], loads)
        with self._lock:
            if not self._threads:
                self._farms = [Farm(self._farm.address, self._say) for _ in range(self._working)]
                self._threads = [threading.Thread(target=self._work, args=(f,), daemon=True) for f in self._farms]
                for thread in self._threads:
                    thread.start()
            if self._working:
                self._jobs.put(job)
            else:
                job.done.set_exception(self._farm.none_left(self._failure, self._lost))
        return job.done

    def _library(self, made: Compiled) -> Library:
        """A model, exported; the untuned one is so once."""
        if made.base is None and self._plain:
            return self._plain
        path = Path(self._scratch.name) / f"{self._files}.so"
        self._files += 1
        made.export(path, self._chosen)
        library = Library.of(path, self._chosen.threads, made.kernels, self._graph)
        if made.base is None:
            self._plain = library
        return library

    def _work(self, farm: Farm) -> None:
        try:
            while True:
                farm.link()  # before a job is taken: another thread may have a board for it
                job = self._jobs.get()
                if job is None:
                    return
                self._do(farm, job)
        except (_Unreachable, EnvironmentMissing) as error:
            self._give_up(str(error))
        finally:
            self._farm.losses += farm.losses
            farm.close()

    def _do(self, farm: Farm, job: _Job) -> None:
        try:
            found = farm.run(lambda link: self._times(link, job), 1)
        except EnvironmentMissing as error:
            self._lost = error.why
            job.losses += 1
            if job.losses < _LOSSES:
                self._jobs.put(job)
            else:
                job.done.set_exception(InputError(f"these kernels lost {job.losses} boards"))
        except Exception as error:  # also a file that is missing here: the job's affair, not the thread's
            job.done.set_exception(error)
        else:
            job.done.set_result(found)

    def _times(self, link: Link, job: _Job) -> list[dict[int, float]]:
        assert self._plain is not None
        inputs, base = link.tensors([self._feeds[name] for name in self._plain.inputs]), self._plain.path
        opened = {
            id(made): (library, None if made.base is None else link.added(library.path, base))
            for made, library in zip(job.models, job.libraries, strict=True)
        }

        def run(made: Compiled) -> Sequence[tuple[str, float]]:
            library, module = opened[id(made)]
            return tune.timed(made.kernels, link.profile(library, inputs, _REPEATS, module))

        return tune.spent(job.models, run, job.loads)

    def _give_up(self, why: str) -> None:
        """One thread less; what waits fails with the last one."""
        with self._lock:
            self._working -= 1
            if self._working:
                return
            self._failure = why
            for job in self._waiting():
                job.done.set_exception(self._farm.none_left(why, self._lost))

    def _waiting(self) -> Iterator[_Job]:
        """Takes what nobody has begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    yield job

    def compare(self, tuned: tune.Exported, untuned: tune.Exported) -> Ratio:
        """See :class:`edgecompile.targets.tvm.tune.Runner`; on one of the boards, the others are given back before."""
        self.close()
        threads = self._chosen.threads
        libraries = {
            name: Library.of(path, threads, kernels, self._graph)
            for name, (path, kernels) in {"tuned": tuned, "untuned": untuned}.items()
        }
        taken = _sessions(self._farm, libraries, self._feeds, tune.COMPARED_SECONDS, tune.SESSIONS)
        return measure.ratio(taken["tuned"], taken["untuned"])

    def close(self) -> None:
        """Give the boards back; what is under way on one is finished first, what waits is not begun."""
        for job in self._waiting():
            job.done.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:  # one that waits for a board or for a round is left to itself
            thread.join(_POLL_SECONDS)
        self._scratch.cleanup()
