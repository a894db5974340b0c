"""Doctor: it answers quickly, from any installation, and its advice is right."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from edgecompile import doctor, registry
from edgecompile.target import Capability

ROOT = Path(__file__).parents[1]


def lines(title: str) -> dict[str, Capability]:
    found = next(s for s in doctor.diagnose() if s.title == title)
    return {c.name: c for c in found.items}


def printed(width: int = 100) -> str:
    out = io.StringIO()
    doctor.render(Console(file=out, width=width))
    return out.getvalue()


# -- whole answers -----------------------------------------------------------------------------------------------------


def test_answers_in_time_without_importing_torch():
    script = (
        "import sys, time; from edgecompile import doctor; start = time.perf_counter(); doctor.diagnose()\n"
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert float(seconds) < 6  # 0.3 s on an idle machine
    assert torch == "False"


def test_sections():
    found = doctor.diagnose()
    assert [s.title for s in found] == ["machine", "packages", "targets", "gpu", "compilers"]
    for section in found:
        assert section.items
        for item in section.items:
            assert item.available or item.detail or item.fix, f"{item.name} says nothing"


def test_json_holds_what_the_table_shows():
    found = doctor.diagnose()
    data = json.loads(json.dumps(doctor.as_dict(found)))
    assert data["schema"] == "edgecompile.doctor/1"
    assert [s["title"] for s in data["sections"]] == [s.title for s in found]
    assert data["sections"][0]["items"][0] == dataclasses.asdict(found[0].items[0])
    assert data["machine"]["cores"] >= 1


def test_table_marks_lines_and_keeps_commands_whole():
    missing = Capability("engine", False, detail="not here", fix="pip install 'edgecompile[gpu]'")
    out = io.StringIO()
    sections = [doctor.Section("targets", (missing, Capability("other", True, "1.2", "all well")))]
    doctor.render(Console(file=out, width=80), sections)
    text = out.getvalue()
    assert "✗  engine" in text
    assert "→ pip install 'edgecompile[gpu]'" in text
    assert "✓  other" in text
    assert "1.2  all well" in text


@pytest.mark.parametrize("width", [40, 80, 140])
def test_table_fits_the_terminal(width):
    assert max(map(len, printed(width).splitlines())) <= width


# -- the light install -------------------------------------------------------------------------------------------------


def light_install(folder: Path) -> None:
    """A site-packages with the base dependencies only, linked from this one."""
    (folder / "edgecompile").mkdir()
    for file in (ROOT / "edgecompile").iterdir():
        (folder / "edgecompile" / file.name).symlink_to(file)
    for package in ("passes", "targets", "models"):
        (folder / "edgecompile" / package).symlink_to(ROOT / package)
    todo, done = ["edgecompile"], set()
    while todo:
        name = todo.pop()
        done.add(name)
        found = importlib.metadata.distribution(name)
        needs = [r for r in found.requires or [] if ";" not in r]
        todo += {n for r in needs if (n := doctor.re.split(r"[\s<>=!~\[(]", r)[0].lower()) not in done}
        if name == "edgecompile":
            (folder / "edgecompile-0.dist-info").mkdir()
            metadata = found.read_text("METADATA") or found.read_text("PKG-INFO")
            (folder / "edgecompile-0.dist-info" / "METADATA").write_text(metadata or "")
            continue
        for top in {Path(str(f)).parts[0] for f in found.files or [] if not str(f).startswith(("..", "__pycache__"))}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))


def test_light_install(tmp_path):
    light_install(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import json; from edgecompile import doctor; print(json.dumps(doctor.as_dict()))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {i["name"]: i for s in json.loads(done.stdout)["sections"] for i in s["items"]}
    assert found["onnx"]["available"]
    assert found["numpy"]["available"]
    assert (found["torch"]["available"], found["torch"]["fix"]) == (False, "pip install 'edgecompile[torch]'")
    assert (found["onnxruntime"]["available"], found["onnxruntime"]["fix"]) == (
        False,
        "pip install 'edgecompile[cpu]'",
    )


# -- packages ----------------------------------------------------------------------------------------------------------


def install(monkeypatch, folder: Path, name: str, version: str) -> None:
    """Put the metadata of a package that is not there on the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_packages_have_the_versions_of_their_metadata():
    found = lines("packages")
    for name in ("numpy", "onnx", "onnx-graphsurgeon"):
        assert (found[name].version, found[name].available) == (importlib.metadata.version(name), True)


def test_torch_outside_the_tested_range(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "torch", "2.14.0")
    found = lines("packages")["torch"]
    assert not found.available
    assert "<2.14" in found.detail
    assert found.fix == "pip install 'edgecompile[torch]'"


