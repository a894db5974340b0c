"""``edgecompile.toml``: strict, so that a misspelt key is an error and not a silent default.

::

    version = 1

    [build]                         # the options of `edgecompile build`, by their names there
    target = "ort"
    max_drop = "0.5%"               # of the score of evaluate(run), or 0.005 in its own unit
    prune = "0.7x"                  # of the measured latency; or prune-params = 0.5, of the parameters

    [preprocess]                    # how images become inputs, see edgecompile.calibration_data.Preprocess
    size = [224, 224]
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]

    [gate]
    max_regression = "5%"           # or 0.05
    alpha = 0.01
    time_limit = "60s"              # or seconds
    on_inconclusive = "retry:2"     # or "error", "warn"
    baseline = "main"               # a bundle, or a name in the store of baselines
    anchor = "v1.0"

    [gate.budgets]
    latency_p50 = "4ms"
    latency_p99 = "9ms"
    peak_memory = "150MiB"          # or bytes
    engine_size = "12MB"
    build_time = "10min"
    parity = 1e-3                   # largest error relative to an output's largest value
    accuracy = 0.71                 # smallest score

    [gate.parity]
    tolerance = 1e-4                # as `parity`, of the check that comes before any timing
    against = "baseline"            # or "source": what its own source computed when it was built

    [gate.device.orin]              # a class of devices; the first that fits counts
    match = "jetson-agx-orin*/maxn/*"   # its name, or facts: match = { cores = 2, versions.tensorrt = "10.*" }
    transport = "ssh://orin"
    nvpmodel = "MAXN"
    jetson_clocks = true
    dla_fallback_max = 0
    budgets.latency_p50 = "2ms"     # in place of the one above
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompile.errors import InputError, did_you_mean
from edgecompile.fingerprint import FACTS, PREFIXES, Fingerprint

if TYPE_CHECKING:
    from edgecompile.calibration_data import Preprocess
    from edgecompile.pipeline import Drop

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
_Units = Mapping[str, Decimal]
_SECONDS: _Units = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_BYTES: _Units = {
    "B": Decimal(1),
    "kB": Decimal(10**3),
    "MB": Decimal(10**6),
    "GB": Decimal(10**9),
    "KiB": Decimal(2**10),
    "MiB": Decimal(2**20),
    "GiB": Decimal(2**30),
}
_PERCENT: _Units = {"%": Decimal("0.01")}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?) ?([A-Za-zµ%]*)")
_DEVICE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Reader = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Parity:
    """Whether the candidate must be the same function, and as what.

    Attributes:
        tolerance: largest error, relative to the largest value of the output; None: what suits the precision.
        against: ``"baseline"``: what the baseline computes; ``"source"``: what the candidate's own source computed when
            it was built.
    """

    tolerance: float | None = None
    against: str = "baseline"


@dataclass(frozen=True)
class Device:
    """A class of devices.

    Attributes:
        name: of the table, ``[gate.device.NAME]``.
        match: fact of the hard part of a fingerprint, or ``"class"`` for its class name -> pattern of the shell (``*``,
            ``?``, ``[...]``); all must fit.
        transport: ``ssh://HOST``, or ``""``: this machine.
        nvpmodel: name or number, as text, of the power mode that must be set; None: any.
        jetson_clocks: whether the clocks must be fixed (True) or must not (False); None: either.
        dla_fallback_max: most layers that may run on the GPU because the DLA cannot run them; None: any number.
        budgets: those that replace the general ones.
    """

    name: str
    match: Mapping[str, str]
    transport: str = ""
    nvpmodel: str | None = None
    jetson_clocks: bool | None = None
    dla_fallback_max: int | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)

    def fits(self, fingerprint: Fingerprint) -> bool:
        """Whether a machine is of this class."""
        facts = {**fingerprint.hard, "class": fingerprint.class_name}
        return all(fact in facts and fnmatchcase(facts[fact], pattern) for fact, pattern in self.match.items())


@dataclass(frozen=True)
class GateConfig:
    """The ``[gate]`` table, checked; times in seconds, sizes in bytes, percentages as fractions.

    Attributes:
        max_regression: fraction by which the latency may grow.
        alpha: probability of a false alarm, in all.
        time_limit: wall time in seconds.
        on_inconclusive: ``"error"`` (exit 3), ``"warn"`` (exit 0) or ``"retry"``.
        retries: how often, with ``"retry"``; an error after the last.
        baseline, anchor: a bundle or a name in the store; ``""``: none.
        budgets: of :data:`BUDGETS`, those that are set: ``latency_p50``, ``latency_p99`` and ``build_time`` in seconds,
            ``peak_memory`` and ``engine_size`` in bytes, ``parity`` as a fraction, ``accuracy`` as a score (the only
            one that is a lower limit).
        parity: the check before any timing.
        devices: classes of devices in the order of the file.
        device: the one that :meth:`for_device` chose.
        places: dotted key, as in ``gate.budgets.latency_p50`` -> ``FILE:LINE`` where it is set.
        digest: SHA-256 of the file, or ``""``.
    """

    max_regression: float = 0.05
    alpha: float = 0.01
    time_limit: float = 60.0
    on_inconclusive: str = "error"
    retries: int = 0
    baseline: str = ""
    anchor: str = ""
    budgets: Mapping[str, float] = field(default_factory=dict)
    parity: Parity = Parity()
    devices: tuple[Device, ...] = ()
    device: Device | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    def for_device(self, fingerprint: Fingerprint) -> GateConfig:
        """What holds on a machine: the first class of devices that it fits is chosen, and its budgets replace others.

        The places of the budgets follow, so ``places["gate.budgets.latency_p50"]`` is where the limit in force is set.
        """
        device = next((d for d in self.devices if d.fits(fingerprint)), None)
        if device is None:
            return self
        prefix = f"gate.device.{device.name}.budgets."
        moved = {f"gate.budgets.{k}": self.places[prefix + k] for k in device.budgets if prefix + k in self.places}
        return replace(self, budgets={**self.budgets, **device.budgets}, device=device, places={**self.places, **moved})


# -- values ------------------------------------------------------------------------------------------------------------
# Each reader takes a value as TOML or a command line gives it, and where it stands, for the message.


def duration(value: Any, where: str) -> float:
    """Seconds of ``"250us"``, ``"4ms"``, ``"1.2s"`` or ``"10min"``; not of a number, which could be milliseconds.

    Raises:
        InputError: it is something else, or not above zero.
    """
    return _within(float(_quantity(value, where, "a duration", _SECONDS, '"4ms"')), value, where, '"4ms"')


def seconds(value: Any, where: str) -> float:
    """As :func:`duration`, or a number of seconds."""
    number = _number(value)
    return duration(value, where) if number is None else _within(number, value, where, '"60s" or 60')


def time_box(value: Any, where: str) -> float:
    """Seconds of ``"10m"``, ``"90s"`` or a number of seconds; 0 is one, too.

    Raises:
        InputError: it is something else.
    """
    number = _number(value)
    if number is None:
        number = float(_quantity(value, where, "a duration", _SECONDS, '"10m"'))
    if not 0 <= number < math.inf:
        raise _wrong(value, where, "a duration", '"10m"')
    return number


def size(value: Any, where: str) -> int:
    """Bytes of ``"150MiB"``, ``"12MB"`` or a whole number of bytes.

    Raises:
        InputError: it is something else, less than a byte, or more than a file can have.
    """
    example = '"150MiB", "12MB" or 1048576'
    number = value if type(value) is int else round(_quantity(value, where, "a size", _BYTES, example))
    return _within(number, value, where, example, high=2**63)


def fraction(value: Any, where: str, high: float = math.inf) -> float:
    """The fraction that ``"5%"`` or ``0.05`` means.

    Raises:
        InputError: it is something else, not above zero, or not below ``high``.
    """
    example, number = '"5%" or 0.05', _number(value)
    if number is None:
        number = float(_quantity(value, where, "a fraction", _PERCENT, example))
    return _within(number, value, where, example, high=high)


def share(text: str, what: str) -> float:
    """A share above 0 and below 1, like ``0.7`` or ``0.7x``.

    Args:
        text: the value.
        what: how errors name it.

    Raises:
        InputError: it is something else.
    """
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise InputError(f"{what} {text} is not a share above 0 and below 1", fix=f"write it like {what} 0.7")
    return value


def drop(value: Any, where: str) -> Drop:
    """The most that a score may fall: ``"0.5%"``, a share of it, or ``0.005``, in its own unit.

    Raises:
        InputError: it is something else, or negative.
    """
    from edgecompile.pipeline import Drop

    try:
        return Drop(value.replace(" ", "") if isinstance(value, str) else f"{_number(value)}")
    except ValueError:
        raise _wrong(value, where, "a drop of a score", '"0.5%" of the score, or 0.005 in its own unit') from None


def on_inconclusive(value: Any, where: str) -> tuple[str, int]:
    """``"error"``, ``"warn"`` or ``"retry:N"`` as ``("error", 0)``, ``("warn", 0)`` or ``("retry", N)``.

    Raises:
        InputError: it is something else.
    """
    found = re.fullmatch(r"(error|warn)|retry:([1-9][0-9]?)", value) if isinstance(value, str) else None
    if found is None:
        raise _wrong(value, where, "an answer to an inconclusive result", '"error", "warn" or "retry:2"')
    return found[1] or "retry", int(found[2] or 0)


def _error(value: Any, where: str) -> float:
    """A relative error; zero asks for equality."""
    return 0.0 if _number(value) == 0 else fraction(value, where)


def _score(value: Any, where: str) -> float:
    """Any finite number: a score may be negative."""
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise _wrong(value, where, "a score", "0.71")
    return number


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(value, where, "a number of layers", "0 or 3")
    return value


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _wrong(value, where, "true or false", "true")
    return value


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(value, where, "a name", '"main"')
    return value


def _mode(value: Any, where: str) -> str:
    """A power mode by name or number, as text."""
    if type(value) is int and value >= 0:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(value, where, "a power mode", '"MAXN" or 0, as `nvpmodel -q` prints it')
    return value


def _transport(value: Any, where: str) -> str:
    from edgecompile.remote import Device

    with contextlib.suppress(InputError):
        return str(Device.parse(value if isinstance(value, str) else ""))
    raise _wrong(value, where, "a way to reach a device", '"ssh://orin" or "ssh://user@host:22"')


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    """One number, or one per channel."""
    found = [_number(v) for v in (value if isinstance(value, list) else [value])]
    numbers = tuple(n for n in found if n is not None and math.isfinite(n))
    if not numbers or len(numbers) != len(found):
        raise _wrong(value, where, "a number for each channel", "[0.485, 0.456, 0.406]")
    return numbers


def _extent(value: Any, where: str) -> tuple[int, int]:
    found = value if isinstance(value, list) else [value, value]
    if len(found) != 2 or not all(type(v) is int and v > 0 for v in found):
        raise _wrong(value, where, "a height and a width", "[224, 224]")
    return found[0], found[1]


def _factor(value: Any, where: str) -> float:
    return _numbers(value, where)[0]


def _against(value: Any, where: str) -> str:
    if value not in ("baseline", "source"):
        raise _wrong(value, where, "something to compare with", '"baseline" or "source"')
    return value


def _match(value: Any, where: str) -> dict[str, str]:
    """Pattern by fact; a text alone is the pattern of the class."""
    example = '"jetson-agx-orin*" or { gpu = "*H200*", versions.tensorrt = "10.*" }'
    patterns = dict(_flat(value)) if isinstance(value, dict) else {"class": value}
    if not patterns or not isinstance(value, (dict, str)):
        raise _wrong(value, where, "a class of devices", example)
    for fact, pattern in patterns.items():
        if fact not in ("class", *FACTS) and not fact.startswith(PREFIXES):
            raise _unknown(f"{where}: a fingerprint has no fact {fact!r}", fact, ("class", *FACTS))
        if pattern == "" or not isinstance(pattern, (str, int)):
            raise _wrong(pattern, f"{where}.{fact}", "a pattern for a fact", example)
    return {fact: str(pattern) for fact, pattern in patterns.items()}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of whatever is in nested tables and is no table itself."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float | None:
    """A number as TOML has it, or None; true and false are none."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _quantity(value: Any, where: str, what: str, units: _Units, example: str) -> Decimal:
    """A text of a number and a unit."""
    found = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[2] not in units:
        raise _wrong(value, where, what, f"{example} (units: {', '.join(units)})")
    return Decimal(found[1]) * units[found[2]]


