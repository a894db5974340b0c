"""Conditions: recorded output of real boards, boards made of files and scripts, and a double with NVML's functions."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompile import conditions
from edgecompile.conditions import Board, Clock, Core, Gpu, PowerMode, Rail, Reading, Sampler, Tegrastats, throttled
from edgecompile.errors import EnvironmentMissing

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


# -- tegrastats --------------------------------------------------------------------------------------------------------

# Where each line was published, and what a person reads in it: RAM in MB, CPU, GPU load and MHz, memory load and MHz,
# a temperature, number of temperatures, a rail and the number of rails.
LINES = {
    # https://github.com/martinkersner/gtop/pull/7 (AGX Xavier, JetPack 4.2, comment of 2019-06-17)
    "xavier_agx_jp4": (
        (14700, 15692), (Core(0, 1190),) * 8, (0, ()), (0, None), ("CPU", 31.5), 8, ("GPU", Rail(463, 463)), 6,
    ),
    # Published as a comment in source code that reads `sudo tegrastats` of a Xavier NX, search "VDD_IN 3528/3569".
    "xavier_nx_jp4": (
        (2387, 7774), (Core(14, 1190), Core(9, 1190), Core(2, 1190), Core(4, 1190), Core(0, 1190), Core(1, 1344)),
        (0, (114,)), (1, 1600), ("thermal", 31.95), 6, ("VDD_IN", Rail(3528, 3569)), 3,
    ),
    # Published as the docstring of a "Jetson Xavier collector", search "VDD_CPU_GPU_CV 696mW/696mW".
    "xavier_nx_jp5": (
        (2690, 6854), (Core(3, 1904), Core(7, 1906), Core(1, 1905), Core(0, 1907), None, None),
        (0, (510,)), (0, 1600), ("GPU", 37.5), 5, ("VDD_CPU_GPU_CV", Rail(696, 696)), 3,
    ),
    # https://github.com/GDWR/jetson_exporter/issues/14 (AGX Orin); zones without power read -256
    "orin_agx_jp5": (
        (4321, 62801), (Core(0, 729),) * 12, (0, (0, 0)), (0, 2133), ("tj", 44.343), 7,
        ("VDD_GPU_SOC", Rail(2340, 2340)), 4,
    ),
    # https://github.com/henrygd/beszel/blob/main/agent/gpu_test.go, "more valid data" (Orin Nano, as root)
    "orin_nano_jp6_root": (
        (6185, 7620), tuple(Core(load, 729) for load in (15, 11, 14, 13, 11, 8)), (63, (621,)), (43, 2133),
        ("gpu", 53.343), 6, ("VDD_IN", Rail(12479, 12479)), 3,
    ),
    # The same file, "orin nano" (not as root: no clock of the GPU, nothing of the memory)
    "orin_nano_jp6": (
        (3452, 7620),
        (Core(1, 1420), Core(2, 1420), Core(0, 1420), Core(2, 1420), Core(2, 729), Core(1, 729)),
        (0, ()), (None, None), ("soc1", 50.25), 6, ("VDD_SOC", Rail(1475, 1475)), 3,
    ),
    # Published in notes on L4T 38.4, search "GR3D_FREQ @[314,314,314] NVENC0_FREQ"; its fields are those of
    # https://docs.nvidia.com/jetson/archives/r38.4/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
    "thor_jp7_root": (
        (105265, 125772), tuple(Core(load, 972) for load in (0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8, 0, 0)),
        (None, (314, 314, 314)), (0, 2750), ("soc345", 37.406), 5, ("VDD_GPU", Rail(1962, 1962)), 4,
    ),
    # https://github.com/wendylabsinc/wendy-agent go/internal/agent/hoststats/gpu_test.go (Thor, JetPack 7.2): no
    # GR3D_FREQ at all, and rails with a third value
    "thor_jp7": (
        (36529, 125749), tuple(Core(load, 972) for load in (2, 1, *(0,) * 11, 2)), (None, ()), (None, None),
        ("gpu", 62.906), 5, ("VIN", Rail(87426, 43713)), 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_recorded_lines_of_tegrastats(name):
    ram, cpus, gpu, memory, (zone, celsius), zones, (rail, power), rails = LINES[name]
    found = conditions.parse_tegrastats(recorded(f"tegrastats_{name}"))
    assert found is not None
    assert (found.ram_used_mb, found.ram_total_mb) == ram
    assert found.cpus == cpus
    assert (found.gpu_load, found.gpu_mhz) == gpu
    assert (found.emc_load, found.emc_mhz) == memory
    assert found.temperatures[zone] == celsius
    assert len(found.temperatures) == zones
    assert found.power[rail] == power
    assert len(found.power) == rails


def test_every_recorded_line_is_tested():
    assert {p.stem.removeprefix("tegrastats_") for p in RECORDED.glob("tegrastats_*")} == LINES.keys()


def test_zones_without_power_and_unconnected_rails_are_left_out():
    found = conditions.parse_tegrastats(recorded("tegrastats_orin_agx_jp5"))
    assert found and "GPU" not in found.temperatures and "NC" not in found.power


def test_rails_may_be_negative():
    # A Thor at idle, from a comment in source code: "VDD_GPU -392mW/-392mW"
    found = conditions.parse_tegrastats("RAM 1/2MB CPU [2%@972] VDD_GPU -392mW/-392mW")
    assert found and found.power == {"VDD_GPU": Rail(-392, -392)}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "tegrastats: command not found",
        "RAM 1/2MB",  # no CPU
        "CPU [2%@972]",  # no RAM
        "RAM 1/2MB CPU [2%@972",  # torn
        "RAM 1/2MB CPU [2%@972,what]",
        "RAM 1/2GB CPU [2%@972]",
        f"RAM {'9' * 5000}/2MB CPU [2%@972]",  # int() refuses it
        "RAM ١/٢MB CPU [2%@972]",  # digits to \\d without re.ASCII
    ],
)
def test_what_is_not_a_line_is_none(line):
    assert conditions.parse_tegrastats(line) is None


@st.composite
def mutated(draw) -> str:
    line = recorded(f"tegrastats_{draw(st.sampled_from(sorted(LINES)))}")
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(line)))
        line = draw(
            st.sampled_from(
                (
                    line[:at],
                    line[at:],
                    line[:at] + draw(st.text(max_size=4)) + line[at + 1 :],
                    line[:at] + draw(st.from_regex(r"[\d@%/\[\],. -]{1,12}", fullmatch=True)) + line[at:],
                    " ".join(draw(st.permutations(line.split(" ")))) if len(line) < 600 else line,
                )
            )
        )
    return line


@given(mutated())
def test_mutated_lines_never_raise(line):
    found = conditions.parse_tegrastats(line)
    assert found is None or (found.cpus and found.ram_total_mb >= 0)


@given(st.text() | mutated())
def test_no_parser_raises(text):
    conditions.parse_nvpmodel(text)
    conditions.parse_nvpmodel_conf(text)
    conditions.parse_jetson_clocks(text)
    conditions.parse_release(text)


# -- nvpmodel, jetson_clocks, the release ------------------------------------------------------------------------------


def test_power_modes():
    # https://github.com/open-rdc/orne-box/issues/16 (AGX Xavier, JetPack 4, cut after the name)
    assert conditions.parse_nvpmodel(recorded("nvpmodel_xavier_jp4")) == PowerMode("MAXN", None)
    # Published in notes on a Jetson Nano, search "NV Power Mode: 5W": the number has a line of its own
    assert conditions.parse_nvpmodel(recorded("nvpmodel_nano_jp4")) == PowerMode("5W", 1)
    # An Orin Nano under JetPack 6.2, as public scripts expect it: search "NV Power Mode: MAXN_SUPER" "^2$"
    assert conditions.parse_nvpmodel(recorded("nvpmodel_orin_nano_jp6")) == PowerMode("MAXN_SUPER", 2)
    assert conditions.parse_nvpmodel("NVPM ERROR: failed to read the mode") is None


def test_modes_by_name():
    # Published in notes on a reComputer (Orin NX), search "POWER_MODEL ID=3 NAME=25W"
    text = "# a comment\n< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=3 NAME=25W >\n"
    assert conditions.parse_nvpmodel_conf(text) == {"MAXN": 0, "25W": 3}


def test_locked_clocks_are_told_from_moving_ones():
    # Notes on overclocking an Orin NX, search "OverClock(CPU: 2.3GHz & GPU: 1.3GHz)": before and after
    moving = conditions.parse_jetson_clocks(recorded("jetson_clocks_orin_nx_moving"))
    locked = conditions.parse_jetson_clocks(recorded("jetson_clocks_orin_nx_locked"))
    assert [c.name for c in moving] == [c.name for c in locked] == [*(f"cpu{i}" for i in range(8)), "GPU", "EMC"]
    assert moving[0] == Clock("cpu0", 729_600_000, 1_984_000_000, 1_804_800_000)
    assert locked[8] == Clock("GPU", 1_287_750_000, 1_287_750_000, 1_287_750_000)
    # jetson_clocks leaves the lower bound of the memory clock where it is
    assert locked[9] == Clock("EMC", 204_000_000, 3_199_000_000, 3_199_000_000, override=True)
    assert not any(c.fixed for c in moving)
    assert all(c.fixed for c in locked)


def test_a_core_that_is_off_does_not_move():
    # Published as a docstring, search "TSRvideoSave": a Jetson Nano in its 5 W mode, in which two cores are off
    found = conditions.parse_jetson_clocks(recorded("jetson_clocks_nano_locked"))
    assert [c.online for c in found] == [True, True, False, False, True, True]
    assert all(c.fixed for c in found)
    assert replace(found[2], low=1).fixed and not replace(found[1], low=1).fixed


def test_the_oldest_form():
    # https://github.com/hordiales/jetson-tx1-dev SCRIPTS.md (TX1, L4T 28.1, which writes "Gonvernor")
    found = conditions.parse_jetson_clocks(recorded("jetson_clocks_tx1_locked"))
    assert len(found) == 6 and all(c.fixed for c in found)


def test_a_clock_held_but_not_there_is_not_fixed():
    assert not Clock("GPU", 10**9, 10**9, 8 * 10**8).fixed


def test_release():
    # https://github.com/rbonghi/jetson_stats/issues/711 (AGX Thor)
    assert conditions.parse_release(recorded("nv_tegra_release_thor")) == "38.2.0"
    assert conditions.parse_release("# R36 (release), REVISION: 4.3, GCID: 1") == "36.4.3"
    assert conditions.parse_release("Ubuntu 22.04") == ""


# -- a board made of files and scripts ---------------------------------------------------------------------------------


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def bin_(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def script(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!{sys.executable} -S\n{textwrap.dedent(body)}")
    (folder / name).chmod(0o755)


# https://github.com/rbonghi/jetson_stats/issues/711: /proc/device-tree/compatible and model of an AGX Thor
THOR = {
    "etc/nv_tegra_release": recorded("nv_tegra_release_thor"),
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
}
CPU_CLOCKS = {f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{k}_freq": "2601000\n" for k in ("min", "max", "cur")}
GPU_CLOCKS = {f"sys/class/devfreq/gpu-gpc-0/{k}_freq": "1575000000\n" for k in ("min", "max", "cur")}


def test_a_board_is_read(tmp_path, bin_):
    script(bin_, "nvpmodel", "import sys; assert sys.argv[1:] == ['-q']; print('NV Power Mode: 120W'); print(1)")
    text = recorded("jetson_clocks_orin_nx_locked")
    script(bin_, "jetson_clocks", f"import sys; assert sys.argv[1:] == ['--show']; print({text!r})")
    found = conditions.board(put(tmp_path, THOR))
    assert found == Board(
        "NVIDIA Jetson AGX Thor Developer Kit", "p3834-0008", "38.2.0", PowerMode("120W", 1), {"MAXN": 0, "120W": 1},
        conditions.parse_jetson_clocks(text),
    )  # fmt: skip
    assert conditions.board_key(found, "10.13.3") == "jetson-agx-thor-p3834-0008/120W/L4T-38.2.0/TRT-10.13.3"


def test_without_root_the_clocks_come_from_sys(tmp_path, bin_):
    script(bin_, "jetson_clocks", "import sys; print('Error: Run this script as a root user'); sys.exit(1)")
    found = conditions.board(
        put(tmp_path, THOR | CPU_CLOCKS | GPU_CLOCKS | {"sys/class/devfreq/15480000.vic/cur_freq": "1"})
    )
    assert found and found.mode is None
    assert found.clocks == (Clock("cpu0", *(2_601_000_000,) * 3), Clock("GPU", *(1_575_000_000,) * 3))


def test_elsewhere_there_is_no_board(tmp_path):
    assert conditions.board(tmp_path) is None
    assert conditions.require_locked("MAXN") == ()


ORIN = Board(
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "p3767-0000", "36.4.3", PowerMode("MAXN", 0),
    {"MAXN": 0, "10W": 1}, conditions.parse_jetson_clocks(recorded("jetson_clocks_orin_nx_locked")),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["MAXN", 0, None])
def test_a_board_that_is_set_up_passes(mode):
    assert conditions.require_locked(mode, found=ORIN) == ()


def test_a_wrong_mode_is_refused_with_the_command_that_mends_it():
    with pytest.raises(EnvironmentMissing) as caught:
        conditions.require_locked("10W", found=ORIN)
    assert caught.value.why == "the power mode is MAXN, not 10W"
    assert caught.value.fix == "sudo nvpmodel -m 1"
    assert conditions.require_locked(1, found=ORIN, refuse=False) == (
        "the power mode is MAXN, not 1 (fix: sudo nvpmodel -m 1)",
    )
    (said,) = conditions.require_locked("15W", found=ORIN, refuse=False)
    assert "sudo nvpmodel -m NUMBER (0 MAXN, 1 10W)" in said


def test_a_mode_that_is_not_told_is_refused():
    with pytest.raises(EnvironmentMissing, match="not set up"):
        conditions.require_locked("MAXN", found=replace(ORIN, mode=None))


def test_moving_clocks_are_refused_unless_they_may_move():
    moving = replace(ORIN, clocks=conditions.parse_jetson_clocks(recorded("jetson_clocks_orin_nx_moving")))
    with pytest.raises(EnvironmentMissing) as caught:
        conditions.require_locked("MAXN", found=moving)
    assert caught.value.fix == "sudo jetson_clocks"
    assert "cpu0 730–1984 MHz, now 1805" in caught.value.why and "and 7 more" in caught.value.why
    assert conditions.require_locked("MAXN", clocks=False, found=moving) == ()
    with pytest.raises(EnvironmentMissing, match="cannot be read"):
        conditions.require_locked("MAXN", found=replace(ORIN, clocks=()))


def test_both_faults_are_told_at_once():
    said = conditions.require_locked("10W", found=replace(ORIN, clocks=()), refuse=False)
    assert len(said) == 2


def test_keys_keep_boards_apart():
    key = conditions.board_key(ORIN, "10.3.0")
    assert key == "jetson-orin-nx-p3767-0000/MAXN/L4T-36.4.3/TRT-10.3.0"
    others = [
        conditions.board_key(replace(ORIN, part="p3767-0001"), "10.3.0"),
        conditions.board_key(replace(ORIN, mode=PowerMode("10W", 1)), "10.3.0"),
        conditions.board_key(replace(ORIN, l4t="36.4.4"), "10.3.0"),
        conditions.board_key(ORIN, "10.4.0"),
    ]
    assert len({key, *others}) == 5
    assert (
        "/" not in conditions.board_key(replace(ORIN, mode=PowerMode("../x", 1)), "1").split("/", 1)[1].split("/L4T")[0]
    )


# -- sampling ----------------------------------------------------------------------------------------------------------

TEGRASTATS = """
    import sys, time
    assert sys.argv[1] == "--interval" and 0 < int(sys.argv[2]) <= 500  # at least twice a second
    while True:
        print({line!r}, flush=True)
        print("noise", flush=True)
        time.sleep(int(sys.argv[2]) / 1000)
