"""What a latency depends on besides the model: when two numbers may be compared.

The *hard* part of a fingerprint decides: numbers of two machines whose hard parts differ, or of one machine before and
after a change of driver or power mode, cannot be compared. The *soft* part explains: it changes from minute to minute
and is kept beside the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecompile import documents, measure
from edgecompile.errors import EnvironmentMissing, InputError

SCHEMA = "edgecompile.fingerprint/1"
_MACHINE = ("arch", "cpu", "features", "cpus", "cores", "affinity")
_GPU = ("gpu", "gpu_cores", "driver", "cuda")
_BOARD = ("board", "l4t", "power_mode", "jetson_clocks")
# The facts of the hard part, and the prefixes of those that depend on the engine.
FACTS = (*_MACHINE, *_GPU, *_BOARD)
PREFIXES = ("versions.", "options.", "env.")
# Set by the user, read by a runtime, and able to change what it runs or on how many threads.
_ENVIRONMENT = ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NVIDIA_TF32_OVERRIDE")


@dataclass(frozen=True)
class Fingerprint:
    """Where and how something was measured.

    Attributes:
        hard: fact -> its value as text, without those that cannot be known. The facts are :data:`FACTS`, and
            ``versions.NAME``, ``options.NAME`` and ``env.NAME``.
        soft: what varies on one machine, see :func:`fingerprint`.
    """

    hard: Mapping[str, str] = field(default_factory=dict)
    soft: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that are equal if and, but for chance, only if the hard parts are."""
        return hashlib.sha256(json.dumps(dict(self.hard), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def class_name(self) -> str:
        """Which kind of device it is, for people and patterns.

        ``amd-epyc-7b13/2-cores``, ``nvidia-geforce-rtx-4090/16384-cuda-cores/450-w`` or
        ``jetson-agx-orin-p3701-0000/maxn/l4t-36.4.3``.
        """
        hard = self.hard
        parts = [next((hard[fact] for fact in ("board", "gpu", "cpu") if fact in hard), "unknown")]
        if "l4t" not in hard:
            parts.append(f"{hard['gpu_cores']} CUDA cores" if "gpu_cores" in hard else f"{hard.get('cores')} cores")
        parts += [hard["power_mode"]] if "power_mode" in hard else []
        parts += [f"L4T {hard['l4t']}"] if "l4t" in hard else []
        return "/".join(map(_slug, parts))

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as a JSON document."""
        return documents.encode(self, DERIVED)

    @classmethod
    def from_json(cls, document: Any) -> Fingerprint:
        """Read a document that :meth:`to_json` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
                raise documents.Malformed(f"its schema should be {SCHEMA!r}")
            return documents.decode(cls, document, "fingerprint", DERIVED)
        except documents.Malformed as error:
            raise InputError("the fingerprint cannot be read", str(error)) from None


# What a document says besides, for readers; see edgecompile.documents.
DERIVED: documents.Derived = {
    Fingerprint: {"schema": lambda _: SCHEMA, "key": lambda f: f.key, "class": lambda f: f.class_name}
}


def fingerprint(
    versions: Mapping[str, str], engine_options: Mapping[str, Any], board: Mapping[str, Any] | None = None
) -> Fingerprint:
    """The fingerprint of this machine, now.

    The hard part holds, besides what is given: CPU model and instruction sets, processors, cores and affinity of this
    process; name, CUDA cores, driver, CUDA version and power limit of the GPU in use, as far as NVML tells; the
    board's name; and environment variables that change a runtime's threads or arithmetic. The soft part: kernel, clock
    governor, CPU clock in MHz, hottest thermal zone in degrees Celsius, load averages, whether it is a virtual machine,
    memory in bytes, ``psi`` (share of the last 10 s, in percent, in which something waited for a CPU), ``steal`` (share
    of CPU time, in percent, that the hypervisor took since boot), version of Python.

    Args:
        versions: of the runtimes that the engine runs on.
        engine_options: options of the engine: threads, flags.
        board: what only the board's own tools tell: ``l4t`` (version of Jetson Linux), ``power_mode``,
            ``jetson_clocks`` (whether it is on), and a better name than the device tree's, ``board``.

    Raises:
        ValueError: ``board`` has another fact.
    """
    board = board or {}
    if unknown := board.keys() - set(_BOARD):
        raise ValueError(f"no facts of a board: {', '.join(sorted(unknown))}")
    machine = measure.machine()
    machine["features"] = " ".join(machine["features"])
    hard = {
        **{fact: machine[fact] for fact in (*_MACHINE, "board")},
        **_gpu(),
        **board,
        **{f"versions.{name}": version for name, version in versions.items()},
        **{f"options.{name}": value for name, value in engine_options.items()},
        **{f"env.{name}": os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    soft = {
        "kernel": machine["system"],
        **{fact: machine[fact] for fact in ("governor", "load", "hypervisor", "memory_bytes", "python")},
        "clock_mhz": _clock(),
        "temperature": _temperature(),
        "psi": _psi(_read("/proc/pressure/cpu")),
        "steal": _steal(_read("/proc/stat")),
    }
    texts = {fact: str(documents.encode(value, {})) for fact, value in hard.items() if value is not None}
    return Fingerprint({fact: text for fact, text in texts.items() if text}, soft)


def differences(here: Fingerprint, there: Fingerprint) -> list[str]:
    """In what the hard parts differ, one sentence each: ``cores: 2 here, 4 there``; empty if they agree."""
    facts = [*here.hard, *(fact for fact in there.hard if fact not in here.hard)]
    pairs = [(fact, here.hard.get(fact, "nothing"), there.hard.get(fact, "nothing")) for fact in facts]
    return [f"{fact}: {a} here, {b} there" for fact, a, b in pairs if a != b]


def require_same(stored: Fingerprint, here: Fingerprint, what: str) -> None:
    """Refuse stored numbers that were not measured as this machine would measure them now.

    Args:
        stored: the fingerprint that was stored with them.
        here: that of this machine.
        what: what the numbers are, for the message.

    Raises:
        EnvironmentMissing: the hard parts differ; every difference is named.
    """
    if found := differences(here, stored):
        raise EnvironmentMissing(
            f"{what} cannot be compared with this machine ({here.class_name}, {here.key})",
            f"measured on {stored.class_name}, {stored.key}: {'; '.join(found)}",
            "measure it again here, or run on the machine that it comes from",
        )


def _slug(text: str) -> str:
    """``text`` in lower case, runs of other characters than letters, digits and dots as one dash."""
    plain = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.") or "unknown"


# -- GPU ---------------------------------------------------------------------------------------------------------------


def _gpu() -> dict[str, Any]:
    """Facts about the GPU that a process started here would use first; empty without NVML or a GPU.

    NVML does not count multiprocessors. CUDA cores are these times a constant of the architecture, and tell the
    cut-down variants of a chip apart just as well.
    """
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return {}
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if visible.isdecimal():
            device = pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        elif visible.startswith(("GPU-", "MIG-")):
            device = pynvml.nvmlDeviceGetHandleByUUID(visible)
        else:  # "" and "-1" hide every GPU
            return {}
        asked = {
            "gpu": lambda: _text(pynvml.nvmlDeviceGetName(device)),
            "gpu_cores": lambda: pynvml.nvmlDeviceGetNumGpuCores(device),
            "driver": lambda: _text(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": lambda: _version(pynvml.nvmlSystemGetCudaDriverVersion_v2()),
            "power_mode": lambda: f"{pynvml.nvmlDeviceGetPowerManagementLimit(device) // 1000} W",
        }
        facts = {}
        for fact, ask in asked.items():
            try:
                facts[fact] = ask()
            except pynvml.NVMLError:  # not every GPU answers everything
                facts[fact] = None
        return facts
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _version(number: int) -> str:
    """``12.4`` for 12040, as CUDA counts."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: str | bytes) -> str:
    """Older versions of the binding return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


# -- what varies -------------------------------------------------------------------------------------------------------


def _clock() -> float | None:
    """Clock of the first CPU in MHz."""
    kilohertz = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").strip()
    if kilohertz.isdecimal():
        return int(kilohertz) / 1000
    found = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", _read("/proc/cpuinfo"), re.MULTILINE)
    return float(found[1]) if found else None


def _temperature() -> float | None:
    """The hottest thermal zone in degrees Celsius."""
    zones = [_read(str(zone)).strip() for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    return max((int(z) / 1000 for z in zones if z.lstrip("-").isdecimal()), default=None)


def _psi(text: str) -> float | None:
    """``avg10`` of the line ``some`` of /proc/pressure/cpu."""
    found = re.search(r"^some avg10=([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) if found else None


def _steal(text: str) -> float | None:
    """The eighth of the first eight columns of /proc/stat's line ``cpu``, in percent of their sum; see proc(5)."""
    found = re.search(r"^cpu ((?: *[0-9]+){8})", text, re.MULTILINE)
    ticks = [int(t) for t in found[1].split()] if found else []
    return round(100 * ticks[7] / sum(ticks), 3) if sum(ticks) else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
