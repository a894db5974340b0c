"""What the bindings of three versions of TensorRT offer, as far as the target uses it.

``python signatures.py NAME.pyi > signatures/VERSION.json`` takes it from a stub file of the bindings. A class is its
``init`` and ``methods`` (each a list of overloads, an overload a list of parameters: name, type, required), its
``attributes`` (``ro`` or ``rw``) and its enumeration ``members``.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "signatures"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "DeviceType", "EngineInspector", "HardwareCompatibilityLevel"),
    *("IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition"),
    *("IOptimizationProfile", "IProfiler", "IProgressMonitor", "ITensor", "ITimingCache", "LayerInformationFormat"),
    *("Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity"),
    *("QuickPluginCreationRequest", "Runtime", "Severity", "TensorIOMode", "TensorLocation"),
)


def load(version: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{version}.json").read_text())


def extract(stub: str) -> dict[str, Any]:
    found = {}
    for node in ast.walk(ast.parse(stub)):
        if isinstance(node, ast.ClassDef) and node.name in CLASSES and node.name not in found:
            found[node.name] = _class(node)
    return dict(sorted(found.items()))


def _class(node: ast.ClassDef) -> dict[str, Any]:
    made: dict[str, Any] = {"init": [], "methods": {}, "attributes": {}, "members": []}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if "ClassVar" not in ast.unparse(item.annotation):
                made["attributes"][item.target.id] = "rw"
            elif not item.target.id.startswith("_") and item.target.id.isupper():
                made["members"].append(item.target.id)
        elif isinstance(item, ast.FunctionDef):
            how = [ast.unparse(d) for d in item.decorator_list]
            if "property" in how:
                made["attributes"].setdefault(item.name, "ro")
            elif any(h.endswith(".setter") for h in how):
                made["attributes"][item.name] = "rw"
            elif item.name == "__init__":
                made["init"].append(_parameters(item))
            elif not item.name.startswith("__"):
                made["methods"].setdefault(item.name, []).append(_parameters(item))
    return {k: v for k, v in made.items() if v}


def _parameters(function: ast.FunctionDef) -> list[list[Any]]:
    arguments = function.args.args[1:]
    optional = len(function.args.defaults)
    return [
        [a.arg, ast.unparse(a.annotation) if a.annotation else "", i < len(arguments) - optional]
        for i, a in enumerate(arguments)
    ]


if __name__ == "__main__":
    print(json.dumps(extract(Path(sys.argv[1]).read_text()), separators=(",", ":")))