"""


def wait_for(sampler: Sampler, readings: int) -> None:
    deadline = time.monotonic() + 20
    while len(sampler.samples) < readings and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(sampler.samples) >= readings


def test_the_sampler_follows_tegrastats_and_stops_it(tmp_path, bin_):
    script(bin_, "tegrastats", TEGRASTATS.format(line=recorded("tegrastats_orin_nano_jp6_root").strip()))
    put(tmp_path, {"sys/class/hwmon/hwmon3/oc3_event_cnt": "37\n"})
    before = threading.active_count()
    start = time.perf_counter()
    with Sampler(root=tmp_path) as sampler:
        wait_for(sampler, 3)
        process = sampler._process
    end = time.perf_counter()
    assert process and process.returncode is not None
    assert threading.active_count() == before
    taken = len(sampler.samples)
    assert all(start <= r.time <= end and r.events == {"oc3": 37} and r.over == () for r in sampler.samples)
    assert [r.time for r in sampler.samples] == sorted(r.time for r in sampler.samples)
    assert sampler.samples[0].board == conditions.parse_tegrastats(recorded("tegrastats_orin_nano_jp6_root"))
    time.sleep(0.6)
    assert len(sampler.samples) == taken
    assert throttled(sampler.samples, sampler.samples[0].time, end) == ""


def test_a_tegrastats_that_will_not_stop_is_killed(tmp_path, bin_):
    stubborn = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("RAM 1/2MB CPU [1%@1]", flush=True)
        time.sleep(60)
    """
    script(bin_, "tegrastats", stubborn)
    with Sampler(root=tmp_path) as sampler:
        wait_for(sampler, 1)
    assert sampler._process and sampler._process.returncode == -9


