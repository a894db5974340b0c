"""Options of the target ``tvm`` and the LLVM or CUDA target that they mean."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecompile import config, measure
from edgecompile.errors import EnvironmentMissing, InputError, did_you_mean
from edgecompile.target import read_flag, read_threads

OPTIONS: Mapping[str, tuple[Any, str]] = {
    "threads": ("auto", "threads of one operator; auto: every physical core this process may use. 1 is timed best"),
    "mcpu": ("", "CPU to compile for, as LLVM calls it, e.g. cortex-a78; this machine's by default"),
    "mattr": ("", "CPU features on top of mcpu, e.g. +dotprod,-sve; this machine's by default"),
    "mtriple": ("", "target triple of a cross-compilation, e.g. aarch64-linux-gnu"),
    "linker": ("", "compiler that links the library; the machine's own, or TRIPLE-gcc"),
    "arch": ("", "CUDA architecture, e.g. sm_87: compile for a GPU instead of the CPU; needs nvcc"),
    "winograd": (True, "Winograd's algorithm for 3x3 convolutions where it pays and its error stays below 1e-5"),
    "activations": (
        "float32",
        "what meets coded weights (pass shift_add): float32; int8 rounds each token to 8 bits where that pays",
    ),
    "schedules": (True, "use edgecompile's own schedules; without them every operator gets TVM's default lowering"),
    "tune": ("", "how long to look for faster kernels, e.g. 10m, here or on boards; 0s takes what searches found"),
    "tuning": ("", "folder of a bundle or cache whose tuning records are applied, without looking any further"),
}
_ACTIVATIONS = ("float32", "int8")
THREADS_PER_BLOCK, SHARED_BYTES, WARP = 1024, 48 << 10, 32  # what every CUDA device since sm_50 has

# Features that Linux names one way and LLVM another, by the first word of the triple.
_LLVM_NAMES: Mapping[str, Mapping[str, str]] = {
    "x86_64": {
        **{f: f for f in ("avx", "avx2", "fma", "avx512f", "avx512bw")},
        "avx512_vnni": "avx512vnni",
        "avx512_vpopcntdq": "avx512vpopcntdq",
        "avx_vnni": "avxvnni",
        "avx512_bf16": "avx512bf16",
        "amx_int8": "amx-int8",
        "amx_bf16": "amx-bf16",
    },
    "aarch64": {
        "asimd": "neon",
        "asimdhp": "fullfp16",
        "asimddp": "dotprod",
        **{f: f for f in ("i8mm", "bf16", "sve", "sve2")},
    },
}
_LINKERS = {"aarch64": "sudo apt-get install gcc-aarch64-linux-gnu", "x86_64": "sudo apt-get install gcc"}


@dataclass(frozen=True)
class Options:
    """The options, parsed.

    Attributes:
        threads: of one operator.
        target: the dictionary that ``tvm.target.Target`` takes.
        machine: first word of the triple: ``x86_64``, ``aarch64``.
        linker: the compiler that links, ``""`` for TVM's own choice.
        schedules: whether to use our own schedules.
        winograd: whether convolutions may use Winograd's algorithm.
        integers: whether activations that meet coded weights may be rounded to 8 bits.
        tune: seconds to look for faster kernels, None: do not look.
        tuning: the folder whose tuning records are applied, ``""``: none.
    """

    threads: int
    target: Mapping[str, Any]
    machine: str
    linker: str
    schedules: bool
    winograd: bool
    integers: bool
    tune: float | None = None
    tuning: str = ""

    @property
    def cuda(self) -> str:
        """The CUDA architecture, or ``""``."""
        return self.target.get("arch", "")

    @property
    def runs_here(self) -> bool:
        """Whether a CPU of this kind could load the library at all."""
        return self.machine == platform.machine()


def parse(given: Mapping[str, Any]) -> Options:
    """Options as given on the command line or recorded in a manifest.

    Raises:
        InputError: an option is unknown or has no such value.
    """
    given = {name: value for name, value in given.items() if not name.startswith("_")}  # those are remarks
    for name in given:
        if name not in OPTIONS:
            raise InputError(
                f"target tvm has no option {name!r}", did_you_mean(name, OPTIONS) or f"it has {', '.join(OPTIONS)}"
            )
    value = {name: given.get(name, default) for name, (default, _) in OPTIONS.items()}
    triple = str(value["mtriple"])
    machine = triple.partition("-")[0] or platform.machine()
    if machine not in _LLVM_NAMES:
        raise InputError(f"mtriple={triple} is not supported", f"it must begin with {' or '.join(_LLVM_NAMES)}")
    arch = str(value["arch"])
    own = machine == platform.machine() and not arch  # beside a GPU the CPU starts kernels, which any of its kind does
    host: dict[str, Any] = {"kind": "llvm", **_cpu(machine, triple, str(value["mcpu"]), str(value["mattr"]), own)}
    target = host
    if arch:
        if not arch.startswith("sm_") or not arch[3:].isdigit():
            raise InputError(f"arch={arch} is not a CUDA architecture", "it must be sm_NUMBER", "for example sm_87")
        target = {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": THREADS_PER_BLOCK,
            "max_num_threads": THREADS_PER_BLOCK,
            "max_shared_memory_per_block": SHARED_BYTES,
            "thread_warp_size": WARP,
            "host": host,
        }
    linker = str(value["linker"]) or (f"{machine}-linux-gnu-gcc" if machine != platform.machine() else "")
    schedules, winograd = (read_flag(name, value[name]) for name in ("schedules", "winograd"))
    if value["activations"] not in _ACTIVATIONS:
        raise InputError(f"activations={value['activations']} is not known", f"it may be {' or '.join(_ACTIVATIONS)}")
    integers = value["activations"] == "int8"
    tune = config.time_box(value["tune"], "tune") if value["tune"] not in ("", None) else None
    tuning = str(value["tuning"])
    if tune is not None and tuning:
        raise InputError(
            "tune and tuning cannot both be given", "tuning names records that are to be taken as they are"
        )
    if (tune is not None or tuning) and (arch or not schedules):
        raise InputError(
            f"{'tune' if tuning == '' else 'tuning'} has nothing to choose from",
            "what is tuned are edgecompile's own schedules for CPUs",
            f"leave out {'arch' if arch else 'schedules=no'}",
        )
    threads = read_threads(value["threads"])
    return Options(threads, target, machine, linker, schedules, winograd, integers, tune, tuning)


def _cpu(machine: str, triple: str, mcpu: str, mattr: str, own: bool) -> dict[str, Any]:
    """The LLVM target's keys; ``own``: this CPU and exactly the features it says it has, unless others are given."""
    keys: dict[str, Any] = {"mtriple": triple} if triple else {}
    if own and not mcpu and not mattr:
        from tvm.target import codegen

        present = set(measure.cpu_features())
        mcpu = codegen.llvm_get_system_cpu()
        mattr = ",".join(f"{'+' if f in present else '-'}{name}" for f, name in _LLVM_NAMES[machine].items())
    if mcpu:
        keys["mcpu"] = mcpu
    if mattr:
        keys["mattr"] = mattr.split(",")
    return keys


def device(chosen: Options) -> str:
    """What the code runs on: the machine, and the features that LLVM may use on it."""
    return f"cuda {chosen.cuda}" if chosen.cuda else host(chosen)


def host(chosen: Options) -> str:
    """The machine, and the features that LLVM may use on it; beside a GPU, what starts the kernels."""
    from tvm.target import Target, codegen

    target = Target(dict(chosen.target.get("host", chosen.target)))
    names = _LLVM_NAMES[chosen.machine].items()
    return " ".join([chosen.machine, *(f for f, name in names if codegen.target_has_features(name, target))])


def require_linker(chosen: Options) -> None:
    """Refuse before compiling what nothing could link.

    Raises:
        EnvironmentMissing: the linker is not on the path.
    """
    names = [chosen.linker] if chosen.linker else ["gcc", "g++", "clang", "cc"]
    if not any(map(shutil.which, names)):
        raise EnvironmentMissing(
            f"nothing links a library for {chosen.machine}", f"{names[0]} is not on the path", _LINKERS[chosen.machine]
        )
