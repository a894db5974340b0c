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


def earlier(output: Path | None) -> list[dict[str, Any]]:
    """The rows of a file of results, none if there is no file."""
    return json.loads(output.read_text())["rows"] if output and output.is_file() else []


def rows(
    script: str,
    jobs: Iterable[Sequence[str]],
    table: Callable[[list[dict[str, Any]]], str],
    output: Path | None,
    same: Callable[[dict[str, Any]], Any] | None = None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Run a script once per job, each time in a new process, and print and write each result as soon as it is there.

    Args:
        script: path of the script, which prints one JSON object for ``--one JOB...``.
        jobs: the arguments after ``--one``.
        table: makes a table in Markdown of some rows.
        output: the JSON file of results; None: none is written.
        same: what tells a row from others; rows of ``output`` that are not measured again are then kept.
        facts: what else the file says.

    Raises:
        SystemExit: a process failed.
    """
    found = earlier(output) if same else []
    for job in jobs:
        done = subprocess.run([sys.executable, script, "--one", *job], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(job)} failed")
        row = json.loads(done.stdout.splitlines()[-1])
        found = [one for one in found if not same or same(one) != same(row)] + [row]
        print(table(found[-1:]).splitlines()[-1], flush=True)
        if output is not None:
            document = {"machine": machine() | facts, "date": time.strftime("%Y-%m-%d"), "rows": found}
            output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(found))
    return found