@pytest.mark.parametrize("body", [None, "import sys; sys.exit(1)", "print('garbage')"])
def test_the_sampler_survives_what_does_not_work(tmp_path, bin_, body):
    if body:
        script(bin_, "tegrastats", body)
    with Sampler(root=tmp_path) as sampler:
        time.sleep(0.2)
    assert sampler.samples == []
    assert throttled(sampler.samples, 0, 1) == ""


def test_an_exception_in_the_block_stops_tegrastats_too(tmp_path, bin_):
    script(bin_, "tegrastats", TEGRASTATS.format(line="x"))
    sampler = Sampler(root=tmp_path)
    with pytest.raises(KeyError), sampler:
        raise KeyError
    assert sampler._process and sampler._process.returncode is not None


STATS = Tegrastats(1, 2, (Core(5, 1500), Core(5, 1498), None), 90, (1000, 1001), 10, 3199, {"tj": 50.0})


def reading(at: float, **changes) -> Reading:
    board = {k: changes.pop(k) for k in list(changes) if k in vars(STATS)}
    return Reading(at, replace(STATS, **board), **changes)


def test_a_steady_machine_is_not_throttled():
    samples = [reading(t / 2, cpus=(Core(t, 1500 + t % 3), Core(0, 1500), None)) for t in range(20)]
    assert throttled(samples, 2, 4) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpu_mhz": (1000, 900)}, "the clock of GPU 1 moved between 900 and 1001 MHz"),
        ({"cpus": (Core(5, 1300), Core(5, 1498), None)}, "the clock of CPU 0 moved between 1300 and 1500 MHz"),
        ({"cpus": (Core(5, 1500), None, None)}, "the clock of CPU 1 moved between 0 and 1498 MHz"),
        ({"emc_mhz": 2133}, "the clock of memory moved between 2133 and 3199 MHz"),
        ({"over": ("tj",), "temperatures": {"tj": 99.5}}, "tj was at 99.5 °C, where the kernel throttles"),
    ],
)
def test_one_disturbed_reading_disturbs_its_interval_only(change, said):
    samples = [reading(t / 2, **(change if t == 10 else {})) for t in range(20)]
    assert throttled(samples, 4.6, 5.3) == said
    assert throttled(samples, 5.1, 5.4) == said  # it may have begun after the reading at 5.0
    assert throttled(samples, 0, 3) == ""
    assert throttled(samples, 6, 9) == ""


