"""The machine's state while something is measured: clocks, temperatures, throttling, load, and what a board is called.

A Jetson says it through ``tegrastats``, ``nvpmodel`` and ``jetson_clocks``, a desktop GPU through NVML, Linux through
/proc and /sys. What is missing is None or empty, never an error: conditions explain a measurement, they do not stop it.
Only :func:`require_locked` refuses.

This module travels to boards, so it imports nothing outside the standard library until a GPU is asked for.

Sources: NVIDIA Jetson Linux Developer Guide, "Tegrastats Utility" and "Platform Power and Performance" (fields,
thermal zones, ``oc*_event_cnt``); NVML API reference, "nvmlClocksEventReasons".
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgecompile.errors import EnvironmentMissing

INTERVAL = 0.5  # seconds between readings
MOST_DROPPED = 0.2  # share of pairs that may be dropped before nothing can be said
# tegrastats counts cycles over its interval: a core locked at 1907 MHz is reported with 1904 to 1907.
_STEADY = 0.03
_POWERED_DOWN = -256.0  # what a thermal zone without power reads
_NOT_CONNECTED = "NC"  # the name of every rail that measures nothing
_STALE = 3 * INTERVAL
_COMMAND_SECONDS = 5.0
_ROOT = Path("/")


# -- what tegrastats prints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """A CPU core: load in percent and clock in MHz."""

    load: int
    mhz: int


@dataclass(frozen=True)
class Rail:
    """A power rail: now and averaged since tegrastats was started, in mW; rails can read slightly below zero."""

    milliwatts: int
    average: int | None


@dataclass(frozen=True)
class Tegrastats:
    """One line of tegrastats.

    Attributes:
        ram_used_mb, ram_total_mb: memory in MB.
        cpus: by number; None for a core that is off.
        gpu_load: in percent; None where it is not told (Thor).
        gpu_mhz: of each GPC, or of the GPU; empty where it is not told (without root).
        emc_load: share of the memory bandwidth in use, in percent, or None.
        emc_mhz: memory clock, or None.
        temperatures: °C by zone, named as printed; without zones that have no power.
        power: by rail.
    """

    ram_used_mb: int
    ram_total_mb: int
    cpus: tuple[Core | None, ...]
    gpu_load: int | None = None
    gpu_mhz: tuple[int, ...] = ()
    emc_load: int | None = None
    emc_mhz: int | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    power: Mapping[str, Rail] = field(default_factory=dict)


# Nine digits at most: no field is longer, and int() refuses some thousands of them.
_N = r"\d{1,9}"
_CORE = rf"(?:off|{_N}%@{_N})"
_RAM = re.compile(rf"(?<!\S)RAM ({_N})/({_N})MB(?!\S)", re.ASCII)
_CPU = re.compile(rf"(?<!\S)CPU \[({_CORE}(?:,{_CORE})*)\](?!\S)", re.ASCII)
_GPU = re.compile(rf"(?<!\S)GR3D2?_FREQ (?:({_N})%)?(?:@(?:({_N})|\[({_N}(?:,{_N})*)\]))?(?!\S)", re.ASCII)
_EMC = re.compile(rf"(?<!\S)EMC_FREQ (?:({_N})%)?(?:@({_N}))?(?!\S)", re.ASCII)
_ZONE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d{1,4}(?:\.\d{1,6})?)C(?!\S)", re.ASCII)
# JetPack 4 gives now/average without a unit, later ones with it, and the newest a peak as well. Engines (``APE 150``)
# have neither unit nor average.
_RAIL = re.compile(rf"(?<!\S)([A-Za-z]\w*) (-?{_N})(?:mW(?:/(-?{_N})mW(?:/-?{_N}mW)?)?|/(-?{_N}))(?!\S)", re.ASCII)


def parse_tegrastats(line: str) -> Tegrastats | None:
    """A line that tegrastats printed (JetPack 4 to 7, Nano to Thor); None if it is something else."""
    ram, cpu = _RAM.search(line), _CPU.search(line)
    if ram is None or cpu is None:
        return None
    gpus = list(_GPU.finditer(line))
    emc = _EMC.search(line)
    return Tegrastats(
        int(ram[1]),
        int(ram[2]),
        tuple(None if core == "off" else Core(*map(int, core.split("%@"))) for core in cpu[1].split(",")),
        _int(gpus[0][1]) if gpus else None,
        tuple(int(mhz) for found in gpus for mhz in (found[2] or found[3] or "").split(",") if mhz),
        _int(emc[1]) if emc else None,
        _int(emc[2]) if emc else None,
        {name: float(value) for name, value in _ZONE.findall(line) if float(value) > _POWERED_DOWN},
        {f[1]: Rail(int(f[2]), _int(f[3] or f[4])) for f in _RAIL.finditer(line) if f[1] != _NOT_CONNECTED},
    )


def _int(text: str | None) -> int | None:
    return int(text) if text else None


# -- what a board is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerMode:
    """A mode of nvpmodel: its name, and its number where that was told."""

    name: str
    number: int | None


@dataclass(frozen=True)
class Clock:
    """A clock and the bounds it may move in, in Hz.

    Attributes:
        name: ``cpu0``, ``GPU``, ``EMC``.
        low, high: bounds of the governor.
        now: the current frequency.
        online: False for a core that is off.
        override: whether the memory clock is held, or None for other clocks. Its lower bound stays where it is.
    """

    name: str
    low: int
    high: int
    now: int
    online: bool = True
    override: bool | None = None

    @property
    def fixed(self) -> bool:
        """Whether it cannot move."""
        if not self.online:
            return True
        if self.override is not None:
            return self.override
        return self.low == self.high and abs(self.now - self.high) <= _STEADY * self.high


@dataclass(frozen=True)
class Board:
    """A Jetson as it is set up.

    Attributes:
        model: from the device tree, ``NVIDIA Jetson Orin NX Engineering Reference Developer Kit``.
        part: of the module, ``p3767-0000``, or ``""``. Modules of one name differ in cores and memory.
        l4t: version of Jetson Linux, ``36.4.3``, or ``""``.
        mode: the power mode, or None if nvpmodel does not say.
        modes: numbers of the modes that the board knows, by name.
        clocks: CPU, GPU and memory clocks as far as they can be read; the memory's only as root.
    """

    model: str
    part: str
    l4t: str
    mode: PowerMode | None
    modes: Mapping[str, int]
    clocks: tuple[Clock, ...]

    @property
    def name(self) -> str:
        """Model and part for a key: ``jetson-orin-nx-p3767-0000``."""
        words = re.sub(r"\b(nvidia|engineering reference|developer kit)\b", " ", self.model.lower())
        return "-".join(filter(None, (*re.findall(r"[a-z0-9]+", words), self.part)))


_MODE = re.compile(rf"^NV Power Mode:[ \t]*(\S+)[ \t]*(?:\n[ \t]*({_N})[ \t]*$)?", re.ASCII | re.MULTILINE)
_MODES = re.compile(rf"<\s*POWER_MODEL\s+ID=({_N})\s+NAME=(\S+)\s*>", re.ASCII)
_CLOCK = re.compile(
    rf"^(cpu{_N}|GPU|EMC):?[ \t]+(?:Online=(\d)[ \t]+)?(?:\w+=\w+[ \t]+)?"
    r"MinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) CurrentFreq=(\d{1,12})(?: FreqOverride=(\d))?",
    re.ASCII | re.MULTILINE,
)
_RELEASE = re.compile(rf"R({_N}) \(release\), REVISION: (\d[\d.]{{0,20}})", re.ASCII)
_PART = re.compile(r"p\d{4}-\d{4}", re.ASCII)
_GPU_DEVFREQ = re.compile(r"(?:.*\.(?:ga10b|gv11b|gp10b|gpu))|gpu-gpc-\d+", re.ASCII)


def parse_nvpmodel(text: str) -> PowerMode | None:
    """What ``nvpmodel -q`` printed; None if it names no mode."""
    found = _MODE.search(text)
    return PowerMode(found[1], _int(found[2])) if found else None


def parse_nvpmodel_conf(text: str) -> dict[str, int]:
    """The numbers of the modes that /etc/nvpmodel.conf defines, by name."""
    return {name: int(number) for number, name in _MODES.findall(text)}


def parse_jetson_clocks(text: str) -> tuple[Clock, ...]:
    """What ``jetson_clocks --show`` printed of CPU (kHz), GPU and memory (Hz)."""
    found = []
    for name, online, low, high, now, override in _CLOCK.findall(text):
        unit = 1000 if name.startswith("cpu") else 1
        held = override == "1" if override else None
        found.append(Clock(name, int(low) * unit, int(high) * unit, int(now) * unit, online != "0", held))
    return tuple(found)


def parse_release(text: str) -> str:
    """The version in /etc/nv_tegra_release, ``36.4.3``, or ``""``."""
    found = _RELEASE.search(text)
    return f"{found[1]}.{found[2].rstrip('.')}" if found else ""


def board(root: Path = _ROOT) -> Board | None:
    """The Jetson that this is, or None.

    Args:
        root: where /etc, /proc and /sys are.
    """
    release = _read(root / "etc/nv_tegra_release")
    if not release:
        return None
    parts = _PART.findall(_read(root / "proc/device-tree/compatible"))
    return Board(
        _read(root / "proc/device-tree/model"),
        parts[-1] if parts else "",
        parse_release(release),
        parse_nvpmodel(_run("nvpmodel", "-q")),
        parse_nvpmodel_conf(_read(root / "etc/nvpmodel.conf")),
        parse_jetson_clocks(_run("jetson_clocks", "--show")) or _clocks(root),
    )


def board_key(found: Board, tensorrt: str | None = None) -> str:
    """What baselines of a board are kept under: ``jetson-orin-nx-p3767-0000/MAXN/L4T-36.4.3/TRT-10.3.0``.

    Args:
        found: the board.
        tensorrt: version of TensorRT; what is installed if None.
    """
    mode = found.mode.name if found.mode else "unknown"
    installed = _tensorrt() if tensorrt is None else tensorrt
    return "/".join(
        re.sub(r"[^\w.+-]", "_", part)
        for part in (found.name or "jetson", mode, f"L4T-{found.l4t or 'unknown'}", f"TRT-{installed or 'none'}")
    )


def require_locked(
    expected_mode: str | int | None,
    clocks: bool = True,
    *,
    refuse: bool = True,
    found: Board | None = None,
) -> tuple[str, ...]:
    """Check that a Jetson is in its power mode and that its clocks stand still.

    jetson_clocks holds the clocks at the top of what the power mode allows, so both are needed.

    Args:
        expected_mode: name or number; None to take any.
        clocks: whether jetson_clocks must be in force.
        refuse: raise instead of telling.
        found: the board; this one if None.

    Returns:
        what is wrong, each a sentence with the command that mends it; nothing on what is not a Jetson.

    Raises:
        EnvironmentMissing: something is wrong and ``refuse`` is set.
    """
    found = board() if found is None else found
    if found is None:
        return ()
    wrong = list(filter(None, (_wrong_mode(found, expected_mode), _moving(found) if clocks else None)))
    if wrong and refuse:
        raise EnvironmentMissing(
            "the board is not set up for measuring", "; ".join(why for why, _ in wrong), "; ".join(f for _, f in wrong)
        )
    return tuple(f"{why} (fix: {fix})" for why, fix in wrong)


def _wrong_mode(found: Board, expected: str | int | None) -> tuple[str, str] | None:
    if expected is None:
        return None
    number = found.modes.get(expected) if isinstance(expected, str) else expected
    if found.mode and (expected == found.mode.name or (number is not None and number == found.mode.number)):
        return None
    now = f"the power mode is {found.mode.name}" if found.mode else "nvpmodel does not tell the power mode"
    fix = f"sudo nvpmodel -m {number}"
    if number is None:
        known = ", ".join(f"{n} {name}" for name, n in found.modes.items())
        fix = "sudo nvpmodel -m NUMBER" + (f" ({known})" if known else ", see /etc/nvpmodel.conf")
    return f"{now}, not {expected}", fix


def _moving(found: Board) -> tuple[str, str] | None:
    moving = [clock for clock in found.clocks if not clock.fixed]
    if found.clocks and not moving:
        return None
    told = ", ".join(f"{c.name} {c.low / 1e6:.0f}–{c.high / 1e6:.0f} MHz, now {c.now / 1e6:.0f}" for c in moving[:3])
    more = f" and {len(moving) - 3} more" if len(moving) > 3 else ""
    why = f"clocks are not locked: {told}{more}" if moving else "the clocks cannot be read"
    return why, "sudo jetson_clocks"


def _clocks(root: Path) -> tuple[Clock, ...]:
    """CPU (kHz) and GPU (Hz) clocks from /sys, which needs no root."""
    cpus = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    devices = (f for f in sorted(root.glob("sys/class/devfreq/*")) if _GPU_DEVFREQ.fullmatch(f.name))
    found = [_clock(f.parent.name, f, "scaling_{}_freq", 1000) for f in cpus]
    return tuple(filter(None, [*found, *(_clock("GPU", f, "{}_freq", 1) for f in devices)]))


def _clock(name: str, folder: Path, file: str, unit: int) -> Clock | None:
    texts = [_read(folder / file.format(kind)) for kind in ("min", "max", "cur")]
    if not all(map(_is_number, texts)):
        return None
    low, high, now = (int(text) * unit for text in texts)
    return Clock(name, low, high, now)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,15}", text, re.ASCII) is not None


def _tensorrt() -> str:
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return ""


# -- desktop GPUs ------------------------------------------------------------------------------------------------------

# Bit -> name, and whether it means that the clock was taken back (NVML API reference, nvmlClocksEventReasons).
_REASONS = {
    0x001: ("idle", False),
    0x002: ("application clocks", False),
    0x004: ("power cap", True),
    0x008: ("hardware slowdown", True),
    0x010: ("sync boost", False),
    0x020: ("thermal slowdown", True),
    0x040: ("hardware thermal slowdown", True),
    0x080: ("hardware power brake", True),
    0x100: ("display clock", False),
    0x200: ("board limit", True),
    0x400: ("reliability", True),
}
_THROTTLING = frozenset(name for name, throttles in _REASONS.values() if throttles)


@dataclass(frozen=True)
class Gpu:
    """A GPU under NVML; what it does not support is None.

    Attributes:
        index: of the device.
        name: of the product.
        driver: its version.
        sm_mhz, memory_mhz: clocks now.
        max_sm_mhz: the highest clock it has.
        reasons: why the clock is not higher.
        watts: power drawn.
        celsius: temperature of the die.
        persistence: whether the driver stays loaded between programs.
        mig: whether the device is partitioned.
    """

    index: int
    name: str
    driver: str
    sm_mhz: int | None
    memory_mhz: int | None
    max_sm_mhz: int | None
    reasons: tuple[str, ...]
    watts: float | None
    celsius: float | None
    persistence: bool | None
    mig: bool | None


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVML knows; none without a driver or without nvidia-ml-py."""
    with _nvml() as nvml:
        return _gpus(nvml) if nvml else ()


