"""The engine file: a header of our own in front of TensorRT's serialised engine, verified before TensorRT sees a byte.

A serialised engine is executable content, and TensorRT neither detects tampering nor says plainly for which machine an
engine was made. The layout, all integers little-endian::

    8 bytes   magic
    4 bytes   length of the header, at most 16 KiB
    32 bytes  SHA-256 of the header
    header    JSON, see Header
    payload   the serialised engine, to the end of the file

The digests prove that the file is what some build wrote, not who built it: keep engines where only you can write.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.files import write_atomic

SCHEMA = "edgecompile.engine/1"
MAGIC = b"\x89ECTRT\r\n"  # not text, and changed by every transfer that takes it for text
HEADER_LIMIT = 16 << 10
PAYLOAD_LIMIT = 64 << 30
HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")

_FIXED = struct.Struct("<8sI32s")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){1,3}[.+a-z0-9]{0,32}")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
_PLATFORM = re.compile(r"[a-z0-9]+-[a-z0-9_]+")


@dataclass(frozen=True)
class Header:
    """What an engine was built for.

    Attributes:
        tensorrt: full version of the TensorRT that built it, e.g. ``10.3.0``.
        compute_capability: of the GPU, e.g. ``8.7``.
        os: operating system and architecture, e.g. ``linux-aarch64``.
        dla_core: the DLA core it runs on, None for the GPU.
        version_compatible: later versions of TensorRT may load it too.
        hardware: one of :data:`HARDWARE_LEVELS`.
        payload_bytes: size of the serialised engine.
        payload_sha256: its digest.
        schema: :data:`SCHEMA`.
    """

    tensorrt: str
    compute_capability: str
    os: str
    dla_core: int | None
    version_compatible: bool
    hardware: str
    payload_bytes: int
    payload_sha256: str
    schema: str = SCHEMA


@dataclass(frozen=True)
class Machine:
    """What this machine can load: its TensorRT, GPU, system (as in :class:`Header`) and number of DLA cores."""

    tensorrt: str
    compute_capability: str
    os: str
    dla_cores: int = 0


def write(
    path: Path,
    payload: bytes | bytearray | memoryview,
    machine: Machine,
    *,
    dla_core: int | None = None,
    version_compatible: bool = False,
    hardware: str = "none",
) -> Header:
    """Write an engine that was built on ``machine``, atomically.

    Args:
        path: the file.
        payload: what TensorRT serialised.
        machine: where it was built.
        dla_core, version_compatible, hardware: as in :class:`Header`.

    Raises:
        InputError: the file cannot be written, or the machine describes itself in a way that a header cannot hold.
    """
    view = memoryview(payload).cast("B")
    header = Header(
        machine.tensorrt,
        machine.compute_capability,
        machine.os,
        dla_core,
        version_compatible,
        hardware,
        view.nbytes,
        hashlib.sha256(view).hexdigest(),
    )
    if bad := _unusable(asdict(header)):
        raise InputError(
            f"cannot write {path}", f"a header cannot hold {', '.join(f'{n}={v!r}' for n, v in bad.items())}"
        )
    write_atomic(path, [pack(asdict(header)), view])
    return header


def pack(header: Mapping[str, Any]) -> bytes:
    """Everything that precedes the payload."""
    text = json.dumps(header, sort_keys=True).encode()
    return _FIXED.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text


def read(path: Path, machine: Machine) -> tuple[Header, bytes]:
    """The header and the serialised engine, after proving that it is undamaged and made for ``machine``.

    Raises:
        InputError: not an engine file, damaged, or from a newer edgecompile.
        EnvironmentMissing: built for another device, system or version of TensorRT.
    """
    header, payload = _parse(path, _content(path))
    if not compatible(header, machine):
        raise mismatch(path, header, machine)
    return header, payload


def compatible(header: Header, machine: Machine) -> bool:
    """True if ``machine`` can run an engine with this header.

    A version-compatible engine runs on the TensorRT that built it and on later ones up to the next major version
    (TensorRT documentation, "Version Compatibility"); hardware levels are those of ``HardwareCompatibilityLevel``.
    """
    built, here = _numbers(header.tensorrt), _numbers(machine.tensorrt)
    version = header.tensorrt == machine.tensorrt or (
        header.version_compatible and built <= here and here[0] <= built[0] + 1
    )
    device = header.compute_capability == machine.compute_capability or (
        header.hardware == "ampere_plus" and min(map(_numbers, _capabilities(header, machine))) >= (8, 0)
    )
    core = header.dla_core is None or header.dla_core < machine.dla_cores
    return version and device and core and header.os == machine.os


def mismatch(path: Path, header: Header, machine: Machine) -> EnvironmentMissing:
    """The error for an engine of another machine: both sides on one line, as far as they differ."""
    built, here = [_sm(header.compute_capability)], [_sm(machine.compute_capability)]
    if header.os != machine.os:
        built, here = [*built, header.os], [*here, machine.os]
    if header.dla_core is not None:
        built, here = [*built, f"DLA {header.dla_core}"], [*here, f"{machine.dla_cores} DLA cores"]
    built.append(f"TensorRT {header.tensorrt}")
    here.append(machine.tensorrt)
    return EnvironmentMissing(
        f"built for {' / '.join(built)}, here {' / '.join(here)}: run edgecompile build {path.parent}"
    )


def _capabilities(header: Header, machine: Machine) -> tuple[str, str]:
    return header.compute_capability, machine.compute_capability


def _sm(capability: str) -> str:
    return "sm_" + capability.replace(".", "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _content(path: Path) -> bytes:
    """The whole file; what is hashed is what is handed on, so nobody can change it in between."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not hang the build
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror or str(error), "build the bundle again") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _foreign(path, "it is not a regular file")
        if status.st_size > _FIXED.size + HEADER_LIMIT + PAYLOAD_LIMIT:
            raise _foreign(path, f"{status.st_size} bytes are more than an engine can have")
        with open(handle, "rb", closefd=False) as file:
            start = file.read(_FIXED.size)
            if not start.startswith(MAGIC):  # before the rest is read: it may be anything
                raise _foreign(path, "it does not start as one does")
            return start + file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror or str(error), "build the bundle again") from None
    finally:
        os.close(handle)