def test_a_counter_that_grew_is_told():
    samples = [reading(t / 2, events={"oc3": 7 if t < 10 else 9}) for t in range(20)]
    assert throttled(samples, 4.6, 5.2) == "oc3 counted 2 more events"
    assert throttled(samples, 1, 3) == throttled(samples, 6, 9) == ""


def test_an_interval_without_readings_is_told():
    samples = [reading(0.0), reading(0.5)]
    assert throttled(samples, 10, 11) == "the machine's state was not read in this interval"
    assert throttled(samples, 0.2, 0.9) == ""


def test_a_gpu_that_throttles():
    calm = Gpu(0, "A100", "550", 1410, 1215, 1410, ("application clocks",), 200.0, 60.0, True, False)
    samples = [Reading(t / 2, gpus=(replace(calm, reasons=("power cap",)) if t == 10 else calm,)) for t in range(20)]
    assert throttled(samples, 4.9, 5.2) == "A100: power cap"
    assert throttled(samples, 1, 3) == ""
    idle = replace(calm, sm_mhz=210, reasons=("idle",))
    assert throttled([Reading(0.0, gpus=(idle,)), Reading(0.5, gpus=(calm,))], 0, 1) == ""
    slow = replace(calm, sm_mhz=1100)
    assert "moved between 1100 and 1410" in throttled([Reading(0.0, gpus=(slow,)), Reading(0.5, gpus=(calm,))], 0, 1)


