"""The engine file: what is written is read back, and whatever else is refused before a runtime sees it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.targets.trt import plan
from edgecompile.targets.trt.plan import Header, Machine

ORIN = Machine("10.3.0", "8.7", "linux-aarch64", 2)
THOR = Machine("10.13", "11.0", "linux-aarch64")
PAYLOAD = random.Random(0).randbytes(3000)
START = struct.calcsize("<8sI32s")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "engine.plan"
    path.parent.mkdir()
    plan.write(path, PAYLOAD, ORIN)
    return path


def forged(**changes: object) -> bytes:
    """An engine file whose digests are right but whose header says something else; None drops a field."""
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    values = asdict(Header("10.3.0", "8.7", "linux-aarch64", None, False, "none", len(PAYLOAD), digest)) | changes
    return plan.pack({k: v for k, v in values.items() if v is not ...}) + PAYLOAD


def with_header(text: bytes) -> bytes:
    return struct.pack("<8sI32s", plan.MAGIC, len(text), hashlib.sha256(text).digest()) + text + PAYLOAD


def hostile() -> Iterator[tuple[str, bytes]]:
    """200 files that are not the engine built here: truncated, tampered with, foreign, or for another machine."""
    good, rng = forged(), random.Random(1)
    text = good[START : -len(PAYLOAD)]
    for size in sorted({0, 1, 7, 8, 11, 12, 43, START, START + 1, *(rng.randrange(len(good)) for _ in range(30))}):
        yield f"truncated to {size}", good[:size]
    for place in [0, 7, 8, 11, 12, 43, START, *(rng.randrange(len(good)) for _ in range(80))]:
        bit = 1 << rng.randrange(8)
        yield f"bit {bit} of byte {place}", good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]
    yield "one byte more", good + b"\0"
    yield "two engines", good + good
    yield "payload swapped", good[: -len(PAYLOAD)] + random.Random(2).randbytes(len(PAYLOAD))
    yield "payload shifted", good[: -len(PAYLOAD)] + PAYLOAD[1:] + PAYLOAD[:1]
    yield "no payload", forged(payload_bytes=0, payload_sha256=hashlib.sha256().hexdigest())[: -len(PAYLOAD)]
    for magic in (b"ftrt", b"ptrt", b"\x89PNG\r\n\x1a\n", b"\x7fELF", b"PK\x03\x04", b"\x08\x08\x12\x07pytorch", b"MZ"):
        yield f"foreign {magic!r}", magic + PAYLOAD
    yield "raw plan", PAYLOAD
    yield "header only of text", b"\x89ECTRT\n" + good[8:]
    for name in asdict(Header("", "", "", None, False, "", 0, "")):
        yield f"without {name}", forged(**{name: ...})
        yield f"{name} a list", forged(**{name: []})
        yield f"{name} an object", forged(**{name: {}})
        yield f"{name} a fraction", forged(**{name: 1.5})
    changes = {
        "schema": ["edgecompile.engine/2", "", "edgecompile.engine/1 ", 1],
        "tensorrt": ["10.3.1", "10.16.1.11", "11.4.0.106", "8.6.1", "10", "latest", "", "10.3.0\n", "1" * 5000],
        "compute_capability": ["8.6", "11.0", "9.0", "87", "8", "", "sm_87"],
        "os": ["linux-x86_64", "windows-amd64", "qnx-aarch64", "", "Linux"],
        "dla_core": [-1, 16, "0", True, 2],
        "version_compatible": [1, 0, None, "yes"],
        "hardware": ["all", None, "AMPERE_PLUS"],
        "payload_bytes": [0, -1, len(PAYLOAD) - 1, len(PAYLOAD) + 1, 1 << 62, True, str(len(PAYLOAD))],
        "payload_sha256": ["0" * 64, "", "A" * 64, hashlib.sha256(PAYLOAD).hexdigest().upper()],
    }
    for name, values in changes.items():
        for value in values:
            yield f"{name} = {value!r:.40}", forged(**{name: value})
    yield "an unknown field", forged(extra=1)
    yield "a key twice", with_header(text[:-1] + b', "os": "linux-aarch64"}')
    for odd in (b"{}", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 5000, b" " * plan.HEADER_LIMIT, b"NaN", b'"x"'):
        yield f"header {odd[:8]!r}", with_header(odd)
    for length in (0, 1, plan.HEADER_LIMIT + 1, 0xFFFFFFFF, len(text) - 1, len(text) + 1):
        yield f"length {length}", good[:8] + struct.pack("<I", length) + good[12:]


HOSTILE = list({content: label for label, content in hostile()}.items())


def test_there_are_two_hundred_hostile_files():
    assert len(HOSTILE) >= 200
    assert forged() not in dict(HOSTILE)


@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=[label for _, label in HOSTILE])
def test_refused(tmp_path: Path, number: int):
    path = tmp_path / "engine.plan"
    path.write_bytes(HOSTILE[number][0])
    with pytest.raises((InputError, EnvironmentMissing)) as caught:
        plan.read(path, ORIN)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert caught.value.exit_code in (2, 4)


def test_accepted(tmp_path: Path):
    """The positive twin: the same bytes unharmed."""
    path = tmp_path / "engine.plan"
    path.write_bytes(forged())
    header, payload = plan.read(path, ORIN)
    assert payload == PAYLOAD
    assert header == plan.write(path, PAYLOAD, ORIN)
    assert path.read_bytes() == forged()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_survives(tmp_path: Path, data: st.DataObject):
    good, path = forged(), tmp_path / "engine.plan"
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, min(len(good), start + 64)))
    changed = good[:start] + data.draw(st.binary(max_size=64)) + good[stop:]
    path.write_bytes(changed)
    if changed == good:
        assert plan.read(path, ORIN)[1] == PAYLOAD
    else:
        with pytest.raises(EdgecompileError):
            plan.read(path, ORIN)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(plan._FIELDS)), value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
))  # fmt: skip
def test_no_forged_field_passes_unchecked(tmp_path: Path, name: str, value: object):
    path = tmp_path / "engine.plan"
    path.write_bytes(forged(**{name: value}))
    try:
        header, _ = plan.read(path, ORIN)
    except EdgecompileError:
        return
    assert getattr(header, name) == value and type(getattr(header, name)) is type(value)
    assert plan.compatible(header, ORIN)


def test_the_mismatch_is_told_as_one_line(engine: Path):
    with pytest.raises(EnvironmentMissing) as caught:
        plan.read(engine, THOR)
    told = f"built for sm_87 / TensorRT 10.3.0, here sm_110 / 10.13: run edgecompile build {engine.parent}"
    assert str(caught.value) == told
    assert caught.value.exit_code == 4


def test_system_and_dla_are_told_where_they_matter(tmp_path: Path):
    path = tmp_path / "engine.plan"
    plan.write(path, PAYLOAD, ORIN, dla_core=1)
    assert plan.read(path, ORIN)[0].dla_core == 1
    with pytest.raises(EnvironmentMissing, match=r"linux-aarch64 / DLA 1 .*here sm_87 / linux-x86_64 / 0 DLA cores"):
        plan.read(path, replace(ORIN, os="linux-x86_64", dla_cores=0))
    with pytest.raises(EnvironmentMissing, match="1 DLA cores"):
        plan.read(path, replace(ORIN, dla_cores=1))


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [("10.3.0", "10.3.0", True), ("10.3.0", "10.16.1", True), ("10.3.0", "11.4.0", True), ("10.16.1", "10.3.0", False),
     ("8.6.1", "11.4.0", False), ("11.4.0", "10.16.1", False)],
)  # fmt: skip
def test_version_compatible_engines_go_forward_only(tmp_path: Path, built: str, here: str, runs: bool):
    path, there = tmp_path / "engine.plan", replace(ORIN, tensorrt=here)
    header = plan.write(path, PAYLOAD, replace(ORIN, tensorrt=built), version_compatible=True)
    assert plan.compatible(header, there) is runs
    assert plan.compatible(replace(header, version_compatible=False), there) is (built == here)


@pytest.mark.parametrize(
    ("hardware", "built", "here", "runs"),
    [("ampere_plus", "8.6", "8.9", True), ("ampere_plus", "8.9", "8.6", True), ("ampere_plus", "8.6", "7.5", False),
     ("ampere_plus", "7.5", "8.6", False), ("ampere_plus", "8.7", "11.0", True), ("none", "8.6", "8.9", False),
     ("same_compute_capability", "8.6", "8.6", True), ("same_compute_capability", "8.6", "8.9", False)],
)  # fmt: skip
def test_hardware_levels(tmp_path: Path, hardware: str, built: str, here: str, runs: bool):
    header = plan.write(tmp_path / "e", PAYLOAD, replace(ORIN, compute_capability=built), hardware=hardware)
    assert plan.compatible(header, replace(ORIN, compute_capability=here)) is runs


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop", "missing", "."):
        with pytest.raises(InputError):
            plan.read(tmp_path / name, ORIN)


def test_a_huge_foreign_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "engine.plan"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="more than an engine can have"):
        plan.read(path, ORIN)
    with open(path, "wb") as file:
        file.truncate(1 << 33)  # within the limit, yet only its start is looked at
    with pytest.raises(InputError, match="does not start"):
        plan.read(path, ORIN)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "8.6.1.post1", "10.0.0b6", "11.4.0.106+cu13"])
def test_versions_as_packages_spell_them(tmp_path: Path, version: str):
    machine = replace(ORIN, tensorrt=version)
    plan.write(tmp_path / "e", PAYLOAD, machine)
    assert plan.read(tmp_path / "e", machine)[1] == PAYLOAD


@pytest.mark.parametrize("changes", [{"tensorrt": "main"}, {"os": "Linux"}, {"compute_capability": "87"}], ids=str)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, changes: dict[str, str]):
    with pytest.raises(InputError, match=next(iter(changes))):
        plan.write(tmp_path / "e", PAYLOAD, replace(ORIN, **changes))
    assert not list(tmp_path.iterdir())


def test_the_header_is_readable_json(engine: Path):
    content = engine.read_bytes()
    length = struct.unpack_from("<I", content, 8)[0]
    assert json.loads(content[START : START + length])["tensorrt"] == "10.3.0"
