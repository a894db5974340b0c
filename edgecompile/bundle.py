"""The folder that ``build`` writes: rewritten graph, engine, probe inputs and outputs, report, manifest.

The manifest is written last and lists every other file with its SHA-256, so a bundle with a valid manifest is complete.
``probe.npz`` holds the example inputs (``in:NAME``) and the reference outputs (``out:NAME``), so that a bundle can be
verified and measured again anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import __version__, registry
from edgecompile.errors import InputError
from edgecompile.files import write_atomic
from edgecompile.target import Engine, EngineManifest

if TYPE_CHECKING:  # a board opens bundles without onnx
    from edgecompile.graph import Graph
    from edgecompile.oracle import Feeds, Outputs

SCHEMA = "edgecompile.bundle/1"
PREPARED = "prepared"
MANIFEST, MODEL, PROBE = "manifest.json", "model.onnx", "probe.npz"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: the folder.
        manifest: content of ``manifest.json``: ``schema``, ``name``, ``target``, ``precision``, ``passes``, ``files``
            (name -> sha256 and bytes), ``engine`` (see :class:`edgecompile.target.EngineManifest`), ``versions``.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and prove that it is complete: every file is there with the digest that the manifest gives.

        Raises:
            InputError: not a bundle, made by a newer edgecompile, or damaged.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            schema, files = manifest["schema"], manifest["files"]
            names = [(str(name), str(entry["sha256"])) for name, entry in files.items()]
        except FileNotFoundError:
            raise InputError(
                f"{path} is not a bundle", f"it has no {MANIFEST}", "`edgecompile build` writes one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path / MANIFEST} cannot be read", str(error), "build the bundle again") from None
        if schema != SCHEMA:
            raise InputError(
                f"{path} has the schema {schema!r}", f"this edgecompile reads {SCHEMA!r}", "build it again"
            )
        for name, digest in names:
            file = path / name
            if Path(name).name != name or not file.is_file():
                raise InputError(f"the bundle {path} is incomplete", f"{name} is missing", "build it again")
            if file_digest(file) != digest:
                raise InputError(f"the bundle {path} is damaged", f"{name} has another digest", "build it again")
        return cls(path, manifest)

    @property
    def prepared(self) -> bool:
        """True if another machine is to build the engine."""
        return self.manifest.get("state") == PREPARED

    def graph(self) -> Graph:
        """The rewritten graph."""
        from edgecompile.graph import Graph

        return Graph.load(self.path / MODEL)

    def probe(self) -> tuple[Outputs, Outputs]:
        """Example inputs and the reference outputs for them, by name."""
        with np.load(self.path / PROBE, allow_pickle=False) as arrays:
            values = {key: arrays[key] for key in arrays.files}
        feeds = {k[3:]: v for k, v in values.items() if k.startswith("in:")}
        return feeds, {k[4:]: v for k, v in values.items() if k.startswith("out:")}

    def engine(self) -> Engine:
        """The engine, ready to run.

        Raises:
            EnvironmentMissing: its runtime is not installed, or it was built for another device or version.
        """
        return registry.target(self.manifest["target"]).load(self.path, self.engine_manifest, self.graph())

    @property
    def engine_manifest(self) -> EngineManifest:
        """What the engine is."""
        described = dict(self.manifest["engine"])
        described["files"] = tuple(described["files"])
        return EngineManifest(**described)


def is_bundle(path: str | Path) -> bool:
    """True if ``path`` is a folder with a manifest."""
    return (Path(path) / MANIFEST).is_file()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def write_probe(folder: Path, feeds: Feeds, reference: Feeds) -> None:
    """Write ``probe.npz``; arrays of Python objects (strings) are left out, they cannot be stored safely."""
    arrays = {f"in:{k}": v for k, v in feeds.items()} | {f"out:{k}": v for k, v in reference.items()}
    stored: dict[str, Any] = {k: v for k, v in arrays.items() if v.dtype != object}
    np.savez(folder / PROBE, **stored)


def write_manifest(folder: Path, engine: EngineManifest, **fields: Any) -> dict[str, Any]:
    """Write ``manifest.json`` over all other files of ``folder``; the last step of a build."""
    files = {
        file.name: {"sha256": file_digest(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    manifest = {
        "schema": SCHEMA,
        "edgecompile": __version__,
        **fields,
        "target": engine.target,
        "engine": asdict(engine),
        "files": files,
    }
    write_atomic(folder / MANIFEST, [json.dumps(manifest, indent=1).encode()])
    return manifest
