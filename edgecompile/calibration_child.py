"""The process in which ``calibration_data()`` of a user's file runs: ``python -m edgecompile.calibration_child``.

Its samples are written to an ``.npz`` file one by one, so that neither process ever holds more than one. The request is
that of an export, with the inputs of the exported model.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    _CWD = sys.path.pop(0)  # as in edgecompile.export_child

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgecompile import calibration_data, export_child, ladder
from edgecompile.graph import Port


def collect(request: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write ``calibration.npz``; its name and how many samples it holds.

    Raises:
        InputError: the user's code fails (named by file and line), or a sample does not fit the model.
    """
    path = Path(request["path"])
    say("importing torch")
    file, user = export_child.open_file(path)
    ports = [Port(p["name"], p["dtype"], None if p["shape"] is None else tuple(p["shape"])) for p in request["ports"]]
    say("reading calibration_data()")
    with ladder.user_code(user, "calibration_data() was read"):
        count = calibration_data.save_samples(folder / "calibration.npz", file.calibration_data(), ports)
    return {"file": "calibration.npz", "count": count}


if __name__ == "__main__":
    export_child.serve(sys.argv[1], collect)
