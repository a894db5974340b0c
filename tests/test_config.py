"""``edgecompile.toml``: what every key means, and that whatever is wrong is an error with its line and its remedy."""

from __future__ import annotations

import hashlib
import math
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompile import config
from edgecompile.config import GateConfig, Parity
from edgecompile.errors import InputError
from edgecompile.fingerprint import Fingerprint

ORIN = Fingerprint(
    {"board": "NVIDIA Jetson AGX Orin", "l4t": "36.4.3", "power_mode": "MAXN", "cores": "12", "jetson_clocks": "True"}
)
DESKTOP = Fingerprint({"cpu": "AMD EPYC", "cores": "2", "versions.onnxruntime": "1.31.1"})


def gate(folder: Path, text: str) -> GateConfig:
    (folder / "e.toml").write_text(textwrap.dedent(text))
    return config.load_gate(folder / "e.toml")


def complaint(folder: Path, text: str) -> str:
    """The whole message, with the folder left out."""
    with pytest.raises(InputError) as caught:
        gate(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def documented() -> str:
    return textwrap.dedent((config.__doc__ or "").split("::\n", 1)[1])


def test_the_documented_file_is_read_whole(tmp_path):
    found = gate(tmp_path, documented())
    assert (found.max_regression, found.alpha, found.time_limit) == (0.05, 0.01, 60.0)
    assert (found.on_inconclusive, found.retries, found.baseline, found.anchor) == ("retry", 2, "main", "v1.0")
    assert found.budgets == {
        "latency_p50": 4e-3,
        "latency_p99": 9e-3,
        "peak_memory": 150 * 2**20,
        "engine_size": 12_000_000,
        "build_time": 600.0,
        "parity": 1e-3,
        "accuracy": 0.71,
    }
    assert list(found.budgets) == list(config.BUDGETS), "the documented file shows every budget"
    assert found.parity == Parity(1e-4, "baseline")
    (orin,) = found.devices
    assert (orin.name, orin.match) == ("orin", {"class": "jetson-agx-orin*/maxn/*"})
    assert (orin.transport, orin.nvpmodel, orin.jetson_clocks, orin.dla_fallback_max) == (
        "ssh://orin", "MAXN", True, 0,
    )  # fmt: skip
    assert orin.budgets == {"latency_p50": 2e-3}
    assert found.digest == hashlib.sha256((tmp_path / "e.toml").read_bytes()).hexdigest()


def test_a_file_without_a_gate_gives_the_defaults(tmp_path):
    found = gate(tmp_path, "[build]\ntarget = 'ort'\n")
    plain = GateConfig(places=found.places, digest=found.digest)
    assert found == plain and found.devices == () and found.budgets == {}


def test_the_build_table_is_read_beside_a_gate(tmp_path):
    (tmp_path / "e.toml").write_text(documented())
    assert config.load(tmp_path / "e.toml", "build", ("target", "max_drop", "prune")) == {
        "target": "ort",
        "max_drop": "0.5%",
        "prune": "0.7x",
    }
    with pytest.raises(InputError, match=r"e\.toml:5: \[build\] has no key 'target'; did you mean 'targets'"):
        config.load(tmp_path / "e.toml", "build", ("targets",))


def test_places_are_the_lines_of_the_file(tmp_path):
    text = '''
    # gate.alpha = 3
    [ gate ]  # a comment
    alpha = 0.01
    baseline = """
    [gate.budgets]
    latency_p50 = 1
    """
    parity.tolerance = 1e-3

    [gate.budgets]
    accuracy = 1

    [gate.device."orin"]
    match = { class = "a", versions.tensorrt = "10.*" }
      [gate.device.orin.budgets]
      "accuracy" = 2
    '''
    found = gate(tmp_path, text)
    lines = {key: int(place.rpartition(":")[2]) for key, place in found.places.items()}
    assert lines == {
        "gate": 3,
        "gate.alpha": 4,
        "gate.baseline": 5,
        "gate.parity": 9,
        "gate.parity.tolerance": 9,
        "gate.budgets": 11,
        "gate.budgets.accuracy": 12,
        "gate.device": 14,
        "gate.device.orin": 14,
        "gate.device.orin.match": 15,
        "gate.device.orin.match.class": 15,
        "gate.device.orin.match.versions": 15,
        "gate.device.orin.match.versions.tensorrt": 15,
        "gate.device.orin.budgets": 16,
        "gate.device.orin.budgets.accuracy": 17,
    }
    assert set(found.places.values()) == {f"{tmp_path / 'e.toml'}:{line}" for line in lines.values()}


def test_places_do_not_depend_on_the_line_ends(tmp_path):
    (tmp_path / "e.toml").write_bytes(b"[gate]\r\n\r\nalpha = 0.02\r\n")
    found = config.load_gate(tmp_path / "e.toml")
    assert found.alpha == 0.02 and found.places["gate.alpha"].endswith(":3")


NOT_THE_FORMAT = {
    "unknown table": ("[gaet]", "e.toml:1: there is no table [gaet]; did you mean 'gate'?"),
    "table of a later version": ("[postprocess]", "e.toml:1: there is no table [postprocess]; did you mean 'preproc"),
    "unknown key": ("[gate]\n\nmax_regresion = 1", "e.toml:3: [gate] has no key 'max_regresion'; did you mean"),
    "unknown budget": ("[gate.budgets]\nlatency = '4ms'", "e.toml:2: [gate.budgets] has no key 'latency'; did y"),
    "unknown in parity": ("[gate.parity]\ntol = 1", "e.toml:2: [gate.parity] has no key 'tol'"),
    "unknown in device": ("[gate.device.a]\nmatch = 'a'\nmod = 1", "e.toml:3: [gate.device.a] has no key 'mod'"),
    "unknown device budget": ("[gate.device.a]\nbudgets.p50 = 1\nmatch = 'a'", "e.toml:2: [gate.device.a.budgets] has"),
    "no table": ("gate = 3", "e.toml:1: gate must be a table; fix: write [gate] on a line of its own"),
    "tables in a list": ("[[gate]]\nalpha = 0.1", "e.toml:1: gate must be a table"),
    "budgets are no table": ("[gate]\nbudgets = 3", "e.toml:2: gate.budgets must be a table"),
    "device is no table": ("[gate.device]\norin = 'x'", "e.toml:2: gate.device.orin must be a table"),
    "a later version": ("version = 2", "e.toml:1: version = 2 is unknown; this edgecompile reads version 1"),
    "version is a flag": ("version = true", "e.toml:1: version = true is unknown"),
    "name of a device": ("[gate.device.'a.b']\nmatch = 'x'", 'gate.device = "a.b" is not the name of a device'),
    "device without match": ("[gate.device.a]\nnvpmodel = 0", "e.toml:1: gate.device.a has no match"),
    "not TOML": ("[gate", "e.toml is not TOML"),
    "absurd number": (f"[gate]\nalpha = {'9' * 5000}", "e.toml is not TOML"),
    "absurd depth": (f"[gate]\nalpha = {'[' * 100_000}", "e.toml is not TOML"),
}


@pytest.mark.parametrize("case", NOT_THE_FORMAT)
def test_what_is_not_in_the_file_format_is_refused(tmp_path, case):
    text, message = NOT_THE_FORMAT[case]
    assert message in complaint(tmp_path, f"{text}\n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_regression", '"5"', 'gate.max_regression = "5" is not a fraction; fix: write it like "5%" or 0.05'),
        ("max_regression", "5", "= 5 is out of range; it must be above zero and below 1; fix: write it like"),
        ("max_regression", "0", "= 0 is out of range"),
        ("max_regression", '"-5%"', "is not a fraction"),
        ("max_regression", "-0.05", "is out of range"),
        ("max_regression", "nan", "is out of range"),
        ("max_regression", "inf", "is out of range"),
        ("max_regression", "true", "= true is not a fraction"),
        ("max_regression", '"5 percent"', "is not a fraction"),
        ("max_regression", "1979-05-27", "is not a fraction"),
        ("alpha", "0.5", "it must be above zero and below 0.5"),
        ("time_limit", '"60"', 'is not a duration; fix: write it like "4ms" (units: ns, us, µs, ms, s, m, min, h)'),
        ("time_limit", '"60 sec"', "is not a duration"),
        ("time_limit", '"60S"', "is not a duration"),
        ("time_limit", "0", "is out of range"),
        ("time_limit", "-1", "is out of range"),
        ("time_limit", "inf", "is out of range"),
        ("time_limit", "nan", "is out of range"),
        ("time_limit", f"1{'0' * 400}", "is out of range"),
        ("on_inconclusive", '"retry"', '"error", "warn" or "retry:2"'),
        ("on_inconclusive", '"retry:0"', "is not an answer"),
        ("on_inconclusive", '"ERROR"', "is not an answer"),
        ("on_inconclusive", "3", "is not an answer"),
        ("baseline", '" "', "is not a name"),
        ("anchor", "1", "= 1 is not a name"),
        ("budgets.latency_p50", "4", "gate.budgets.latency_p50 = 4 is not a duration"),
        ("budgets.latency_p50", '"0ms"', "is out of range"),
        ("budgets.latency_p50", '"1e-999s"', "is out of range"),
        ("budgets.latency_p50", '"1e999s"', "is out of range"),
        ("budgets.latency_p50", '"4MB"', "is not a duration"),
        ("budgets.latency_p99", '"4 m s"', "is not a duration"),
        ("budgets.latency_p99", '"٤ms"', "is not a duration"),
        ("budgets.latency_p99", '"ms"', "is not a duration"),
        ("budgets.build_time", "true", "is not a duration"),
        ("budgets.peak_memory", '"150mib"', 'is not a size; fix: write it like "150MiB", "12MB" or 1048576 (units: B'),
        ("budgets.peak_memory", "1.5", "= 1.5 is not a size"),
        ("budgets.peak_memory", "true", "is not a size"),
        ("budgets.peak_memory", "0", "is out of range"),
        ("budgets.peak_memory", '"0.4B"', "is out of range"),
        ("budgets.engine_size", "-1", "is out of range"),
        ("budgets.engine_size", '"1e30GB"', "is out of range"),
        ("budgets.engine_size", '"4ms"', "is not a size"),
        ("budgets.parity", "-1e-3", "is out of range"),
        ("budgets.parity", "nan", "is out of range"),
        ("budgets.parity", '"high"', "is not a fraction"),
        ("budgets.accuracy", "nan", "is not a score"),
        ("budgets.accuracy", "inf", "is not a score"),
        ("budgets.accuracy", '"71%"', "is not a score"),
        ("budgets.accuracy", "true", "is not a score"),
        ("parity.tolerance", "-1", "is out of range"),
        ("parity.against", '"main"', 'write it like "baseline" or "source"'),
        ("device.a.match", '""', "is not a pattern for a fact"),
        ("device.a.match", "{}", "is not a class of devices"),
        ("device.a.match", "3", "= 3 is not a class of devices"),
        ("device.a.match", "{ gpus = 'H200' }", "a fingerprint has no fact 'gpus'; did you mean 'gpu'?"),
        ("device.a.match", "{ cores = [2] }", "gate.device.a.match.cores = [2] is not a pattern for a fact"),
        ("device.a.match", "{ cores = 2.0 }", "is not a pattern for a fact"),
        ("device.a.transport", '"orin"', 'write it like "ssh://orin"'),
        ("device.a.transport", '"http://orin"', "is not a way to reach a device"),
        ("device.a.transport", '"ssh://"', "is not a way to reach a device"),
        ("device.a.transport", '"ssh://-oProxyCommand=x"', "is not a way to reach a device"),
        ("device.a.transport", '"ssh://a b"', "is not a way to reach a device"),
        ("device.a.transport", "22", "is not a way to reach a device"),
        ("device.a.nvpmodel", "true", "is not a power mode"),
        ("device.a.nvpmodel", "-1", "is not a power mode"),
        ("device.a.jetson_clocks", '"true"', 'gate.device.a.jetson_clocks = "true" is not true or false'),
        ("device.a.jetson_clocks", "1", "is not true or false"),
        ("device.a.dla_fallback_max", "-1", "is not a number of layers"),
        ("device.a.dla_fallback_max", "true", "is not a number of layers"),
        ("device.a.dla_fallback_max", "1.0", "is not a number of layers"),
        ("device.a.budgets.latency_p50", "2", "gate.device.a.budgets.latency_p50 = 2 is not a duration"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line_and_an_example(tmp_path, key, value, message):
    match = "device.a.match = 'x'\n" if key.startswith("device.a.") and key != "device.a.match" else ""
    found = complaint(tmp_path, f"[gate]\n\n{key} = {value}\n{match}")
    assert message in found and ("fix: " in found or "did you mean" in found)
    assert "e.toml:3: gate." in found


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_regression", '"2.5%"', 0.025),
        ("alpha", '"1 %"', 0.01),
        ("time_limit", "90", 90.0),
        ("time_limit", "0.5", 0.5),
        ("time_limit", '"1.5 min"', 90.0),
        ("budgets.latency_p50", '"250us"', 250e-6),
        ("budgets.latency_p50", '"250µs"', 250e-6),
        ("budgets.latency_p50", '"1.2s"', 1.2),
        ("budgets.latency_p50", '"900ns"', 900e-9),
        ("budgets.build_time", '"2h"', 7200.0),
        ("budgets.peak_memory", "4096", 4096),
        ("budgets.peak_memory", '"1.5KiB"', 1536),
        ("budgets.peak_memory", '"2 GiB"', 2 * 2**30),
        ("budgets.engine_size", '"3kB"', 3000),
        ("budgets.parity", '"0.1%"', 1e-3),
        ("budgets.parity", "0", 0.0),
        ("budgets.accuracy", "-3", -3.0),
    ],
)
def test_values_become_seconds_bytes_and_fractions(tmp_path, key, value, expected):
    found = gate(tmp_path, f"[gate]\n{key} = {value}\n")
    got = found.budgets[key.partition(".")[2]] if "." in key else getattr(found, key)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("value", ["ssh://orin", "ssh://me@10.0.0.2:2222", "ssh://orin/opt/venv/bin/python3"])