def test_events_and_trips_come_from_sys(tmp_path):
    # The names of NVIDIA's kernel for Orin (drivers/hwmon/tegra23x-oc-event.c) and of its thermal zones
    put(
        tmp_path,
        {
            "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
            "sys/class/hwmon/hwmon3/oc2_event_cnt": "15\n",
            "sys/class/hwmon/hwmon3/oc3_event_cnt": "garbage",
            "sys/class/hwmon/hwmon3/oc1_throt_en": "1\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
            "sys/class/thermal/thermal_zone0/trip_point_0_temp": "104500\n",
            "sys/class/thermal/thermal_zone0/trip_point_1_type": "passive\n",
            "sys/class/thermal/thermal_zone0/trip_point_1_temp": "99000\n",
            "sys/class/thermal/thermal_zone0/trip_point_2_type": "hot\n",
            "sys/class/thermal/thermal_zone0/trip_point_2_temp": "102000\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone1/trip_point_0_type": "passive\n",
            "sys/class/thermal/thermal_zone1/trip_point_0_temp": "0\n",
            "sys/class/thermal/thermal_zone2/type": "PMIC-Die\n",
            "sys/class/thermal/thermal_zone2/trip_point_0_type": "passive\n",
            "sys/class/thermal/thermal_zone2/trip_point_0_temp": "50000\n",
            "sys/class/thermal/thermal_zone3/type": "tj-thermal\n",
            "sys/class/thermal/thermal_zone3/trip_point_0_type": "active\n",
            "sys/class/thermal/thermal_zone3/trip_point_0_temp": "35000\n",
        },
    )
    assert conditions.events(tmp_path) == {"oc1": 0, "oc2": 15}
    assert conditions.trips(tmp_path) == {"cpu": 99.0}
    hot = conditions.parse_tegrastats("RAM 1/2MB CPU [2%@9] CPU@99.5C gpu@99.5C PMIC@100C")
    cool = conditions.parse_tegrastats("RAM 1/2MB CPU [2%@9] CPU@98.5C")
    sampler = Sampler(root=tmp_path)
    assert sampler._reading(hot, ()).over == ("CPU",)
    assert sampler._reading(cool, ()).over == ()