def reason_names(mask: int) -> tuple[str, ...]:
    """The names of NVML's clock event reasons; a bit without a name is written as a number."""
    named = [name for bit, (name, _) in _REASONS.items() if mask & bit]
    rest = mask & ~sum(_REASONS)
    return (*named, *([f"0x{rest:x}"] if rest else []))


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The module pynvml, ready, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield None
        return
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpus(nvml: Any) -> tuple[Gpu, ...]:
    def ask(query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return query(*arguments)
        except nvml.NVMLError:
            return None

    driver = ask(nvml.nvmlSystemGetDriverVersion) or ""
    found = []
    for index in range(ask(nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        # The second name is that of the same function before driver 535.
        mask = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        mask = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) if mask is None else mask
        milliwatts = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        persistence = ask(nvml.nvmlDeviceGetPersistenceMode, handle)
        mig = ask(nvml.nvmlDeviceGetMigMode, handle)
        found.append(
            Gpu(
                index,
                ask(nvml.nvmlDeviceGetName, handle) or "",
                driver,
                ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
                ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
                ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
                reason_names(mask or 0),
                None if milliwatts is None else milliwatts / 1000,
                ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                None if persistence is None else persistence == nvml.NVML_FEATURE_ENABLED,
                None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
            )
        )
    return tuple(found)


# -- sampling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The state at one moment.

    Attributes:
        time: of :func:`time.perf_counter`, in seconds.
        board: what tegrastats said, or None.
        gpus: what NVML said.
        events: counters of over-current and throttling events, by name; they only grow.
        over: zones above the temperature at which the kernel throttles.
    """

    time: float
    board: Tegrastats | None = None
    gpus: tuple[Gpu, ...] = ()
    events: Mapping[str, int] = field(default_factory=dict)
    over: tuple[str, ...] = ()

    def clocks(self) -> dict[str, int]:
        """Clocks in MHz by name; 0 for a core that is off. A GPU that idles has no clock worth comparing."""
        found: dict[str, int] = {}
        if self.board:
            found |= {f"CPU {i}": core.mhz if core else 0 for i, core in enumerate(self.board.cpus)}
            found |= {f"GPU {i}": mhz for i, mhz in enumerate(self.board.gpu_mhz)}
            found |= {} if self.board.emc_mhz is None else {"memory": self.board.emc_mhz}
        for gpu in self.gpus:
            if gpu.sm_mhz is not None and "idle" not in gpu.reasons:
                found[f"{gpu.name} {gpu.index}"] = gpu.sm_mhz
        return found


class Sampler:
    """Reads the state at least twice a second in a thread of its own while its block runs.

    On a Jetson ``tegrastats`` sets the pace; elsewhere NVML is asked. Where there is neither, ``samples`` stays empty.

    Args:
        interval: seconds between readings.
        root: where /sys is.
        nvml: whether to ask NVML; a GPU that others use says nothing about what runs on the CPU.
    """

    def __init__(self, interval: float = INTERVAL, root: Path = _ROOT, nvml: bool = True):
        self.samples: list[Reading] = []
        self._nvml = nvml
        self._interval, self._root, self._trips = interval, root, trips(root)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sampler:
        program = shutil.which("tegrastats")
        if program:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [program, "--interval", str(max(1, int(self._interval * 1000)))],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    text=True, errors="replace", start_new_session=True,
                )  # fmt: skip
        self._thread = threading.Thread(target=self._follow if self._process else self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._process:
            # The group, since what it may have started would keep the pipe open.
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(2)
                    break
        if self._thread:
            self._thread.join(5)

    def _follow(self) -> None:
        assert self._process and self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                stats = parse_tegrastats(line)
                if stats:
                    self.samples.append(self._reading(stats, ()))

    def _poll(self) -> None:
        with _nvml() if self._nvml else contextlib.nullcontext() as nvml:
            while nvml and not self._stop.is_set():
                found = _gpus(nvml)
                if not found:
                    return
                self.samples.append(self._reading(None, found))
                self._stop.wait(self._interval)

    def _reading(self, stats: Tegrastats | None, found: tuple[Gpu, ...]) -> Reading:
        zones = stats.temperatures.items() if stats else ()
        over = tuple(name for name, celsius in zones if celsius >= self._trips.get(_zone(name), float("inf")))
        return Reading(time.perf_counter(), stats, found, events(self._root), over)


def throttled(samples: Sequence[Reading], start: float, end: float) -> str:
    """What disturbed the machine in an interval, in words for a person, or ``""``.

    The readings right before and after the interval count too: a change between two readings may lie on either side.

    Args:
        samples: in order of time; of a machine that cannot be sampled none, and then nothing is known against it.
        start, end: of :func:`time.perf_counter`, in seconds.
    """
    if not samples:
        return ""
    inside = [r for r in samples if start <= r.time <= end]
    before = [r for r in samples if start - _STALE <= r.time < start][-1:]
    after = [r for r in samples if end < r.time <= end + _STALE][:1]
    near = [*before, *inside, *after]
    if not near:
        return "the machine's state was not read in this interval"
    for reading in near:
        for zone in reading.over:
            celsius = reading.board.temperatures[zone] if reading.board else float("nan")
            return f"{zone} was at {celsius:.1f} °C, where the kernel throttles"
        for gpu in reading.gpus:
            for reason in gpu.reasons:
                if reason in _THROTTLING:
                    return f"{gpu.name}: {reason}"
    for name, count in near[-1].events.items():
        grown = count - near[0].events.get(name, count)
        if grown > 0:
            return f"{name} counted {grown} more {'event' if grown == 1 else 'events'}"
    return _clock_changed(near)


def _clock_changed(near: Sequence[Reading]) -> str:
    seen: dict[str, list[int]] = {}
    for reading in near:
        for name, mhz in reading.clocks().items():
            seen.setdefault(name, []).append(mhz)
    for name, values in seen.items():
        low, high = min(values), max(values)
        if high - low > _STEADY * high:
            return f"the clock of {name} moved between {low} and {high} MHz"
    return ""


def events(root: Path = _ROOT) -> dict[str, int]:
    """Counters of throttling: over-current events of a Jetson (oc1: under-voltage, oc2: average, oc3: peak), and the
    thermal throttle counts of x86 packages.
    """
    found = {}
    for file in sorted(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")):
        text = _read(file)
        if _is_number(text):
            found[file.name.removesuffix("_event_cnt")] = int(text)
    for file in root.glob("sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"):
        text = _read(file)
        if _is_number(text):
            found["package thermal throttling"] = int(text)
    return found


def trips(root: Path = _ROOT) -> dict[str, float]:
    """°C at which the kernel begins to throttle, by the zone's name as tegrastats shortens it, in lower case.

    The PMIC is left out: tegrastats prints a constant for it.
    """
    found: dict[str, float] = {}
    for zone in root.glob("sys/class/thermal/thermal_zone*"):
        name = _zone(_read(zone / "type"))
        for kind in zone.glob("trip_point_*_type"):
            text = _read(zone / kind.name.replace("_type", "_temp"))
            throttles = name not in ("", "pmic") and _read(kind) in ("passive", "hot")
            if throttles and _is_number(text) and int(text) > 0:  # 0: a trip that is not set
                found[name] = min(int(text) / 1000, found.get(name, float("inf")))
    return found


def _zone(name: str) -> str:
    """``CPU-therm``, ``cpu-thermal`` and ``Tboard_tegra`` as ``cpu``, ``cpu`` and ``tboard``."""
    return re.split(r"[-_]", name, maxsplit=1)[0].lower()


# -- Linux -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuConditions:
    """How busy the CPUs are with other things.

    Attributes:
        cores: CPUs that this process may run on.
        load: processes that run or wait, averaged over a minute.
        waiting: share of the last 10 s in which some process waited for a CPU, or None (no pressure information).
        stolen: CPU ticks that the hypervisor gave to others, since boot.
        ticks: all CPU ticks since boot.
        governor: of the first CPU, or ``""``.
        mhz: current clock of each CPU that tells one.
        max_mhz: the highest clock of each of them.
    """

    cores: int
    load: float
    waiting: float | None
    stolen: int
    ticks: int
    governor: str
    mhz: tuple[int, ...]
    max_mhz: tuple[int, ...]


_PRESSURE = re.compile(r"^some avg10=(\d{1,3}\.\d+)", re.ASCII | re.MULTILINE)


def cpu_conditions(root: Path = _ROOT) -> CpuConditions:
    """Look at /proc and /sys now."""
    ticks = [int(t) for t in _read(root / "proc/stat").partition("\n")[0].split()[1:] if _is_number(t)]
    pressure = _PRESSURE.search(_read(root / "proc/pressure/cpu"))
    load = re.match(r"\d{1,6}\.\d+", _read(root / "proc/loadavg"), re.ASCII)
    cpufreq = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq"))
    clocks = [(_read(f / "scaling_cur_freq"), _read(f / "cpuinfo_max_freq")) for f in cpufreq]
    known = [(int(now) // 1000, int(top) // 1000) for now, top in clocks if _is_number(now) and _is_number(top)]
    return CpuConditions(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        float(load[0]) if load else 0.0,
        float(pressure[1]) / 100 if pressure else None,
        ticks[7] if len(ticks) > 7 else 0,
        sum(ticks[:8]),  # guest time, the ninth, is contained in user time
        _read(cpufreq[0] / "scaling_governor") if cpufreq else "",
        tuple(now for now, _ in known),
        tuple(top for _, top in known),
    )


def explain(now: CpuConditions, before: CpuConditions | None = None) -> str:
    """What may have disturbed a measurement, for a person: ``8.3 runnable processes on 2 cores``; ``""`` if nothing.

    Args:
        now: after the measurement.
        before: before it; without it, time stolen by the hypervisor is not known.
    """
    said = []
    if now.load > now.cores:
        said.append(f"{now.load:.1f} runnable processes on {now.cores} core{'s' * (now.cores != 1)}")
    if now.waiting is not None and now.waiting >= 0.1:
        said.append(f"processes waited for a CPU in {100 * now.waiting:.0f} % of the last 10 s")
    if before and now.ticks > before.ticks:
        stolen = (now.stolen - before.stolen) / (now.ticks - before.ticks)
        if stolen >= 0.01:
            said.append(f"the hypervisor gave {100 * stolen:.0f} % of the CPU time to others")
    if now.governor not in ("", "performance"):
        said.append(f"the governor {now.governor} moves the clocks")
    return "; ".join(said)


# -- for the fingerprint -----------------------------------------------------------------------------------------------


def facts(root: Path = _ROOT) -> dict[str, Any]:
    """What the machine is, as far as measurements depend on it: ready for JSON, without what changes by itself.

    Keys: ``board`` (``key``, ``model``, ``part``, ``l4t``, ``mode``, ``tensorrt``, ``locked``) or None; ``gpus``
    (``name``, ``driver``, ``persistence``, ``mig``, ``max_sm_mhz``); ``governor``.
    """
    found = board(root)
    described = None
    if found:
        described = {
            "key": board_key(found),
            "model": found.model,
            "part": found.part,
            "l4t": found.l4t,
            "mode": found.mode.name if found.mode else "",
            "tensorrt": _tensorrt(),
            "locked": bool(found.clocks) and all(clock.fixed for clock in found.clocks),
        }
    lasting = ("name", "driver", "persistence", "mig", "max_sm_mhz")
    return {
        "board": described,
        "gpus": [{key: value for key, value in asdict(gpu).items() if key in lasting} for gpu in gpus()],
        "governor": cpu_conditions(root).governor,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip(" \t\r\n\0")
    except OSError:
        return ""


def _run(*command: str) -> str:
    """What a command prints, or ``""`` if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