def test_a_transport_is_what_the_command_line_takes(tmp_path, value):
    assert gate(tmp_path, f"[gate.device.a]\nmatch = 'x'\ntransport = '{value}'\n").devices[0].transport == value


def test_a_power_mode_is_a_name_or_a_number(tmp_path):
    for value in ('"0"', "0"):
        assert gate(tmp_path, f"[gate.device.a]\nmatch = 'x'\nnvpmodel = {value}\n").devices[0].nvpmodel == "0"


@pytest.mark.parametrize(
    ("text", "expected"), [("error", ("error", 0)), ("warn", ("warn", 0)), ("retry:12", ("retry", 12))]
)
def test_answers_to_an_inconclusive_result(text, expected):
    assert config.on_inconclusive(text, "--on-inconclusive") == expected


def test_the_command_line_is_named_where_it_is_wrong():
    with pytest.raises(InputError, match=r'^--time-limit = "5 minutes" is not a duration'):
        config.seconds("5 minutes", "--time-limit")


@given(st.decimals(0, 10**6, places=3).filter(lambda d: d > 0), st.sampled_from(["", " "]))
def test_durations_round_trip(number, space):
    for unit, scale in {"ns": 1e9, "us": 1e6, "ms": 1e3, "s": 1, "min": 1 / 60, "h": 1 / 3600}.items():
        assert math.isclose(config.duration(f"{number}{space}{unit}", "x") * scale, float(number), rel_tol=1e-12)


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_a_duration_in_seconds_is_the_float_that_is_written(number):
    assert config.duration(f"{number!r}s", "x") == number == config.seconds(number, "x")