# -- NVML --------------------------------------------------------------------------------------------------------------


class Nvml(types.ModuleType):
    """pynvml with its own names, constants and signatures, whose functions answer from a table.

    A function without an answer is not supported by the device; a name that pynvml lacks is an AttributeError here too.
    """

    def __init__(self, answers):
        super().__init__("pynvml")
        self.answers, self.calls = answers, []
        for name in answers:
            assert callable(getattr(pynvml, name)), name

    def __getattr__(self, name):
        real = getattr(pynvml, name)
        if not inspect.isfunction(real):
            return real

        def call(*arguments):
            inspect.signature(real).bind(*arguments)
            self.calls.append(name)
            answer = self.answers.get(name, pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments) if callable(answer) else answer

        return call


def device(**changes):
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "550.54.15",
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetName": "NVIDIA A100-SXM4-80GB",
        "nvmlDeviceGetClockInfo": lambda _, kind: {pynvml.NVML_CLOCK_SM: 1095, pynvml.NVML_CLOCK_MEM: 1593}[kind],
        "nvmlDeviceGetMaxClockInfo": lambda _, kind: {pynvml.NVML_CLOCK_SM: 1410}[kind],
        "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
        "nvmlDeviceGetPowerUsage": 398_765,
        "nvmlDeviceGetTemperature": lambda _, sensor: {pynvml.NVML_TEMPERATURE_GPU: 71}[sensor],
        "nvmlDeviceGetPersistenceMode": 1,
        "nvmlDeviceGetMigMode": [0, 0],
    }
    return Nvml(answers | changes)