def _parse(path: Path, content: bytes) -> tuple[Header, bytes]:
    if len(content) < _FIXED.size:
        raise _damaged(path, "it ends inside its header")
    _, length, digest = _FIXED.unpack_from(content)
    if not 2 <= length <= HEADER_LIMIT:
        raise _damaged(path, f"its header claims {length} bytes, {HEADER_LIMIT} are allowed")
    text = content[_FIXED.size : _FIXED.size + length]
    if len(text) != length:
        raise _damaged(path, "it ends inside its header")
    if hashlib.sha256(text).digest() != digest:
        raise _damaged(path, "its header has another digest")
    header = _header(path, text)
    payload = content[_FIXED.size + length :]
    if len(payload) != header.payload_bytes:
        raise _damaged(path, f"it holds {len(payload)} bytes where its header says {header.payload_bytes}")
    if hashlib.sha256(payload).hexdigest() != header.payload_sha256:
        raise _damaged(path, "its content has another digest")
    return header, payload


def _header(path: Path, text: bytes) -> Header:
    """A header whose digest is right may still be forged or written by another version: every field is checked."""
    try:
        values = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _damaged(path, "its header is not a JSON object")
    if values.get("schema") != SCHEMA:
        raise _foreign(path, f"its schema is {str(values.get('schema'))[:40]!r}, this edgecompile reads {SCHEMA!r}")
    if values.keys() != {f.name for f in fields(Header)}:
        raise _damaged(path, "its header lacks fields or has unknown ones")
    if bad := _unusable(values):
        raise _damaged(path, f"its header has no usable {', '.join(bad)}")
    return Header(**values)


def _unusable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a header that hold what they cannot hold."""
    return {name: values[name] for name, fits in _FIELDS.items() if not fits(values[name])}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _matches(pattern: re.Pattern[str]):
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _whole(limit: int):
    return lambda value: type(value) is int and 0 <= value <= limit


_FIELDS = {
    "tensorrt": _matches(_VERSION),
    "compute_capability": _matches(_CAPABILITY),
    "os": _matches(_PLATFORM),
    "dla_core": lambda value: value is None or _whole(15)(value),
    "version_compatible": lambda value: type(value) is bool,
    "hardware": lambda value: value in HARDWARE_LEVELS,
    "payload_bytes": lambda value: _whole(PAYLOAD_LIMIT)(value) and value > 0,
    "payload_sha256": _matches(_DIGEST),
}


def _foreign(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not an engine that edgecompile wrote", why, f"run edgecompile build {path.parent}")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"the engine {path} is damaged", why, f"run edgecompile build {path.parent}")