@given(st.integers(1, 2**40))
def test_sizes_round_trip(number):
    for unit, scale in {"B": 1, "kB": 1000, "MB": 1000**2, "KiB": 1024, "MiB": 1024**2}.items():
        assert config.size(f"{number}{unit}", "x") == number * scale
    assert config.size(number, "x") == number


@given(st.decimals("0.001", "99.999", places=3))
def test_percentages_round_trip(number):
    assert math.isclose(config.fraction(f"{number}%", "x", high=1), float(number) / 100, rel_tol=1e-15)


@given(st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_a_reader_answers_within_its_range_or_refuses(value):
    for reader, high in ((config.duration, math.inf), (config.seconds, math.inf), (config.size, 2**63)):
        try:
            assert 0 < reader(value, "x") < high
        except InputError as error:
            assert error.fix or error.why


# -- devices -----------------------------------------------------------------------------------------------------------

DEVICES = """
[gate.budgets]
latency_p50 = "9ms"
accuracy = 0.7
[gate.device.maxn]
match = "*jetson-agx-orin/maxn/*"
budgets.latency_p50 = "2ms"
[gate.device.orin]
match = { board = "*Orin*", cores = 12, jetson_clocks = true }
[gate.device.old]
match = { versions.onnxruntime = "1.2?.*" }
"""


def test_the_first_device_that_fits_counts(tmp_path):
    found = gate(tmp_path, DEVICES)
    here = found.for_device(ORIN)
    assert here.device is found.devices[0]
    assert here.budgets == {"latency_p50": 2e-3, "accuracy": 0.7}
    assert here.places["gate.budgets.latency_p50"].endswith(":7") and here.places["gate.budgets.accuracy"].endswith(
        ":4"
    )
    assert found.places["gate.budgets.latency_p50"].endswith(":3"), "the file's own are untouched"


def test_a_device_that_fits_in_part_does_not_count(tmp_path):
    found = gate(tmp_path, DEVICES)
    slower = Fingerprint({**ORIN.hard, "power_mode": "15W"})
    assert (chosen := found.for_device(slower).device) and chosen.name == "orin"
    for fact, value in {"cores": "8", "jetson_clocks": "False", "board": "NVIDIA Jetson Xavier"}.items():
        assert found.for_device(Fingerprint({**slower.hard, fact: value})).device is None
    assert found.for_device(Fingerprint({k: v for k, v in slower.hard.items() if k != "cores"})).device is None


def test_without_a_device_that_fits_the_general_budgets_hold(tmp_path):
    found = gate(tmp_path, DEVICES)
    assert found.for_device(DESKTOP) == found
    older = Fingerprint({**DESKTOP.hard, "versions.onnxruntime": "1.23.0"})
    assert (chosen := found.for_device(older).device) and chosen.name == "old"


@pytest.mark.parametrize(
    ("value", "text"), [("0.5%", "0.5%"), ("0.5 %", "0.5%"), (0.005, "0.005"), (0, "0.0"), ("1", "1")]
)
def test_a_drop_of_a_score_is_a_share_or_a_number(value, text):
    assert str(config.drop(value, "--max-drop")) == text


@pytest.mark.parametrize("value", ["", "half", -0.1, "-1%", True, None, "200%"])
def test_what_is_no_drop_is_refused_with_an_example(value):
    with pytest.raises(InputError, match="--max-drop") as caught:
        config.drop(value, "--max-drop")
    assert "0.5%" in caught.value.fix