def use(monkeypatch, double) -> Nvml:
    monkeypatch.setitem(sys.modules, "pynvml", double)
    return double


def test_a_gpu_is_read(monkeypatch):
    double = use(monkeypatch, device())
    assert conditions.gpus() == (
        Gpu(0, "NVIDIA A100-SXM4-80GB", "550.54.15", 1095, 1593, 1410, ("power cap",), 398.765, 71, True, False),
    )
    assert double.calls[0] == "nvmlInit" and double.calls[-1] == "nvmlShutdown"


def test_the_double_refuses_what_pynvml_lacks():
    with pytest.raises(AttributeError):
        device().nvmlDeviceGetSmClock("handle")
    with pytest.raises(TypeError):
        device().nvmlDeviceGetClockInfo("handle")  # the real one wants a type too
    with pytest.raises(AttributeError):
        device(nvmlDeviceGetSmClock=1)


def test_an_older_driver_knows_the_reasons_by_another_name(monkeypatch):
    missing = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    mask = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    use(
        monkeypatch,
        device(nvmlDeviceGetCurrentClocksEventReasons=missing, nvmlDeviceGetCurrentClocksThrottleReasons=mask),
    )
    assert conditions.gpus()[0].reasons == ("hardware thermal slowdown",)


def test_a_gpu_that_supports_nothing(monkeypatch):
    # Orin under JetPack 6 and 7: https://github.com/HazyResearch/intelligence-per-watt/issues/40
    some = ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    use(monkeypatch, Nvml({name: device().answers[name] for name in some} | {"nvmlDeviceGetName": "Orin (nvgpu)"}))
    assert conditions.gpus() == (Gpu(0, "Orin (nvgpu)", "", None, None, None, (), None, None, None, None),)


def test_a_gpu_that_is_lost_is_left_out(monkeypatch):
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def handle(index):
        if index == 0:
            raise lost
        return "handle"

    use(monkeypatch, device(nvmlDeviceGetCount=2, nvmlDeviceGetHandleByIndex=handle))
    assert [g.index for g in conditions.gpus()] == [1]


def test_every_reason_of_nvml_has_a_name():
    masks = {
        name: value
        for name, value in vars(pynvml).items()
        if name.startswith(("nvmlClocksEventReason", "nvmlClocksThrottleReason")) and not name.endswith(("All", "None"))
    }
    assert len(masks) > 10
    for value in masks.values():
        (name,) = conditions.reason_names(value)
        assert not name.startswith("0x")
    assert conditions.reason_names(0) == ()
    assert conditions.reason_names(0x4 | 0x40) == ("power cap", "hardware thermal slowdown")
    assert conditions.reason_names(1 << 40) == ("0x10000000000",)


