"""Atomic writing: the old content or the new, never half."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from edgecompile import bundle
from edgecompile.bundle import Bundle
from edgecompile.errors import InputError
from edgecompile.files import new_folder, write_atomic
from edgecompile.target import EngineManifest


def test_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    for text in (b"one", b"two"):
        write_atomic(path, [text[:1], text[1:]])
        assert path.read_bytes() == text and os.listdir(tmp_path) == ["a.txt"]


def test_an_error_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomic(tmp_path / "a.txt", chunks())
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_atomic(tmp_path / "no" / "a.txt", [b""])


def test_new_folder_appears_as_a_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with new_folder(out) as folder:
        (folder / "b").write_text("2")
        assert (out / "a").exists()
    assert os.listdir(out) == ["b"] and os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_folder_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    for place in (out, tmp_path / "deep" / "out"):
        with pytest.raises(error), new_folder(place) as folder:
            (folder / "a").write_text("1")
            raise error
        assert os.listdir(tmp_path) == []
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(error), new_folder(out) as folder:
        raise error
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["old"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="a file of that name"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "precious"


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "engine").write_bytes(b"engine")
    bundle.write_probe(folder, {"x": np.arange(3)}, {"y": np.ones(2), "s": np.array(["text"], object)})
    bundle.write_manifest(folder, EngineManifest("ort", ("engine",), {"onnxruntime": "1"}, "cpu"), name="net")
    return folder


def test_bundle_round_trip(made):
    opened = Bundle.open(made)
    assert opened.manifest["name"] == "net" and set(opened.manifest["files"]) == {"engine", "model.onnx", "probe.npz"}
    feeds, reference = opened.probe()
    assert feeds["x"].tolist() == [0, 1, 2] and list(reference) == ["y"]


@pytest.mark.parametrize("name", ["engine", "model.onnx", "probe.npz"])
def test_every_flipped_byte_and_every_missing_file_is_found(made, name):
    content = (made / name).read_bytes()
    for position in {0, len(content) // 2, len(content) - 1}:
        changed = bytearray(content)
        changed[position] ^= 1
        (made / name).write_bytes(changed)
        with pytest.raises(InputError, match="damaged"):
            Bundle.open(made)
    (made / name).unlink()
    with pytest.raises(InputError, match="missing"):
        Bundle.open(made)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda m: m.update(schema="edgecompile.bundle/99"), "schema"),
        (lambda m: m.pop("files"), "cannot be read"),
        (lambda m: m["files"].update({"../secret": {"sha256": "0"}}), "missing"),
        (lambda m: m.update(files=[1, 2]), "cannot be read"),
    ],
)
def test_wrong_manifests_are_refused(made, change, complaint):
    manifest = json.loads((made / "manifest.json").read_text())
    change(manifest)
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=complaint):
        Bundle.open(made)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    assert not bundle.is_bundle(tmp_path)
    with pytest.raises(InputError, match="not a bundle"):
        Bundle.open(tmp_path)
