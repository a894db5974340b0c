"""What the scripts share: the machine that every result names, and one process per measurement."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edgecompile import measure

_FACTS = ("arch", "cpu", "features", "hypervisor", "cores", "memory_bytes", "python")
_PACKAGES = ("edgecompile", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "numpy")


def machine() -> dict[str, Any]:
    """CPU, memory and the versions of what is installed."""
    facts = measure.machine()
    versions = {p: v for p in _PACKAGES if (v := _version(p))}
    return {k: facts[k] for k in _FACTS} | {"versions": versions}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def rows(
    script: str,
    jobs: Iterable[Sequence[str]],
    table: Callable[[list[dict[str, Any]]], str],
    output: Path | None,
    kept: Sequence[dict[str, Any]] = (),
    **facts: Any,
) -> list[dict[str, Any]]:
    """Run a script once per job, each time in a new process, and print and write each result as soon as it is there.

    Args:
        script: path of the script, which prints one JSON object for ``--one JOB...``.
        jobs: the arguments after ``--one``.
        table: makes a table in Markdown of some rows.
        output: the JSON file of results; None: none is written.
        kept: rows of earlier runs, which come first.
        facts: what else the file says.

    Raises:
        SystemExit: a process failed.
    """
    found = list(kept)
    for job in jobs:
        done = subprocess.run([sys.executable, script, "--one", *job], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(job)} failed")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(found[-1:]).splitlines()[-1], flush=True)
        if output is not None:
            document = {"machine": machine() | facts, "date": time.strftime("%Y-%m-%d"), "rows": found}
            output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(found))
    return found