def test_no_driver_and_no_package(monkeypatch):
    use(monkeypatch, device(nvmlInit=pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)))
    assert conditions.gpus() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it is an ImportError
    assert conditions.gpus() == ()


def test_the_real_library_here():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert conditions.gpus() == ()
    else:
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
        assert len(conditions.gpus()) == count


def test_the_sampler_asks_nvml_where_there_is_no_tegrastats(tmp_path, bin_, monkeypatch):
    double = use(monkeypatch, device())
    with Sampler(0.05, tmp_path) as sampler:
        wait_for(sampler, 3)
    assert sampler.samples[0].gpus[0].sm_mhz == 1095 and sampler.samples[0].board is None
    assert double.calls.count("nvmlInit") == double.calls.count("nvmlShutdown") == 1
    with Sampler(0.05, tmp_path, nvml=False) as sampler:
        time.sleep(0.2)
    assert sampler.samples == [] and double.calls.count("nvmlInit") == 1


# -- Linux -------------------------------------------------------------------------------------------------------------

# The forms are those of proc(5) and of the kernel's Documentation/accounting/psi.rst.
BUSY = {
    "proc/pressure/cpu": "some avg10=34.20 avg60=6.15 avg300=4.82 total=4126161729\nfull avg10=0.00 avg60=0.00\n",
    "proc/stat": "cpu  100 20 30 400 5 6 7 80 9 9\ncpu0 1 2 3\n",
    "proc/loadavg": "8.31 4.04 1.02 9/98 7841\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1200000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3600000\n",
}


def test_a_busy_machine_is_explained(tmp_path):
    found = conditions.cpu_conditions(put(tmp_path, BUSY))
    assert (found.load, found.waiting, found.stolen, found.ticks) == (8.31, 0.342, 80, 648)
    assert (found.governor, found.mhz, found.max_mhz) == ("powersave", (1200,), (3600,))
    found = replace(found, cores=2)
    before = replace(found, stolen=70, ticks=548)
    assert conditions.explain(found, before) == (
        "8.3 runnable processes on 2 cores; processes waited for a CPU in 34 % of the last 10 s; "
        "the hypervisor gave 10 % of the CPU time to others; the governor powersave moves the clocks"
    )


def test_a_calm_machine_needs_no_explanation(tmp_path):
    found = conditions.cpu_conditions(put(tmp_path, BUSY))
    calm = replace(found, load=0.9, waiting=0.02, governor="performance", cores=2)
    assert conditions.explain(calm, calm) == ""


def test_a_machine_that_tells_nothing(tmp_path):
    found = conditions.cpu_conditions(tmp_path)
    assert (found.load, found.waiting, found.ticks, found.mhz, found.governor) == (0.0, None, 0, (), "")
    assert conditions.explain(found, found) == ""


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="not Linux")
def test_this_machine():
    found = conditions.cpu_conditions()
    assert found.cores == len(os.sched_getaffinity(0)) and found.ticks > 0
    assert found.load == pytest.approx(os.getloadavg()[0], abs=1)


def test_facts_are_ready_for_json_and_lasting(tmp_path, bin_, monkeypatch):
    import json

    use(monkeypatch, device())
    script(bin_, "nvpmodel", "print('NV Power Mode: 120W')")
    found = conditions.facts(put(tmp_path, THOR | CPU_CLOCKS))
    assert json.loads(json.dumps(found)) == found
    assert found["board"]["mode"] == "120W" and found["board"]["locked"] is True
    assert found["board"]["key"].startswith("jetson-agx-thor-p3834-0008/120W/L4T-38.2.0/TRT-")
    assert found["gpus"] == [
        {"name": "NVIDIA A100-SXM4-80GB", "driver": "550.54.15", "max_sm_mhz": 1410, "persistence": True, "mig": False}
    ]


def test_nothing_but_the_standard_library_is_imported():
    code = (
        "import sys, edgecompile.conditions; std = sys.stdlib_module_names\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} - std))"
    )
    path = {"PYTHONPATH": str(Path(conditions.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", code]  # without site-packages
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__main__", "edgecompile"}
