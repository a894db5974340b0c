"""edgecompile: PyTorch in, the fastest engine that is still the same model out."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, passes/, targets/ and models/ lie beside this folder. With the checkout as working directory Python
# finds this folder before the installed mapping, and would not find those three.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes").is_dir():
    __path__.append(str(_checkout))