def test_torch_says_what_it_was_compiled_for(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "torch", "2.13.0+cu130")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    found = lines("packages")["torch"]
    assert (found.available, found.version, found.detail) == (True, "2.13.0+cu130", "CUDA 13.0")


@pytest.mark.parametrize(("ffi", "works"), [("0.1.14.post1", True), ("0.1.15.post2", False)])
def test_tvm_version_trap(monkeypatch, tmp_path, ffi, works):
    install(monkeypatch, tmp_path, "apache-tvm", "0.27.0.post1")
    install(monkeypatch, tmp_path, "apache-tvm-ffi", ffi)
    (tmp_path / "tvm").mkdir()
    (tmp_path / "tvm" / "__init__.py").write_text("raise RuntimeError('no probe imports it')\n")
    found = lines("targets")["tvm compiler"]
    assert found.available is works
    assert found.fix == ("" if works else "pip install 'apache-tvm-ffi==0.1.14.post1'")
    assert f"apache-tvm-ffi {ffi}" in found.detail


def test_tensorrt_says_what_there_is_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    missing = Capability("TensorRT", False, detail="no Python module", fix="install it")
    assert doctor._tensorrt(missing) == missing
    (tmp_path / "usr/lib/aarch64-linux-gnu").mkdir(parents=True)
    (tmp_path / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10").touch()
    install(monkeypatch, tmp_path, "tensorrt-cu13", "11.4.0")
    told = doctor._tensorrt(missing).detail
    assert told == "no Python module; here: tensorrt-cu13 11.4.0, libnvinfer.so.10"
    works = Capability("TensorRT", True, "10.3.0", "strongly typed on request")
    assert doctor._tensorrt(works) == works


def test_everything_is_said_once():
    items = [item for section in doctor.diagnose() for item in section.items]
    names = [item.name.lower() for item in items]
    assert len(names) == len(set(names))
    for runtime in ("tensorrt", "tvm"):
        told = [name for name in names if name.split()[0] == runtime and "linker" not in name and "device" not in name]
        assert len(told) == 1, told


@pytest.mark.parametrize(
    ("found", "wanted", "answer"),
    [
        ("2.10.0", ">=2.10,<2.14", True),
        ("2.13.1+cu130", ">=2.10,<2.14", True),
        ("2.9.1", ">=2.10,<2.14", False),
        ("2.14.0", ">=2.10,<2.14", False),
        ("1.23", "", True),
        ("0.1.14.post1", "==0.1.14.post1", True),
        ("0.1.14", "==0.1.14.post1", False),
    ],
)
def test_version_ranges(found, wanted, answer):
    assert doctor._satisfies(found, wanted) is answer


def test_requirements_come_from_the_metadata():
    assert doctor._requirement("apache-tvm-ffi") == ("==0.1.14.post1", "tvm")
    wanted, extra = doctor._requirement("onnx")
    assert wanted.startswith(">=1.") and extra == ""
    assert doctor._requirement("no-such-package") == ("", "")


# -- what may break ----------------------------------------------------------------------------------------------------


def test_a_target_that_cannot_be_loaded_costs_its_line_only(monkeypatch):
    monkeypatch.setitem(registry.TARGETS, "broken", "no_such_module:Target")
    found = lines("targets")
    assert not found["target broken"].available
    assert "no_such_module" in found["target broken"].detail
    assert "onnxruntime" in found


def test_a_probe_that_raises_costs_its_line_only(monkeypatch):
    def bad():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_gpus", bad)
    assert "no such device" in lines("gpu")["bad"].detail
    assert "onnxruntime" in lines("targets")


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_compilers_on_the_path(monkeypatch, tmp_path):
    tool(tmp_path, "gcc", "echo 'gcc (Some 99.1.2-3) 99.1.2'")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    found = lines("compilers")
    assert (found["gcc"].available, found["gcc"].version) == (True, "99.1.2")
    assert not found["clang"].available
    assert found["clang"].fix == "sudo apt-get install clang"


def test_a_command_that_hangs_is_left_alone(monkeypatch, tmp_path):
    tool(tmp_path, "clang", "exec /bin/sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setattr(doctor, "_COMMAND_SECONDS", 0.2)
    start = time.perf_counter()
    found = lines("compilers")["clang"]
    assert time.perf_counter() - start < 10
    assert (found.available, found.version) == (True, "")


def test_gpus(monkeypatch, tmp_path):
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA RTX A2000, 580.95.05, 6138 MiB, 8.6'")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    found = lines("gpu")["NVIDIA RTX A2000"]
    assert (found.version, found.detail) == ("driver 580.95.05", "6138 MiB, compute capability 8.6")


def test_no_gpu(monkeypatch, tmp_path):
    tool(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert not lines("gpu")["nvidia driver"].available
