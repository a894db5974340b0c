"""Baselines are artefacts: a store of bundles by name, each kept under the digest of its manifest.

::

    STORE/objects/SHA256/...     the files of a bundle; SHA256 is that of its manifest.json, which lists all others'
    STORE/names/NAME.json        which bundle NAME is now and was before, see Entry
    STORE/.lock                  held while something is changed

Nothing in it is absolute, so it can be kept in a CI cache or on a shared disk. Files are copied and never linked: onnx
refuses external data with a second hard link. Reading takes no lock and proves every digest.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from edgecompile import __version__, bundle, documents, fingerprint
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing, InputError, did_you_mean
from edgecompile.files import new_folder, write_atomic
from edgecompile.fingerprint import Fingerprint

SCHEMA = "edgecompile.baseline/1"
DEFAULT = Path(".edgecompile/baselines")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RESOLVED = re.compile(rf"({_NAME.pattern})(?:~([0-9]{{1,6}}))?")
_LEFT = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")  # as edgecompile.files names what it has not finished
_LOCK_SECONDS = 120.0


@dataclass(frozen=True)
class Saved:
    """A bundle as it was saved under a name.

    Attributes:
        digest: SHA-256 of its manifest.
        saved: UTC time in ISO 8601.
        model, target, precision: of the bundle.
        edgecompile: version that saved it.
        note: by the user, e.g. a commit.
        fingerprint: of the machine that saved it.
    """

    digest: str
    saved: str
    model: str
    target: str
    precision: str
    edgecompile: str
    note: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Entry:
    """A name of the store.

    Attributes:
        name: the name.
        history: what was saved under it, newest first; the first is what it means now.
    """

    name: str
    history: tuple[Saved, ...]

    @property
    def current(self) -> Saved:
        """What the name means now."""
        return self.history[0]


_DERIVED: documents.Derived = {
    **fingerprint.DERIVED,
    Entry: {"schema": lambda _: SCHEMA, "digest": lambda entry: entry.current.digest},
}


class Store:
    """A folder of baselines; it is made by the first :meth:`save`.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | Path = DEFAULT):
        self.root = Path(root)
        self._objects, self._names = self.root / "objects", self.root / "names"

    def save(
        self,
        name: str,
        bundle_path: str | Path,
        *,
        note: str = "",
        replace: bool = False,
        measured: Fingerprint | None = None,
    ) -> Entry:
        """Copy a bundle into the store and give it a name.

        To save what the name means already changes nothing; with ``replace``, time, note and fingerprint are renewed.

        Args:
            name: letters, digits and ``._+-``, not beginning with a dot or dash, at most 100.
            bundle_path: the bundle.
            note: kept with it, e.g. a commit.
            replace: allow that the name means another bundle so far, which stays in its history.
            measured: fingerprint to store; None: of this machine.

        Raises:
            InputError: no such name can be, ``bundle_path`` is no whole bundle or has symbolic links, the name is
                taken, or the store cannot be written.
            EnvironmentMissing: the store is damaged where this name is written, or held by another process.
        """
        _check_name(name)
        source = Bundle.open(bundle_path)
        fields = source.manifest
        try:
            engine = source.engine_manifest
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source.path} does not say what its engine is", str(error), "build it again") from None
        saved = Saved(
            digest=bundle.file_digest(source.path / bundle.MANIFEST),
            saved=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=str(fields.get("name", "")),
            target=engine.target,
            precision=str(fields.get("precision", "")),
            edgecompile=__version__,
            note=note,
            fingerprint=measured or fingerprint.fingerprint(engine.versions, engine.options),
        )
        with self._locked():
            before = self.entry(name).history if self._file(name).exists() else ()
            same = bool(before) and before[0].digest == saved.digest
            if before and not same and not replace:
                raise InputError(
                    f"the baseline {name!r} exists",
                    f"saved {before[0].saved}, {before[0].digest[:12]}",
                    "choose another name, or replace it with --replace; what it was stays in its history",
                )
            self._add(source, saved.digest)
            if replace or not same:
                self._write(Entry(name, (saved, *(before[1:] if same else before))))
            return self.entry(name)

    def fetch(self, name: str, back: int = 0) -> Path:
        """The bundle of a name, proved whole; do not write into it.

        Args:
            name: the name.
            back: how many replacements ago: 0 is what the name means now.

        Raises:
            InputError: no such name can be.
            EnvironmentMissing: there is no such baseline, or it is damaged.
        """
        history = self.entry(name).history
        if back >= len(history):
            raise EnvironmentMissing(
                f"the baseline {name!r} was not replaced {back} times", f"its history has {len(history)} bundles"
            )
        return self._verified(history[back].digest, name)

    def entry(self, name: str) -> Entry:
        """What is known of a name.

        Raises:
            InputError: no such name can be.
            EnvironmentMissing: there is no such name, or what is stored of it cannot be read.
        """
        _check_name(name)
        file = self._file(name)
        try:
            self._refuse_links(self._names, file)
            document = json.loads(file.read_text())
            if document["schema"] != SCHEMA:
                raise ValueError(f"its schema is {document['schema']!r}, not {SCHEMA!r}")
            found: Entry = documents.decode(Entry, document, "baseline", _DERIVED)
            if found.name != name or not found.history or not all(_DIGEST.fullmatch(s.digest) for s in found.history):
                raise ValueError("it is about another name, or has a digest that is none")
            return found
        except FileNotFoundError:
            raise self._missing(name) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EnvironmentMissing(
                f"{file} cannot be read as a baseline", str(error), "remove the file and save the baseline again"
            ) from None

    def names(self) -> list[str]:
        """All names, sorted."""
        if not self._names.is_dir():
            return []
        return sorted(p.stem for p in self._names.glob("*.json") if _NAME.fullmatch(p.stem))

    def list(self) -> list[Entry]:
        """All entries, by name.

        Raises:
            EnvironmentMissing: what is stored of a name cannot be read.
        """
        return [self.entry(name) for name in self.names()]

    def resolve(self, text: str | Path) -> Path:
        """The bundle that ``text`` means: a bundle's folder, or a name of the store, or ``NAME~2`` for two before.

        Raises:
            EnvironmentMissing: it is neither, or the stored one is damaged.
            InputError: it is a folder with a manifest but no whole bundle.
        """
        with contextlib.suppress(OSError):  # of a text too long for a path
            if bundle.is_bundle(text):
                return Bundle.open(text).path
        found = _RESOLVED.fullmatch(str(text))
        if found is None:
            raise self._missing(str(text))
        return self.fetch(found[1], int(found[2] or 0))

    def remove(self, name: str, keep: int = 0) -> None:
        """Forget a name, or all but the ``keep`` newest of its history, and the bundles that no other history has.

        A process that reads one of these bundles meanwhile fails.

        Raises:
            InputError: no such name can be.
            EnvironmentMissing: there is no such name, or another one cannot be read.
        """
        self.entry(name)  # to ask for what is not there makes no store
        with self._locked():
            rest = self.entry(name).history[:keep]
            others = [entry.history for entry in self.list() if entry.name != name]
            if rest:
                self._write(Entry(name, rest))
            else:
                self._file(name).unlink()
            kept = {saved.digest for history in (rest, *others) for saved in history}
            for folder in self._objects.iterdir():
                if _DIGEST.fullmatch(folder.name) and folder.name not in kept:
                    shutil.rmtree(folder)

    def _file(self, name: str) -> Path:
        return self._names / f"{name}.json"

    def _write(self, entry: Entry) -> None:
        self._names.mkdir(exist_ok=True)
        write_atomic(self._file(entry.name), [json.dumps(documents.encode(entry, _DERIVED), indent=1).encode()])

    def _missing(self, text: str) -> EnvironmentMissing:
        known = self.names()
        listed = f"{', '.join(known[:10])}{', ...' if len(known) > 10 else ''}" if known else "none"
        return EnvironmentMissing(
            f"there is no baseline {text!r}",
            f"it is no bundle's folder; names in {self.root}: {listed}",
            did_you_mean(text, known) or "`edgecompile baseline save NAME BUNDLE` makes one",
        )

    def _add(self, source: Bundle, digest: str) -> None:
        """Copy a bundle to its object, unless a whole one is there."""
        path = self._objects / digest
        with contextlib.suppress(EnvironmentMissing):
            self._verified(digest, digest)
            return
        with new_folder(path) as folder:
            for file in (*source.manifest["files"], bundle.MANIFEST):  # the manifest last, as in a build
                write_atomic(folder / file, _pieces(source.path / file))
            Bundle.open(folder)
            if bundle.file_digest(folder / bundle.MANIFEST) != digest:
                raise InputError(f"{source.path} changed while it was copied", fix="save it again")

    def _verified(self, digest: str, name: str) -> Path:
        """An object, after every digest was proved."""
        path = self._objects / digest
        fix = "save the bundle again, or restore the store"
        try:
            self._refuse_links(self._objects, path, *path.iterdir())
            if bundle.file_digest(path / bundle.MANIFEST) != digest:
                raise ValueError("its manifest has another digest")
            Bundle.open(path)
        except FileNotFoundError:
            raise EnvironmentMissing(f"the bundle of the baseline {name!r} is missing", f"no {path}", fix) from None
        except (OSError, ValueError, InputError) as error:
            raise EnvironmentMissing(
                f"the baseline {name!r} is damaged or was changed", f"{path}: {error}", fix
            ) from None
        return path

    @staticmethod
    def _refuse_links(*paths: Path) -> None:
        for path in paths:
            if path.is_symlink():
                raise EnvironmentMissing(
                    f"the store of baselines has a symbolic link, {path}", "it could lead anywhere", "remove it"
                )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store alone, and clear away what killed processes left."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock", timeout=_LOCK_SECONDS)
            with lock:
                self._refuse_links(self._objects, self._names)
                for left in (p for folder in (self._objects, self._names) for p in folder.glob(".*")):
                    if _LEFT.fullmatch(left.name):
                        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
                yield
        except Timeout:
            raise EnvironmentMissing(
                f"another process holds {self.root}", f"waited {_LOCK_SECONDS:.0f} s", "try again when it is done"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot write the store {self.root}", error.strerror or str(error), "check the folder and free space"
            ) from None


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a baseline",
            "a name has letters, digits and . _ + -, does not begin with . + or -, and is at most 100 long",
            "choose one like main or v1.2",
        )


def _pieces(path: Path) -> Iterator[bytes]:
    """Content of a regular file that is no symbolic link."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        why = "it is a symbolic link" if path.is_symlink() else error.strerror or str(error)
        raise InputError(f"cannot copy {path}", why, "build the bundle again") from None
