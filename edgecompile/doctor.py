"""What is installed, what it can do here, what is missing, and the command that gets it.

Versions come from package metadata, so nothing heavy is imported but what a target's own probe needs. Every probe runs
in a thread of its own; one that fails or hangs costs its line, never the answer.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from edgecompile import measure, registry
from edgecompile.target import Capability

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "edgecompile.doctor/1"
_COMMAND_SECONDS = 2.0
_FIX = "→"
_L4T = Path("/etc/nv_tegra_release")
_ROOT = Path("/")


@dataclass(frozen=True)
class Section:
    """A group of lines under one title."""

    title: str
    items: tuple[Capability, ...]


def diagnose() -> list[Section]:
    """Look at everything; never raises."""
    probes: dict[str, Sequence[Callable[[], Iterable[Capability]]]] = {
        "machine": [_python, _system, _cpu, _memory, _cache, _jetson],
        "packages": [_packages],
        "targets": [lambda name=name: _target(name) for name in _targets()],
        "gpu": [_gpus],
        "compilers": [lambda tool=tool: _compiler(tool) for tool in _COMPILERS],
    }
    with ThreadPoolExecutor(max_workers=16) as pool:
        running = {title: [pool.submit(_guarded, p) for p in group] for title, group in probes.items()}
        return [Section(title, tuple(c for r in group for c in r.result())) for title, group in running.items()]


def as_dict(sections: Sequence[Section] | None = None) -> dict[str, Any]:
    """The findings for ``--json``; looks now if none are given."""
    found = diagnose() if sections is None else sections
    return {
        "schema": SCHEMA,
        "machine": measure.machine(),
        "sections": [{"title": s.title, "items": [asdict(c) for c in s.items]} for s in found],
    }


def render(console: Console, sections: Sequence[Section] | None = None) -> None:
    """Print the findings as tables; looks now if none are given."""
    from rich.table import Table
    from rich.text import Text

    found = diagnose() if sections is None else sections
    width = max((len(c.name) for s in found for c in s.items), default=0)
    for section in found:
        table = Table(title=section.title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(width=1)
        table.add_column(width=min(width, 30), overflow="fold")
        table.add_column(overflow="fold")
        for item in section.items:
            # Text, not markup: rich would take the brackets of edgecompile[cpu] for a style.
            said = Text("  ".join(filter(None, (item.version, item.detail))))
            if item.fix:
                said = Text("\n" if said else "").join((said, Text(f"{_FIX} {item.fix}", "cyan")))
            mark = Text("✓", "green") if item.available else Text("✗", "red")
            table.add_row(mark, Text(item.name), said)
        console.print(table)
        console.print()


def _guarded(probe: Callable[[], Iterable[Capability]]) -> list[Capability]:
    try:
        return list(probe())
    except Exception as error:  # a broken installation must not take the doctor down
        return [Capability(getattr(probe, "__name__", "probe").strip("_<>"), False, detail=f"probe failed: {error}")]


# -- machine -----------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Capability]:
    wanted = (3, 10)
    ok = sys.version_info[:2] >= wanted
    yield Capability(
        "python", ok, platform.python_version(), sys.executable, "" if ok else "install Python 3.10 or newer"
    )


def _system() -> Iterator[Capability]:
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "") if Path("/etc/os-release").exists() else ""
    yield Capability("system", True, f"{platform.system()} {platform.release()}", release)


def _cpu() -> Iterator[Capability]:
    facts = measure.machine()
    detail = f"{facts['cores']} of {facts['cpus']} cores (CPUs {facts['affinity']})"
    detail += f", {' '.join(facts['features'])}" if facts["features"] else ""
    detail += f", governor {facts['governor']}" if facts["governor"] else ""
    detail += ", virtual machine" if facts["hypervisor"] else ""
    load = ", ".join(map(str, facts["load"]))
    yield Capability("cpu", True, facts["cpu"] or facts["arch"], f"{facts['arch']}, {detail}, load {load}")


def _memory() -> Iterator[Capability]:
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(match[1]) * 1024 if match else 0
    total = measure.machine()["memory_bytes"] or 0
    yield Capability("memory", True, _size(total), f"{_size(free)} available")


def _cache() -> Iterator[Capability]:
    folder = Path(platformdirs.user_cache_dir("edgecompile"))
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    yield Capability("cache", True, detail=f"{folder}, {_size(shutil.disk_usage(existing).free)} free")


def _jetson() -> Iterator[Capability]:
    """The board and its L4T release, e.g. ``# R36 (release), REVISION: 4.3``; nothing elsewhere."""
    board = measure.machine()["board"]
    match = re.search(r"R(\d+).*REVISION: ([\d.]+)", _L4T.read_text()) if _L4T.exists() else None
    if board or match:
        yield Capability("board", True, f"L4T {match[1]}.{match[2]}" if match else "", board)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


# -- packages ----------------------------------------------------------------------------------------------------------

_SHOWN = ("numpy", "onnx", "onnx-graphsurgeon", "torch", "onnxscript")
_GETS = {  # what is asked for most, where a range alone does not say why a package is wanted
    "torch": "exports model.py and builds the zoo",
    "onnxscript": "needed by torch's exporter",
}


