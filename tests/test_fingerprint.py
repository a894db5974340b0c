"""Fingerprints: what is in them, what makes two machines differ, and what cannot be known."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from edgecompile import fingerprint as module
from edgecompile import measure
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.fingerprint import FACTS, Fingerprint, differences, fingerprint, require_same

VERSIONS, OPTIONS = {"onnxruntime": "1.31.1"}, {"threads": 1, "ort_format": False}


def test_the_hard_part_is_of_this_machine_and_engine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    hard, machine = fingerprint(VERSIONS, OPTIONS).hard, measure.machine()
    assert hard["cpu"] == machine["cpu"] and hard["features"].split() == machine["features"]
    assert hard["affinity"] == machine["affinity"] and hard["cores"] == str(machine["cores"])
    assert (hard["versions.onnxruntime"], hard["options.threads"], hard["options.ort_format"]) == (
        "1.31.1",
        "1",
        "False",
    )
    assert hard["env.OMP_NUM_THREADS"] == "3" and "env.TVM_NUM_THREADS" not in hard
    assert all(isinstance(value, str) and value for value in hard.values()), "what is unknown is left out"
    for fact in hard:
        assert fact in FACTS or fact.startswith(module.PREFIXES)


def test_the_soft_part_is_of_this_machine():
    soft = fingerprint({}, {}).soft
    assert soft["kernel"] == f"{os.uname().sysname} {os.uname().release}"
    assert len(soft["load"]) == 3 and isinstance(soft["hypervisor"], bool)
    assert soft["clock_mhz"] is None or 100 < soft["clock_mhz"] < 10_000
    assert soft["temperature"] is None or -50 < soft["temperature"] < 150
    for share in ("psi", "steal"):
        assert soft[share] is None or 0 <= soft[share] <= 100


def test_a_fingerprint_changes_with_the_affinity_of_the_process():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU only")
    code = (
        "import os, json; from edgecompile.fingerprint import fingerprint;"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "print(json.dumps(fingerprint({}, {}).to_json()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pinned, here = Fingerprint.from_json(json.loads(done.stdout)), fingerprint({}, {})
    facts = {text.partition(":")[0] for text in differences(here, pinned)}
    assert "affinity" in facts and facts <= {"affinity", "cores"} and pinned.key != here.key


def test_a_board_says_what_only_it_knows():
    board = {"board": "NVIDIA Jetson AGX Orin", "l4t": "36.4.3", "power_mode": "MAXN", "jetson_clocks": True}
    found = fingerprint({}, {}, board)
    assert {fact: found.hard[fact] for fact in board} == {**board, "jetson_clocks": "True"}
    assert found.class_name == "nvidia-jetson-agx-orin/maxn/l4t-36.4.3"
    with pytest.raises(ValueError, match="temperature"):
        fingerprint({}, {}, {"temperature": 51.0})


@pytest.mark.parametrize(
    ("hard", "expected"),
    [
        ({"cpu": "Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "cores": "6"}, "intel-core-i7-8700k-cpu-3.70ghz/6-cores"),
        (
            {"cpu": "AMD EPYC", "cores": "8", "gpu": "NVIDIA H200", "gpu_cores": "16896", "power_mode": "700 W"},
            "nvidia-h200/16896-cuda-cores/700-w",
        ),
        (
            {"board": "Raspberry Pi 4 Model B Rev 1.4", "cpu": "x", "cores": "4"},
            "raspberry-pi-4-model-b-rev-1.4/4-cores",
        ),
        ({"cpu": "../../*", "cores": "1"}, "unknown/1-cores"),
        ({"cores": "1"}, "unknown/1-cores"),
    ],
)
def test_class_names(hard, expected):
    assert Fingerprint(hard).class_name == expected


def test_the_key_follows_the_hard_part_alone():
    one = Fingerprint({"cpu": "a", "cores": "2"}, {"load": [1.0]})
    assert one.key == Fingerprint({"cores": "2", "cpu": "a"}, {"load": [9.0]}).key
    assert re.fullmatch("[0-9a-f]{12}", one.key)
    others = [
        {"cpu": "a"},
        {"cpu": "a", "cores": "3"},
        {"cpu": "a", "cores": "2", "gpu": "b"},
        {"cpu": "2", "cores": "a"},
    ]
    assert len({one.key, *(Fingerprint(hard).key for hard in others)}) == 5


def test_two_fingerprints_of_one_machine_agree():
    one, other = fingerprint(VERSIONS, OPTIONS), fingerprint(VERSIONS, OPTIONS)
    assert one.key == other.key and differences(one, other) == []
    require_same(one, other, "the latency of net")


def test_a_stored_fingerprint_is_the_same():
    one = fingerprint(VERSIONS, {**OPTIONS, "levels": (1, 2)})
    stored = json.loads(json.dumps(one.to_json()))
    assert Fingerprint.from_json(stored) == one and (stored["key"], stored["class"]) == (one.key, one.class_name)
    assert fingerprint(VERSIONS, {**OPTIONS, "levels": [1, 2]}).key == one.key, "options come back from JSON as lists"


@pytest.mark.parametrize("document", [None, {}, {"schema": "edgecompile.fingerprint/2", "hard": {}, "soft": {}},
                                      {"schema": module.SCHEMA, "hard": {"cores": 2}, "soft": {}},
                                      {"schema": module.SCHEMA, "hard": {}}])  # fmt: skip
def test_what_is_no_fingerprint_is_refused(document):
    with pytest.raises(InputError, match="the fingerprint cannot be read"):
        Fingerprint.from_json(document)


def test_every_difference_is_named_and_refused():
    here = Fingerprint({"cpu": "A", "cores": "2", "driver": "550", "env.OMP_NUM_THREADS": "1"}, {"kernel": "x"})
    there = Fingerprint({"cpu": "B", "cores": "2", "driver": "550", "l4t": "36.4"}, {"kernel": "y"})
    expected = ["cpu: A here, B there", "env.OMP_NUM_THREADS: 1 here, nothing there", "l4t: nothing here, 36.4 there"]
    assert differences(here, there) == expected
    with pytest.raises(EnvironmentMissing) as caught:
        require_same(there, here, "the latency of net")
    assert caught.value.exit_code == 4 and all(text in str(caught.value) for text in expected)
    assert str(caught.value).startswith("the latency of net cannot be compared with this machine (a/2-cores, ")
    with pytest.raises(EnvironmentMissing):
        require_same(Fingerprint(), here, "numbers without a fingerprint")


def test_pressure_and_steal_are_read_as_the_kernel_writes_them():
    assert module._psi("some avg10=2.11 avg60=6.93 avg300=6.18 total=4142705462\nfull avg10=0.00") == 2.11
    assert module._psi("") is None and module._psi("full avg10=7.00 avg60=0") is None
    assert module._steal("cpu  60 0 20 10 0 0 5 5 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n") == 5.0
    assert module._steal("cpu0 1 2 3 4 5 6 7 8 9 10\n") is None and module._steal("cpu  0 0 0 0 0 0 0 0\n") is None


# -- GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_gpu_is_the_one_that_nvidia_smi_names():
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    name, driver, limit = (text.strip() for text in done.stdout.split(","))
    hard = fingerprint({}, {}).hard
    assert (hard["gpu"], hard["driver"]) == (name, driver) and int(hard["gpu_cores"]) % 64 == 0
    assert hard["power_mode"] == f"{int(float(limit))} W"


class _Nvml(SimpleNamespace):
    """NVML's functions for a machine with two GPUs; the real library answers only where there is one."""

    class NVMLError(Exception):
        pass

    def __init__(self, silent: tuple[str, ...] = ()):
        def refuse(*_: object):
            raise self.NVMLError("Not Supported")

        devices = {0: 0, 1: 1, "GPU-b": 1}
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda i: devices[i] if i in devices else refuse(),
            "nvmlDeviceGetHandleByUUID": lambda i: devices[i] if i in devices else refuse(),
            "nvmlDeviceGetName": lambda d: (b"NVIDIA RTX A", "NVIDIA RTX B")[d],
            "nvmlDeviceGetNumGpuCores": lambda d: (1024, 2048)[d],
            "nvmlSystemGetDriverVersion": lambda: "550.54.15",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12040,
            "nvmlDeviceGetPowerManagementLimit": lambda d: 250_999,
        }
        super().__init__(**{name: refuse if name in silent else answer for name, answer in answers.items()})


GPU_B = {"gpu": "NVIDIA RTX B", "gpu_cores": 2048, "driver": "550.54.15", "cuda": "12.4", "power_mode": "250 W"}


def test_the_gpu_in_use_is_described(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert module._gpu() == {**GPU_B, "gpu": "NVIDIA RTX A", "gpu_cores": 1024}
    for visible in ("1", "1,0", " GPU-b "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert module._gpu() == GPU_B
    for visible in ("", "-1", "7", "GPU-c"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert module._gpu() == {}


def test_a_gpu_that_does_not_tell_everything(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(silent=("nvmlDeviceGetPowerManagementLimit",)))
    assert module._gpu() == {**GPU_B, "power_mode": None}
    hard = fingerprint({}, {}).hard
    assert hard["gpu"] == "NVIDIA RTX B" and hard["gpu_cores"] == "2048" and "power_mode" not in hard


def test_without_a_driver_or_the_binding_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(silent=("nvmlInit",)))
    assert module._gpu() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert module._gpu() == {}


def test_every_function_that_is_asked_exists_in_the_binding():
    binding = pytest.importorskip("pynvml")
    for name in vars(_Nvml()):
        assert hasattr(binding, name)
