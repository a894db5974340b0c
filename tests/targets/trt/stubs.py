"""Stubs of three versions of TensorRT's bindings, for a type checker, from facts: names, parameters and their types.

``python stubs.py NAME.pyi > stubs/VERSION.json`` takes the facts of the classes that the target uses from a stub file
of the bindings. A class is its ``bases``, its ``attributes`` (type, and whether it can be set), its ``methods`` (each a
list of overloads: parameters as name, type and required, and what is returned), its enumeration ``members`` and the
names of classes ``inside`` it. A type that is not among these classes is ``Any``.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

from signatures import CLASSES

FOLDER = Path(__file__).parent / "stubs"
FUNCTIONS = ("init_libnvinfer_plugins",)
_PLAIN = {"None", "typing.Any", "typing_extensions.Buffer"}
_KNOWN = {n for n in dir(builtins) if n.islower()} | _PLAIN | {*CLASSES}


def load(version: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{version}.json").read_text())


# -- from a stub file --------------------------------------------------------------------------------------------------


def extract(stub: str) -> dict[str, Any]:
    tree = ast.parse(stub)
    classes = {n.name: _class(n) for n in tree.body if isinstance(n, ast.ClassDef) and n.name in CLASSES}
    functions = {n.name: [_function(n, 0)] for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in FUNCTIONS}
    return {"classes": dict(sorted(classes.items())), "functions": functions}


def _type(node: ast.expr | None) -> str:
    """A type as it is written, ``Any`` for what these stubs do not hold."""
    text = "None" if node is None else ast.unparse(node)
    # pybind11 says what it takes; what it gives, and what an overridden method is given, is the plain type.
    text = text.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")
    names = re.findall(r"[\w.]+", text)
    fits = text != "..." and all(n in _KNOWN or n.rpartition(".")[0] in CLASSES for n in names)
    return text if fits else "typing.Any"


def _function(node: ast.FunctionDef, skip: int) -> list[Any]:
    arguments = node.args.args[skip:]
    needed = len(arguments) - len(node.args.defaults)
    return [[[a.arg, _type(a.annotation or ast.Constant(...)), i < needed] for i, a in enumerate(arguments)],
            _type(node.returns)]  # fmt: skip


def _class(node: ast.ClassDef) -> dict[str, Any]:
    made: dict[str, Any] = {"bases": [b for b in map(ast.unparse, node.bases) if b in CLASSES]}
    attributes: dict[str, list[Any]] = {}
    methods: dict[str, list[Any]] = {}
    members, inside = [], {}
    for item in node.body:
        if isinstance(item, ast.ClassDef):
            inside[item.name] = _class(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if "ClassVar" not in ast.unparse(item.annotation):
                attributes[item.target.id] = [_type(item.annotation), True]
            elif not item.target.id.startswith("_"):
                members.append(item.target.id)
        elif isinstance(item, ast.FunctionDef):
            how = [ast.unparse(d) for d in item.decorator_list]
            if "property" in how:
                attributes.setdefault(item.name, [_type(item.returns), False])
            elif any(h.endswith(".setter") for h in how):
                attributes[item.name][1] = True
            elif (item.name == "__init__" or not item.name.startswith("_")) and "staticmethod" not in how:
                methods.setdefault(item.name, []).append(_function(item, 1))
    made |= {"attributes": attributes, "methods": methods, "members": members, "inside": inside}
    return {k: v for k, v in made.items() if v}


# -- to a stub file ----------------------------------------------------------------------------------------------------


def render(facts: dict[str, Any]) -> str:
    """A stub file with the classes, and a class ``Module`` that has what the module ``tensorrt`` has."""
    lines = ["import typing", "import typing_extensions", ""]
    for name, spec in facts["classes"].items():
        lines += _rendered(name, spec)
    lines += ["class Module:", "    __version__: str"]
    lines += [f"    {name} = {name}_" for name in facts["classes"]]
    for name, overloads in facts["functions"].items():
        lines += ["    @staticmethod", *_signatures(name, overloads, ())]
    # Inside a class, a name means the class's own attribute first: hence the aliases.
    aliases = [f"{name}_ = {name}" for name in facts["classes"]]
    place = lines.index("class Module:")
    return "\n".join([*lines[:place], *aliases, *lines[place:]]) + "\n"


def _rendered(name: str, spec: dict[str, Any]) -> list[str]:
    lines = [f"class {name}({', '.join(spec.get('bases', ()))}):"]
    for inner, found in spec.get("inside", {}).items():
        lines += [f"    {line}" for line in _rendered(inner, found)]
    members = spec.get("members", ())
    lines += [f"    {m}: typing.ClassVar[typing.Any]" for m in members]
    if members:
        lines += ["    __members__: typing.ClassVar[dict[str, typing.Any]]", "    def __int__(self) -> int: ..."]
    for attribute, (kind, settable) in spec.get("attributes", {}).items():
        lines += ["    @property", f"    def {attribute}(self) -> {kind}: ..."]
        if settable:
            lines += [f"    @{attribute}.setter", f"    def {attribute}(self, value: {kind}) -> None: ..."]
    if name == "IHostMemory":
        lines += ["    def __buffer__(self, flags: int) -> memoryview: ..."]
    for method, overloads in spec.get("methods", {}).items():
        lines += _signatures(method, overloads, ("self",))
    return [*lines, "    ..."]


def _signatures(name: str, overloads: list[Any], first: tuple[str, ...]) -> list[str]:
    lines = []
    for parameters, returns in overloads:
        given = [*first, *(f"{n}: {kind}" + ("" if needed else " = ...") for n, kind, needed in parameters)]
        lines += ["    @typing.overload"] * (len(overloads) > 1)
        lines += [f"    def {name}({', '.join(given)}) -> {returns}: ..."]
    return lines


if __name__ == "__main__":
    print(json.dumps(extract(Path(sys.argv[1]).read_text()), separators=(",", ":")))