def _packages() -> Iterator[Capability]:
    for name in _SHOWN:
        wanted, extra = _requirement(name)
        fix = f"pip install 'edgecompile[{extra}]'" if extra else f"pip install '{name}{wanted}'"
        found = _version(name)
        if not found:
            yield Capability(name, False, detail=_GETS.get(name, "not installed"), fix=fix)
            continue
        ok = _satisfies(found, wanted)
        detail = (_torch_build() if name == "torch" else "") if ok else f"edgecompile is tested with {wanted}"
        yield Capability(name, ok, found, detail, "" if ok else fix)


def _torch_build() -> str:
    """What torch was compiled for, read from its version file rather than by importing it."""
    text = Path(str(distribution("torch").locate_file("torch/version.py"))).read_text()
    match = re.search(r"^cuda\b.*?=\s*'([\d.]+)'", text, re.MULTILINE)
    return f"CUDA {match[1]}" if match else "CPU only"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _requirement(name: str) -> tuple[str, str]:
    """The versions that edgecompile's metadata asks for, e.g. ``>=2.10,<2.14``, and the extra that installs them."""
    try:
        lines = requires("edgecompile") or []
    except PackageNotFoundError:
        return "", ""
    for line in lines:
        match = re.match(rf"{re.escape(name)}\s*([<>=!~][^;]*)?(?:;.*extra == ['\"](\w+)['\"])?\s*$", line)
        if match:
            return (match[1] or "").strip(), match[2] or ""
    return "", ""


def _satisfies(found: str, wanted: str) -> bool:
    """Compare a version with ``>=``, ``<`` and ``==`` clauses; the local part (``+cu130``) does not count."""
    have = _numbers(found)
    for clause in filter(None, wanted.split(",")):
        match = re.match(r"\s*(>=|<|==)\s*(\S+)", clause)
        if match is None:
            continue
        bound = _numbers(match[2])
        if not {">=": have >= bound, "<": have < bound, "==": have == bound}[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])))


# -- targets -----------------------------------------------------------------------------------------------------------


def _targets() -> list[str]:
    try:
        return registry.target_names()
    except Exception:  # two packages claim one name; each target's own line will say so
        return list(registry.TARGETS)


def _target(name: str) -> Iterable[Capability]:
    try:
        first, *others = registry.target(name).probe()
    except Exception as error:  # another package's target may raise anything
        return [Capability(f"target {name}", False, detail=str(error))]
    return [_ADDED.get(name, lambda line: line)(first), *others]


def _tensorrt(line: Capability) -> Capability:
    """Where TensorRT cannot be used, what there is of it: Python packages and system libraries."""
    if line.available:
        return line
    names = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")
    packages = [f"{n} {v}" for n in names if (v := _version(n))]
    patterns = ("usr/lib/*/libnvinfer.so.*", "usr/lib64/libnvinfer.so.*")
    libraries = {path.name for pattern in patterns for path in _ROOT.glob(pattern)}
    there = [*packages, *sorted(libraries)]
    return replace(line, detail="; ".join(filter(None, (line.detail, f"here: {', '.join(there)}" if there else ""))))


def _tvm(line: Capability) -> Capability:
    """TVM with the one version of its companion that it does not crash with."""
    if not line.available:
        return line
    ffi, (pinned, _) = _version("apache-tvm-ffi"), _requirement("apache-tvm-ffi")
    if _satisfies(ffi, pinned):
        return replace(line, detail=f"{line.detail}; apache-tvm-ffi {ffi}")
    trap = f"apache-tvm-ffi {ffi or 'is missing'}: tuning crashes with versions other than {pinned.lstrip('=')}"
    return replace(line, available=False, detail=trap, fix=f"pip install 'apache-tvm-ffi{pinned}'")


_ADDED: Mapping[str, Callable[[Capability], Capability]] = {"trt": _tensorrt, "tvm": _tvm}


# -- commands ----------------------------------------------------------------------------------------------------------


def _gpus() -> Iterator[Capability]:
    if _L4T.exists():
        yield Capability("integrated GPU", True, detail="its driver is part of L4T")
        return
    if shutil.which("nvidia-smi") is None:
        yield Capability("nvidia driver", False, detail="no nvidia-smi on the path", fix="install NVIDIA's driver")
        return
    query = "name,driver_version,memory.total,compute_cap"
    text = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    for line in text.splitlines():
        fields = [f.strip() for f in line.split(",")]
        if len(fields) == 4:
            name, driver, memory, capability = fields
            yield Capability(name, True, f"driver {driver}", f"{memory}, compute capability {capability}")
    if not text:
        yield Capability("nvidia driver", False, detail="nvidia-smi finds no GPU", fix="check `nvidia-smi`")


_COMPILERS = {
    "gcc": "sudo apt-get install gcc",
    "clang": "sudo apt-get install clang",
    "nvcc": "install the CUDA toolkit",
    "aarch64-linux-gnu-gcc": "sudo apt-get install gcc-aarch64-linux-gnu",
    "ssh": "sudo apt-get install openssh-client",
}


def _compiler(tool: str) -> Iterator[Capability]:
    path = shutil.which(tool)
    if path is None:
        yield Capability(tool, False, fix=_COMPILERS[tool])
        return
    match = re.search(r"\d+(\.\d+)+(p\d+)?", _run(path, "-V" if tool == "ssh" else "--version"))
    yield Capability(tool, True, match[0] if match else "", path)


def _run(*command: str) -> str:
    """What a command prints, or ``""`` if it fails or takes longer than 2 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""
