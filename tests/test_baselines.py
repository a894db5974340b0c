"""The store of baselines: what is fetched is what was saved, whatever happened in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompile import __version__, baselines, bundle
from edgecompile.baselines import Store
from edgecompile.bundle import Bundle
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.fingerprint import Fingerprint, fingerprint
from edgecompile.target import EngineManifest


def make(folder: Path, content: bytes = b"weights", **fields: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "engine").write_bytes(content)
    (folder / "model.onnx").write_bytes(b"graph" * 1000)
    engine = EngineManifest("ort", ("engine",), {"onnxruntime": "1.31.1"}, "cpu", {"threads": 1})
    bundle.write_manifest(folder, engine, **{"name": "net", "precision": "fp32", **fields})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Files of a folder and below, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def made(tmp_path) -> Path:
    return make(tmp_path / "build" / "net")


def refusal(
    call: Callable[..., object],
    *arguments: object,
    kind: type[EdgecompileError] = EnvironmentMissing,
    **options: object,
) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    assert caught.value.exit_code == (4 if kind is EnvironmentMissing else 2)
    return str(caught.value)


# -- saving and fetching -----------------------------------------------------------------------------------------------


def test_what_is_fetched_is_what_was_saved(store, made):
    saved = store.save("main", made, note="commit 1234")
    fetched = store.fetch("main")
    assert content(fetched) == content(made)
    assert fetched == store.root / "objects" / bundle.file_digest(made / "manifest.json")
    current = saved.current
    assert (current.model, current.target, current.precision) == ("net", "ort", "fp32")
    assert (current.edgecompile, current.note, current.digest) == (__version__, "commit 1234", fetched.name)
    assert current.fingerprint.hard == fingerprint({"onnxruntime": "1.31.1"}, {"threads": 1}).hard
    assert store.list() == [saved] == [store.entry("main")]


def test_nothing_in_the_store_is_absolute_or_linked(store, made, tmp_path):
    store.save("main", made)
    shutil.rmtree(made)
    moved = tmp_path / "elsewhere" / "cache"
    moved.parent.mkdir()
    store.root.rename(moved)
    assert Bundle.open(Store(moved).fetch("main")).manifest["name"] == "net"
    for path in moved.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or path.stat().st_nlink == 1)
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_files_that_the_manifest_does_not_list_are_not_saved(store, made):
    (made / "notes.txt").write_text("mine")
    store.save("main", made)
    assert set(content(store.fetch("main"))) == {"engine", "model.onnx", "manifest.json"}


def test_a_fingerprint_can_be_given(store, made):
    board = Fingerprint({"board": "NVIDIA Jetson AGX Orin", "power_mode": "MAXN"}, {"temperature": 41.5})
    store.save("orin", made, measured=board)
    assert store.entry("orin").current.fingerprint == board


def test_a_name_is_not_replaced_by_accident(store, made, tmp_path):
    store.save("main", made)
    other = make(tmp_path / "other", b"new")
    assert "--replace" in refusal(store.save, "main", other, kind=InputError)
    assert content(store.fetch("main")) == content(made)
    store.save("main", other, replace=True)
    assert content(store.fetch("main")) == content(other)


def test_saving_the_same_again_changes_nothing_unless_asked(store, made):
    first = store.save("main", made, note="one")
    before = content(store.root)
    assert store.save("main", made, note="two") == first and content(store.root) == before
    again = store.save("main", made, note="two", replace=True)
    assert again.current.note == "two" and len(again.history) == 1


def test_two_names_of_one_bundle_share_its_files(store, made):
    store.save("main", made)
    store.save("v1.0", made)
    assert len(list((store.root / "objects").iterdir())) == 1 and store.names() == ["main", "v1.0"]


def test_the_history_keeps_what_a_name_meant(store, tmp_path):
    folders = [make(tmp_path / str(i), bytes([i])) for i in range(3)]
    for number, folder in enumerate(folders):
        store.save("main", folder, note=f"release {number}", replace=True)
    assert [s.note for s in store.entry("main").history] == ["release 2", "release 1", "release 0"]
    for back, folder in enumerate(reversed(folders)):
        assert content(store.fetch("main", back)) == content(folder) == content(store.resolve(f"main~{back}"))
    assert "3 bundles" in refusal(store.resolve, "main~3")


def test_removing_keeps_what_other_names_need(store, made, tmp_path):
    other = make(tmp_path / "other", b"new")
    store.save("main", made)
    store.save("main", other, replace=True)
    store.save("v1", made)
    store.remove("main")
    assert store.names() == ["v1"] and content(store.fetch("v1")) == content(made)
    assert len(list((store.root / "objects").iterdir())) == 1
    store.remove("v1")
    assert store.names() == [] and list((store.root / "objects").iterdir()) == []
    assert "no baseline 'v1'" in refusal(store.remove, "v1")


def test_removing_can_spare_the_newest(store, tmp_path):
    for number in range(4):
        store.save("main", make(tmp_path / str(number), bytes([number])), replace=True)
    store.remove("main", keep=2)
    assert content(store.fetch("main", 1)) == content(tmp_path / "2")
    assert len(store.entry("main").history) == 2 == len(list((store.root / "objects").iterdir()))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "v1.2.3", "a", "_x", "9-9+b", "x" * 100])
def test_good_names(store, made, name):
    store.save(name, made)
    assert store.resolve(name) == store.fetch(name)


BAD_NAMES = ["", ".", "..", ".x", "-x", "a/b", "../a", "/a", "a\\b", "a b", "a\n", "a\0", "é", "a~1", "a:1", "x" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(store, made, name):
    for call in (lambda: store.save(name, made), lambda: store.fetch(name), lambda: store.remove(name)):
        assert "cannot be the name of a baseline" in refusal(call, kind=InputError)
    assert not store.root.exists()


def test_resolve_takes_a_bundle_or_a_name(store, made, tmp_path, monkeypatch):
    assert store.resolve(made) == made == store.resolve(str(made))
    other = make(tmp_path / "other", b"other")
    store.save("net", other)
    monkeypatch.chdir(tmp_path / "build")
    assert content(store.resolve("net")) == content(made), "a bundle of that name comes first"
    monkeypatch.chdir(tmp_path)
    assert content(store.resolve("net")) == content(other)


def test_resolve_says_what_there_is(store, made, tmp_path):
    assert "names in" in refusal(store.resolve, "main") and "none" in refusal(store.resolve, "main")
    store.save("release-1", made)
    store.save("main", made)
    assert "did you mean 'main'?" in refusal(store.resolve, "mian")
    assert "main, release-1" in refusal(store.resolve, "zzz")
    (tmp_path / "empty").mkdir()
    for text in (tmp_path / "empty", "../main", "main~", "main~-1", "x" * 5000, "a\0b"):
        assert "there is no baseline" in refusal(store.resolve, text)
    (made / "engine").write_bytes(b"other")
    assert "damaged" in refusal(store.resolve, made, kind=InputError)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["engine", "model.onnx", "manifest.json"])
def test_a_changed_or_missing_file_is_refused_and_saving_again_heals(store, made, name):
    store.save("main", made)
    target = store.fetch("main") / name
    whole = target.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        target.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "the baseline 'main' is damaged" in refusal(store.fetch, "main")
    target.unlink()
    assert "missing" in refusal(store.fetch, "main")
    store.save("main", made)
    assert content(store.fetch("main")) == content(made)


def test_a_consistent_forgery_is_refused(store, made, tmp_path):
    store.save("main", made)
    fetched = store.fetch("main")
    shutil.rmtree(fetched)
    shutil.copytree(make(tmp_path / "forged", b"forged"), fetched)
    assert "its manifest has another digest" in refusal(store.fetch, "main")


def test_a_lost_object_is_refused(store, made):
    store.save("main", made)
    shutil.rmtree(store.fetch("main"))
    assert "the bundle of the baseline 'main' is missing" in refusal(store.fetch, "main")


def test_symbolic_links_in_the_store_are_refused(store, made, tmp_path):
    store.save("main", made)
    fetched = store.fetch("main")
    for path in (fetched / "engine", fetched, fetched.parent, store.root / "names" / "main.json", store.root / "names"):
        aside = tmp_path / "aside"
        path.rename(aside)
        path.symlink_to(aside)
        assert "symbolic link" in refusal(store.fetch, "main"), path
        path.unlink()
        aside.rename(path)
    assert store.fetch("main") == fetched


def test_clearing_up_does_not_follow_a_link(store, made, tmp_path):
    store.save("main", made)
    home = tmp_path / "home"
    home.mkdir()
    (home / ".precious.01234567.tmp").write_text("x")
    shutil.rmtree(store.root / "objects")
    (store.root / "objects").symlink_to(home)
    assert "symbolic link" in refusal(store.save, "main", made)
    assert os.listdir(home) == [".precious.01234567.tmp"]


def test_a_bundle_with_a_symbolic_link_is_not_saved(store, made, tmp_path):
    (made / "engine").rename(tmp_path / "engine")
    (made / "engine").symlink_to(tmp_path / "engine")
    assert "symbolic link" in refusal(store.save, "main", made, kind=InputError)
    assert content(store.root).keys() <= {".lock"}
    assert "no baseline" in refusal(store.fetch, "main")


def test_what_is_no_whole_bundle_is_not_saved(store, made, tmp_path):
    assert "not a bundle" in refusal(store.save, "main", tmp_path, kind=InputError)
    (made / "engine").write_bytes(b"other")
    assert "damaged" in refusal(store.save, "main", made, kind=InputError)
    strange = make(tmp_path / "strange")
    manifest = json.loads((strange / "manifest.json").read_text())
    (strange / "manifest.json").write_text(json.dumps({**manifest, "engine": {"files": []}}))
    assert "what its engine is" in refusal(store.save, "main", strange, kind=InputError)
    assert not store.root.exists()


@pytest.mark.parametrize("change", [
    {"schema": "edgecompile.baseline/2"}, {"name": "other"}, {"history": []}, {"history": 3}, {"extra": 1},
])  # fmt: skip
def test_a_name_file_that_is_wrong_is_refused(store, made, change):
    store.save("main", made)
    file = store.root / "names" / "main.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, **change}))
    assert "cannot be read as a baseline" in refusal(store.fetch, "main")
    assert "cannot be read as a baseline" in refusal(store.list)
    file.write_text("{")
    assert "cannot be read as a baseline" in refusal(store.save, "main", made)


def test_a_digest_that_leads_elsewhere_is_refused(store, made):
    store.save("main", made)
    file = store.root / "names" / "main.json"
    document = json.loads(file.read_text())
    document["history"][0]["digest"] = f"../../{made.parent.name}/{made.name}"
    file.write_text(json.dumps(document))
    assert "a digest that is none" in refusal(store.fetch, "main")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_can_be_read_and_not_written(store, made):
    store.save("main", made)
    for folder in (store.root / "names", store.root / "objects", store.root):
        folder.chmod(0o500)
    assert content(store.fetch("main")) == content(made)
    assert "cannot write" in refusal(store.save, "v1", made, kind=InputError)


def test_a_store_that_cannot_be_made(tmp_path, made):
    (tmp_path / "file").write_text("precious")
    assert "cannot write the store" in refusal(Store(tmp_path / "file").save, "main", made, kind=InputError)
    assert (tmp_path / "file").read_text() == "precious"


# -- several processes -------------------------------------------------------------------------------------------------

SAVE = textwrap.dedent(
    """
    import sys
    from edgecompile.baselines import Store
    from edgecompile.errors import EdgecompileError
    root, name, *folders = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        for folder in folders:
            Store(root).save(name, folder, note=folder, replace=name == "shared")
    except EdgecompileError as error:
        sys.exit(error.exit_code)
    """
)


def _savers(*arguments: list[object]) -> list[int]:
    """Exit codes of processes that save at the same time."""
    command = [sys.executable, "-c", SAVE]
    running = [
        subprocess.Popen([*command, *map(str, a)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for a in arguments
    ]
    for process in running:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=60)
    return [process.returncode for process in running]


def test_two_processes_that_replace_lose_nothing(store, tmp_path):
    ours = [make(tmp_path / f"a{i}", f"a{i}".encode()) for i in range(6)]
    theirs = [make(tmp_path / f"b{i}", f"b{i}".encode()) for i in range(6)]
    assert _savers([store.root, "shared", *ours], [store.root, "shared", *theirs]) == [0, 0]
    history = store.entry("shared").history
    assert sorted(s.note for s in history) == sorted(map(str, (*ours, *theirs)))
    for back, saved in enumerate(history):
        assert content(store.fetch("shared", back)) == content(Path(saved.note))


def test_of_two_processes_that_take_a_name_one_gets_it(store, tmp_path):
    folders = [make(tmp_path / name, name.encode()) for name in ("a", "b")]
    codes = _savers(*([store.root, "main", folder] for folder in folders))
    assert sorted(codes) == [0, 2]
    assert content(store.fetch("main")) == content(folders[codes.index(0)])


def test_a_store_that_is_held_is_reported(store, made, monkeypatch):
    store.save("main", made)
    monkeypatch.setattr(baselines, "_LOCK_SECONDS", 0.2)
    with baselines.FileLock(store.root / ".lock"):
        assert "another process holds" in refusal(Store(store.root).save, "v1", made)
        assert content(store.fetch("main")) == content(made), "reading takes no lock"


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from edgecompile import baselines
    root, folder, call, count = sys.argv[1:]
    real, left = getattr(os, call), [int(count)]
    def strike(*arguments, **options):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*arguments, **options)
    setattr(os, call, strike)
    baselines.Store(root).save("main", folder, replace=True)
    """
)


@pytest.mark.parametrize(("call", "least"), [("fsync", 9), ("replace", 4), ("rename", 1)])
def test_a_killed_saver_leaves_the_old_state_or_the_new(store, made, tmp_path, call, least):
    store.save("main", made)
    other = make(tmp_path / "other", b"new")
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        copy = shutil.copytree(store.root, tmp_path / f"killed{len(codes)}")
        command = [sys.executable, "-c", KILLED, copy, other, call, str(len(codes))]
        codes.append(subprocess.run(command, timeout=60).returncode)
        found = Store(copy)
        old, new = (content(found.fetch("main")) == content(folder) for folder in (made, other))
        assert old != new and len(found.entry("main").history) == 1 + new
        found.save("main", other, replace=True)
        assert content(found.fetch("main")) == content(other) and content(found.fetch("main", 1)) == content(made)
        assert [p.name for p in copy.rglob(".*")] == [".lock"], "the next saver clears away what a killed one left"
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1) and len(codes) > least
