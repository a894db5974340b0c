"""``edgecompile.toml``: strict, so that a misspelt key is an error and not a silent default."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompile.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLES = ("build",)


def load(path: Path, table: str, keys: Sequence[str]) -> dict[str, Any]:
    """One table of a configuration file.

    Args:
        path: the TOML file.
        table: name of the table wanted; a file without it gives an empty one.
        keys: the keys it may have.

    Raises:
        InputError: the file is missing or not TOML, or has a table or key that does not exist.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", str(error), "check the path given with --config") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML", str(error)) from None
    for name in document:
        if name not in _TABLES:
            raise _unknown(f"{path} has an unknown table [{name}]", name, _TABLES)
    found = document.get(table, {})
    if not isinstance(found, dict):
        raise InputError(f"{path}: {table} must be a table", fix=f"write [{table}] on a line of its own")
    for key in found:
        if key not in keys:
            raise _unknown(f"{path}: [{table}] has no key {key!r}", key, keys)
    return found


def _unknown(what: str, name: str, known: Sequence[str]) -> InputError:
    close = difflib.get_close_matches(name, known, 1)
    return InputError(what, f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}")