def _within(number: Any, value: Any, where: str, example: str, high: float = math.inf) -> Any:
    """``number``, which is what ``value`` means, if it is above zero and below ``high``."""
    if not 0 < number < high:
        bounds = "above zero and finite" if high == math.inf else f"above zero and below {high:g}"
        raise InputError(
            f"{where} = {_shown(value)} is out of range", f"it must be {bounds}", f"write it like {example}"
        )
    return number


def _wrong(value: Any, where: str, what: str, example: str) -> InputError:
    return InputError(f"{where} = {_shown(value)} is not {what}", fix=f"write it like {example}")


def _unknown(what: str, name: str, known: Sequence[str]) -> InputError:
    return InputError(what, did_you_mean(name, known) or f"there are: {', '.join(known)}")


def _shown(value: Any) -> str:
    """``value`` about as TOML writes it, cut short."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- tables ------------------------------------------------------------------------------------------------------------

# Key -> reader of its value; None: a table.
BUDGETS: Mapping[str, Reader] = {
    "latency_p50": duration,
    "latency_p99": duration,
    "peak_memory": size,
    "engine_size": size,
    "build_time": duration,
    "parity": _error,
    "accuracy": _score,
}
_GATE: Mapping[str, Reader | None] = {
    "max_regression": partial(fraction, high=1),
    "alpha": partial(fraction, high=0.5),
    "time_limit": seconds,
    "on_inconclusive": on_inconclusive,
    "baseline": _name,
    "anchor": _name,
    "budgets": None,
    "parity": None,
    "device": None,
}
_PARITY: Mapping[str, Reader] = {"tolerance": _error, "against": _against}
_DEVICE: Mapping[str, Reader | None] = {
    "match": _match,
    "transport": _transport,
    "nvpmodel": _mode,
    "jetson_clocks": _flag,
    "dla_fallback_max": _count,
    "budgets": None,
}


@dataclass(frozen=True)
class _Table:
    """A table of the file and the way to it."""

    file: Path
    places: Mapping[str, str]
    path: tuple[str, ...]
    content: Any

    def __post_init__(self) -> None:
        if not isinstance(self.content, dict):
            raise InputError(
                f"{self.where()} must be a table", fix=f"write [{'.'.join(self.path)}] on a line of its own"
            )

    def where(self, *key: str) -> str:
        """``FILE:LINE: gate.alpha``."""
        dotted = ".".join((*self.path, *key))
        return f"{self.places.get(dotted, self.file)}: {dotted}"

    def check(self, known: Sequence[str]) -> None:
        """Refuse keys that do not exist."""
        for key in self.content:
            if key not in known:
                place = self.places.get(".".join((*self.path, key)), self.file)
                raise _unknown(f"{place}: [{'.'.join(self.path)}] has no key {key!r}", key, known)

    def read(self, readers: Mapping[str, Reader | None]) -> dict[str, Any]:
        """The values that are set, checked; without those that are tables."""
        self.check(tuple(readers))
        found = ((key, readers[key], value) for key, value in self.content.items())
        return {key: reader(value, self.where(key)) for key, reader, value in found if reader is not None}

    def table(self, key: str) -> _Table:
        """The table of this name; empty if there is none."""
        return replace(self, path=(*self.path, key), content=self.content.get(key, {}))


_PREPROCESS: Mapping[str, Reader] = {
    "size": _extent, "mean": _numbers, "std": _numbers, "scale": _factor, "layout": _name, "color": _name, "fit": _name,
}  # fmt: skip


def load(path: Path, table: str, keys: Sequence[str]) -> dict[str, Any]:
    """One table of a configuration file, its values unchecked.

    Args:
        path: the TOML file.
        table: name of the table wanted; a file without it gives an empty one.
        keys: the keys it may have.

    Raises:
        InputError: the file is missing or not TOML, or has a table or key that does not exist.
    """
    found = _open(path)[0].table(table)
    found.check(keys)
    return found.content


def load_preprocess(path: Path) -> Preprocess | None:
    """The ``[preprocess]`` table of a configuration file, None if it has none.

    Raises:
        InputError: the file is missing or not TOML, or has a table, key or value that cannot be.
    """
    from edgecompile.calibration_data import Preprocess

    values = _open(path)[0].table("preprocess").read(_PREPROCESS)
    return Preprocess(**values) if values else None


def load_gate(path: Path) -> GateConfig:
    """The ``[gate]`` table of a configuration file; a file without it gives the defaults.

    Raises:
        InputError: the file is missing or not TOML, has a table or key that does not exist, or a value is of the wrong
            type or unit or out of range; the message names the line and shows how to write it.
    """
    top, digest = _open(path)
    gate = top.table("gate")
    values = gate.read(_GATE)
    if "on_inconclusive" in values:
        values["on_inconclusive"], values["retries"] = values["on_inconclusive"]
    devices = gate.table("device")
    return GateConfig(
        **values,
        budgets=gate.table("budgets").read(BUDGETS),
        parity=Parity(**gate.table("parity").read(_PARITY)),
        devices=tuple(_device(devices, name) for name in devices.content),
        places=top.places,
        digest=digest,
    )


def _device(devices: _Table, name: str) -> Device:
    if not _DEVICE_NAME.fullmatch(name):
        raise _wrong(name, devices.where(), "the name of a device", "[gate.device.orin]: letters, digits, - and _")
    table = devices.table(name)
    values = table.read(_DEVICE)
    if "match" not in values:
        raise InputError(
            f"{table.where()} has no match",
            "it says which devices are meant",
            'add a line like match = "*jetson*orin*"',
        )
    return Device(name, budgets=table.table("budgets").read(BUDGETS), **values)


def _open(path: Path) -> tuple[_Table, str]:
    """The whole file as a table, its own keys checked, and its SHA-256."""
    try:
        content = Path(path).read_bytes()
        text = content.decode()
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", str(error), "check the path given with --config") from None
    except (ValueError, RecursionError) as error:  # beyond its own error, the parser leaves absurd numbers and depths
        raise InputError(f"{path} is not TOML", str(error)) from None
    places = {key: f"{path}:{line}" for key, line in _lines(text).items()}
    known = ("version", "build", "gate", "preprocess")
    for name in document:
        if name not in known:
            raise _unknown(f"{places.get(name, path)}: there is no table [{name}]", name, known)
    version = document.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise InputError(
            f"{places['version']}: version = {_shown(version)} is unknown", f"this edgecompile reads version {VERSION}"
        )
    return _Table(path, places, (), document), hashlib.sha256(content).hexdigest()


def _lines(text: str) -> dict[str, int]:
    """The line where each key and table of a valid TOML text is first written, by dotted key.

    The parser does not tell. But every statement ends with a line, and no beginning of a statement is one: lines are
    gathered until they parse.
    """
    found: dict[str, int] = {}
    table: tuple[str, ...] = ()
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            content = tomllib.loads(statement)
        except ValueError:
            continue
        header = statement.lstrip().startswith("[")
        keys = [(*(() if header else table), *key) for key in _keys(content)]
        for key in keys:
            found.setdefault(".".join(key), first)
        if header:
            table = keys[-1]
        statement, first = "", number + 1
    return found


def _keys(table: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The ways to everything in nested tables, the tables themselves too."""
    for key, value in table.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _keys(value))
