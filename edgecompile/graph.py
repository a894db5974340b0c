"""The typed ONNX graph that every pass rewrites and every target lowers.

:class:`Graph` is an ``onnx_graphsurgeon.Graph`` that keeps what graphsurgeon drops on import and export: the metadata
of the model and of its nodes (where torch's exporter records module paths and source lines), local functions and
external data. Weights are NumPy arrays; those stored as external data are memory-mapped and never copied until they
are written.

References: the ONNX IR specification (https://onnx.ai/onnx/repo-docs/IR.html), its section on external tensor data, and
the ``metadata_props`` written by ``torch.onnx`` (``pkg.torch.onnx.name_scopes``, ``pkg.torch.onnx.stack_trace``).
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import heapq
import itertools
import json
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from edgecompile.errors import InputError
from edgecompile.files import write_atomic

G_LOGGER.severity = G_LOGGER.CRITICAL

Tensor: TypeAlias = gs.Tensor
Dim = int | str | None

INLINE_LIMIT = 1 << 31  # protobuf cannot serialise 2 GiB
_KEEP_INLINE = 1 << 20  # weights below 1 MiB stay initializers where large ones become inputs of a probe model
_PACKED = ("int4", "uint4", "int2", "uint2", "float4_e2m1fn")  # several values share a byte in a file, not in an array
_MODULES, _SOURCES = "edgecompile.modules", "edgecompile.sources"
_FRAME = re.compile(r'File "([^"]+)"')
_SCOPES, _TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"


@dataclass(frozen=True)
class Provenance:
    """Where a node comes from.

    Attributes:
        modules: torch module paths, e.g. ``("blocks.0.mixer.conv",)``; empty when unknown.
        sources: names of the nodes of the file as loaded that this node stands for.
        metadata: the exporter's own ``metadata_props``, kept verbatim.
    """

    modules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def union(origins: Iterable[Provenance]) -> Provenance:
        """What a node inherits that replaces nodes of these origins; of equal metadata keys the first wins."""
        modules: dict[str, None] = {}
        sources: dict[str, None] = {}
        metadata: dict[str, str] = {}
        for origin in origins:
            modules |= dict.fromkeys(origin.modules)
            sources |= dict.fromkeys(origin.sources)
            metadata = dict(origin.metadata) | metadata
        return Provenance(tuple(modules), tuple(sources), tuple(metadata.items()))

    @property
    def module(self) -> str:
        """The module paths as one string, shortened to their common parent when there are many."""
        if len(self.modules) <= 2:
            return ", ".join(self.modules)
        parts = zip(*(m.split(".") for m in self.modules), strict=False)
        common = itertools.takewhile(lambda names: len(set(names)) == 1, parts)
        return ".".join([names[0] for names in common] + ["*"])

    @property
    def source_line(self) -> str:
        """``file:line`` of the innermost frame outside torch in the exporter's stack trace, or ``""``."""
        frames = [line.strip() for line in dict(self.metadata).get(_TRACE, "").splitlines()]
        frames = [line for line in frames if line.startswith("File ")]
        if not frames:
            return ""
        path, _, rest = (
            next((f for f in reversed(frames) if '"torch/' not in f), frames[-1])
            .removeprefix("File ")
            .partition(", line ")
        )
        return f"{path.strip(chr(34))}:{rest.partition(',')[0]}"


def provenance(node: gs.Node) -> Provenance:
    """The provenance of a node; empty for a node that no rewrite has attributed yet."""
    return getattr(node, "provenance", _NOWHERE)


_NOWHERE = Provenance()


def where(node: gs.Node) -> str:
    """How to name a node to a person: its module path and op, else its name, else its first output."""
    module = provenance(node).module
    return f"{module} ({node.op})" if module else f"{node.name or node.outputs[0].name} ({node.op})"


def globs(text: str) -> tuple[str, ...]:
    """The patterns of an option that names nodes, separated by commas."""
    return tuple(part for part in map(str.strip, text.split(",")) if part)


def matches(node: gs.Node, patterns: Iterable[str]) -> bool:
    """True if the name, the op or a module path of a node, or a parent of that path, matches a glob."""
    return any_matches((node.name, node.op), provenance(node).modules, patterns)


def any_matches(names: Iterable[str], modules: Iterable[str], patterns: Iterable[str]) -> bool:
    """True if a name, a module path or a parent of that path matches a glob."""
    paths = [".".join(parts[:i]) for m in modules for parts in (m.split("."),) for i in range(1, len(parts) + 1)]
    known = [name for name in (*names, *paths) if name]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in known)


@dataclass(frozen=True)
class Port:
    """An input or output of the model as a caller sees it; ``shape`` is None for an unknown rank."""

    name: str
    dtype: int
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True)
class Signature:
    """What a rewrite must never change: names, order, element types and dimensions of inputs and outputs."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class Graph(gs.Graph):
    """One ONNX model.

    Attributes beyond graphsurgeon's:
        metadata: the model's ``metadata_props``.
        function_protos: local functions, kept verbatim.
        model_version: the ``model_version`` of the file.
        external: True if the weights were loaded from external data; they are saved so again.
        path: the file it was loaded from, or None.
    """

    metadata: dict[str, str]
    function_protos: list[onnx.FunctionProto]
    model_version: int
    external: bool
    path: Path | None

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Graph:
        """Read an ONNX file; external data is memory-mapped.

        Raises:
            InputError: the file is missing, is not an ONNX model, or its external data is missing, too short, not a
                regular file, or outside the model's folder.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"cannot read {path}", "no such file", "check the path")
        if path.stat().st_size >= INLINE_LIMIT:
            raise InputError(
                f"cannot read {path}", "an ONNX file of 2 GiB or more must keep its weights as external data"
            )
        try:
            model = onnx.load_model(path, load_external_data=False)
        except Exception as error:  # protobuf raises several unrelated types
            raise InputError(f"{path} is not an ONNX model", _one_line(error)) from None
        if not model.graph.node and not model.graph.output:
            raise InputError(f"{path} is not an ONNX model", "it holds no graph")
        graph = cls.from_proto(model, path.parent, str(path))
        graph.path = path
        return graph

    @classmethod
    def from_proto(cls, model: onnx.ModelProto, folder: Path | None = None, what: str = "the model") -> Graph:
        """Take a model in memory; ``model`` is consumed (its weights are moved out).

        Args:
            model: the model; external data is looked up beneath ``folder``.
            folder: None if the model has no external data.
            what: how errors name the model.

        Raises:
            InputError: the model or its external data is malformed.
        """
        functions = [_copied(f) for f in model.functions]
        del model.functions[:]
        opsets = {o.domain: o.version for o in model.opset_import}
        if not opsets.keys() & {"", "ai.onnx"} and any(n.domain in ("", "ai.onnx") for n in model.graph.node):
            raise InputError(f"{what} does not say its ONNX opset", "opset_import lacks the default domain")
        _reject_unkept_attributes(model.graph, what)
        names = [n.metadata_props for n in _nodes(model.graph)]
        try:
            imported = gs.import_onnx(model)
        except Exception as error:  # graphsurgeon lets protobuf and KeyError through
            raise InputError(f"{what} cannot be read", _one_line(error)) from None
        graph = cls._adopt(imported)
        graph.import_domains = [onnx.helper.make_opsetid(d, v) for d, v in opsets.items()]
        graph.metadata = {p.key: p.value for p in model.metadata_props}
        graph.function_protos = functions
        graph.model_version = model.model_version
        for node, props in zip(graph.walk(), names, strict=True):
            node.provenance = _read_provenance(node, {p.key: p.value for p in props})  # type: ignore[attr-defined]
        for node, props in zip(graph.walk(), names, strict=True):
            if not props and not provenance(node).modules:
                # The exporter's own optimiser makes nodes without metadata; they belong with what they work on.
                modules = next((provenance(p).modules for t in node.inputs for p in t.inputs[:1]), ())
                node.provenance = replace(provenance(node), modules=modules)  # type: ignore[attr-defined]
        for tensor in graph._constants():
            lazy = tensor._values
            if isinstance(lazy, LazyValues) and type(lazy) is LazyValues:
                tensor._values = _read_weight(lazy.tensor, folder, what)
                tensor.data_location = None
                graph.external |= lazy.tensor.data_location == onnx.TensorProto.EXTERNAL
        return graph

    @classmethod
    def _adopt(cls, other: gs.Graph) -> Graph:
        """A Graph over the nodes and tensors of a plain graphsurgeon graph."""
        graph = cls(
            nodes=other.nodes,
            inputs=other.inputs,
            outputs=other.outputs,
            name=other.name,
            doc_string=other.doc_string,
            opset=other.opset,
            import_domains=other.import_domains,
            producer_name=other.producer_name,
            producer_version=other.producer_version,
            ir_version=other.ir_version,
        )
        graph.metadata, graph.function_protos, graph.model_version = {}, [], 0
        graph.external, graph.path = False, None
        return graph

    def copy(self, tensor_map: object = None) -> Graph:
        """A copy that shares nothing with this graph but the weights, which are never changed in place."""
        graph = self._adopt(super().copy(tensor_map))  # type: ignore[arg-type]
        for old, new in zip(self.walk(), graph.walk(), strict=True):
            new.provenance = provenance(old)  # type: ignore[attr-defined]
            new.attrs.update({k: v.copy() for k, v in new.attrs.items() if isinstance(v, gs.Constant)})
        graph.producer_name, graph.producer_version = self.producer_name, self.producer_version
        graph.import_domains = [_copied(d) for d in self.import_domains]
        graph.metadata, graph.function_protos = dict(self.metadata), list(self.function_protos)
        graph.model_version, graph.external, graph.path = self.model_version, self.external, self.path
        return graph

    def assign(self, other: Graph) -> None:
        """Become ``other`` (how a failed rewrite is rolled back)."""
        self.__dict__.update(other.__dict__)

    def to_proto(self) -> onnx.ModelProto:
        """The model with every weight inline. Deterministic: equal graphs give equal bytes.

        Raises:
            InputError: the weights are too large for one protobuf message (2 GiB).
        """
        if self.weight_bytes() >= INLINE_LIMIT:
            raise InputError(
                "the model is too large for one file", "its weights exceed 2 GiB", "save it with external data"
            )
        model, weights = self._skeleton()
        for tensor in _tensors(model.graph):
            if tensor.name in weights:
                _clear_external(tensor)
                tensor.raw_data = _bytes(weights[tensor.name])
        return model

    def to_probe(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """A small model for checkers and runtimes: weights of 1 MiB and more are inputs, not initializers.

        A runtime that is fed the second element as extra inputs computes the same outputs without holding a second copy
        of the weights.
        """
        model, weights = self._skeleton()
        large = {n: w for n, w in weights.items() if w.nbytes >= _KEEP_INLINE}
        top_level = {t.name for t in model.graph.initializer}
        for tensor in _tensors(model.graph):
            if tensor.name in weights and (tensor.name not in large or tensor.name not in top_level):
                _clear_external(tensor)
                tensor.raw_data = _bytes(weights[tensor.name])
        inputs = {i.name for i in model.graph.input}
        fed = {}
        for tensor in model.graph.initializer:
            if tensor.name in large:
                fed[tensor.name] = large[tensor.name]
                if tensor.name not in inputs:
                    model.graph.input.append(_info(tensor))
        kept = [t for t in model.graph.initializer if t.name not in fed]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        return model, fed

    def _skeleton(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """The model with its weights left out, and the weights by name."""
        weights: dict[str, np.ndarray] = {}
        light = self.copy()
        for tensor in light._constants():
            values = tensor._values
            if isinstance(values, np.ndarray) and values.dtype.kind in "OUS":
                tensor._values = LazyValues(onnx.numpy_helper.from_array(values, tensor.name))  # strings have no bytes
            elif isinstance(values, np.ndarray) and tensor.export_dtype == values.dtype and tensor.name:
                weights[tensor.name] = values
                tensor._values = _Elsewhere(tensor.name, values)
        model = gs.export_onnx(light, do_type_check=False)
        for proto, node in zip(_nodes(model.graph), light.walk(), strict=True):
            _write_provenance(proto, provenance(node))
        del model.functions[:]
        model.functions.extend(self.function_protos)
        onnx.helper.set_model_props(model, self.metadata)
        model.model_version = self.model_version
        if 0 < model.ir_version < 4:  # initializers had to be inputs then
            model.graph.input.extend(_info(t) for t in model.graph.initializer)
        return model, weights

    def save(self, path: str | os.PathLike[str], *, external: bool | None = None) -> list[Path]:
        """Write the model atomically; the weights go to ``<name>.data`` beside it when ``external``.

        Args:
            path: the ``.onnx`` file.
            external: store weights as external data; by default as the source did, or when they exceed 2 GiB.

        Returns:
            the files written, the model last.
        """
        path = Path(path)
        if external is None:
            external = self.external or self.weight_bytes() >= INLINE_LIMIT - (64 << 20)
        if not external:
            if self.weight_bytes() >= INLINE_LIMIT:
                raise InputError(f"cannot write {path}", "its weights exceed 2 GiB", "store them as external data")
            write_atomic(path, _serialized(*self._skeleton()))
            return [path]
        model, weights = self._skeleton()
        data = path.with_name(path.name + ".data")
        offset, chunks = 0, []
        for tensor in _tensors(model.graph):
            if tensor.name not in weights:
                continue
            array = weights[tensor.name]
            if array.nbytes < 1024 or array.dtype.name in _PACKED:  # shapes stay where shape inference can read them
                _clear_external(tensor)
                tensor.raw_data = _bytes(array)
                continue
            padding = -offset % 4096  # page-aligned, so that a runtime can map it
            chunks += [b"\0" * padding, array]
            offset += padding
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(array.nbytes))):
                tensor.external_data.add(key=key, value=value)
            offset += array.nbytes
        written = []
        if chunks:
            write_atomic(data, (c if isinstance(c, bytes) else _buffer(c) for c in chunks))
            written.append(data)
        write_atomic(path, [model.SerializeToString(deterministic=True)])
        return [*written, path]

    def digest(self) -> str:
        """SHA-256 over the structure and every weight; equal for graphs that save to the same bytes."""
        model, weights = self._skeleton()
        total = hashlib.sha256(model.SerializeToString(deterministic=True))
        for name, array in weights.items():
            total.update(name.encode())
            total.update(_buffer(array))
        return total.hexdigest()

    # -- looking ----------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[gs.Node]:
        """Every node, those of subgraphs right after the node that holds them."""
        stack = [iter(self.nodes)]
        while stack:
            for node in stack[-1]:
                yield node
                inner = [n for v in node.attrs.values() if isinstance(v, gs.Graph) for n in v.nodes]
                if inner:
                    stack.append(iter(inner))
                    break
            else:
                stack.pop()

    def _constants(self) -> Iterator[gs.Constant]:
        """Every constant tensor once, also those in attributes and subgraphs."""
        seen: set[int] = set()

        def fresh(tensors: Iterable[object]) -> Iterator[gs.Constant]:
            for tensor in tensors:
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

        yield from fresh(self.outputs)
        for node in self.walk():
            yield from fresh(node.inputs)
            yield from fresh(node.attrs.values())
            for attribute in node.attrs.values():
                if isinstance(attribute, gs.Graph):
                    yield from fresh(attribute.outputs)

    def constants(self) -> dict[str, np.ndarray]:
        """The initializers of the main graph that some node or output reads, by name."""
        return {t.name: t.values for t in self._constants() if t.name}

    def weight_bytes(self) -> int:
        """Bytes of all constants, without reading them."""
        return sum(t._values.nbytes for t in self._constants())

    def constant(self, tensor: Tensor) -> np.ndarray | None:
        """The value of a tensor that is an initializer, a Constant node, or an Identity of one; else None."""
        while not isinstance(tensor, gs.Constant):
            if len(tensor.inputs) != 1:
                return None
            node = tensor.inputs[0]
            if node.op == "Identity" and not node.domain:
                tensor = node.inputs[0]
            elif node.op == "Constant" and not node.domain:
                return _constant_node(node)
            else:
                return None
        return tensor.values

    def producer(self, tensor: Tensor) -> gs.Node | None:
        """The node that computes a tensor, or None for inputs and initializers."""
        return tensor.inputs[0] if tensor.inputs else None

    def is_output(self, tensor: Tensor) -> bool:
        """True if the caller of the model sees this tensor."""
        return any(tensor is o for o in self.outputs)

    def sole_consumer(self, tensor: Tensor) -> gs.Node | None:
        """The only node that reads a tensor, reading it once; None if there are others or it is a model output."""
        return tensor.outputs[0] if len(tensor.outputs) == 1 and not self.is_output(tensor) else None

    def signature(self) -> Signature:
        """Names, types and dimensions of the model's inputs and outputs."""
        return Signature(tuple(map(_port, self.inputs)), tuple(map(_port, self.outputs)))

    @property
    def opsets(self) -> dict[str, int]:
        """Opset version by domain; the default domain is ``""``."""
        return {"" if d.domain == "ai.onnx" else d.domain: d.version for d in self.import_domains}

    # -- changing ---------------------------------------------------------------------------------------------------

    def fresh_name(self, hint: str) -> str:
        """A name that no tensor or node of the graph has, made from ``hint``."""
        taken = self.__dict__.get("_taken")
        if taken is None:
            ends = {t.name for t in [*self.inputs, *self.outputs]}
            self._counts: dict[str, int] = {}
            taken = self._taken = {n for node in self.walk() for n in _names(node)} | ends
        name = hint
        while name in taken:
            self._counts[hint] = self._counts.get(hint, 0) + 1
            name = f"{hint}_{self._counts[hint]}"
        taken.add(name)
        return name

    def new_constant(self, hint: str, values: np.ndarray) -> gs.Constant:
        """A new initializer; give it to a node's inputs to make it part of the graph."""
        return gs.Constant(self.fresh_name(hint), np.ascontiguousarray(values).reshape(values.shape))

    def new_variable(self, hint: str, like: Tensor | None = None) -> gs.Variable:
        """A new tensor for a node's output, with the type and shape of ``like``."""
        return gs.Variable(self.fresh_name(hint), getattr(like, "dtype", None), getattr(like, "shape", None))

    def insert(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] | None = None,
        attrs: Mapping[str, object] | None = None,
        *,
        replaces: Iterable[gs.Node],
        domain: str | None = None,
    ) -> gs.Node:
        """Append a node that stands for ``replaces`` and inherits the union of their provenance.

        Args:
            op: operator type.
            inputs: tensors it reads.
            outputs: tensors it writes; by default one new variable.
            attrs: attributes.
            replaces: the nodes whose work it does.
            domain: operator domain, None for the default.

        The order of ``nodes`` is restored by :meth:`tidy`, which the pipeline calls after each pass.
        """
        node = gs.Node(op, self.fresh_name(f"{op}_ec"), dict(attrs or {}), domain=domain)
        node.inputs = list(inputs)
        node.outputs = list(outputs) if outputs is not None else [self.new_variable(f"{node.name}_out")]
        node.provenance = Provenance.union(provenance(n) for n in replaces)  # type: ignore[attr-defined]
        self.nodes.append(node)
        return node

    def absorb(self, node: gs.Node, others: Iterable[gs.Node]) -> None:
        """Record that ``node`` now also does the work of ``others``."""
        node.provenance = Provenance.union(map(provenance, [node, *others]))  # type: ignore[attr-defined]

    def rewire(self, old: Tensor, new: Tensor) -> None:
        """Let every reader of ``old`` read ``new``; if ``old`` is a model output, ``new`` takes its name.

        When both are visible to the caller (inputs, outputs or initializers), an Identity keeps the output's name.
        """
        redirect(old, new)
        for node in self.walk():
            for subgraph in (v for v in node.attrs.values() if isinstance(v, gs.Graph)):
                subgraph.outputs = [new if t is old else t for t in subgraph.outputs]
        if not self.is_output(old):
            return
        if isinstance(new, gs.Variable) and new.inputs and not self.is_output(new):
            old.name, new.name = self.fresh_name(old.name), old.name
            new.dtype, new.shape = old.dtype, old.shape
            self.outputs = [new if t is old else t for t in self.outputs]
            return
        before = self.producer(old)
        replacement = gs.Variable(old.name, old.dtype, old.shape)
        old.name = self.fresh_name(old.name)
        self.outputs = [replacement if t is old else t for t in self.outputs]
        self.insert("Identity", [new], [replacement], replaces=[before] if before else [])

    def tidy(self) -> None:
        """Drop nodes that no output needs and put the rest into topological order, stable in the old order.

        Raises:
            InputError: the graph has a cycle.
        """
        live = self._live()
        disconnect(n for n in self.nodes if id(n) not in live)
        self.nodes = [n for n in self.nodes if id(n) in live]
        self._sort()

    def _live(self) -> set[int]:
        live: set[int] = set()
        queue = deque(self.outputs)
        seen: set[int] = set()
        while queue:
            tensor = queue.popleft()
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            for node in tensor.inputs:
                if id(node) not in live:
                    live.add(id(node))
                    queue.extend(_reads(node))
        return live

    def _sort(self) -> None:
        position = {id(n): i for i, n in enumerate(self.nodes)}
        waiting: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            sources = {position[id(p)] for t in _reads(node) for p in t.inputs if id(p) in position} - {index}
            waiting[index] = len(sources)
            for source in sources:
                readers.setdefault(source, []).append(index)
        ready = [i for i, count in waiting.items() if not count]
        heapq.heapify(ready)
        order = []
        while ready:
            index = heapq.heappop(ready)
            order.append(index)
            for reader in readers.get(index, ()):
                waiting[reader] -= 1
                if not waiting[reader]:
                    heapq.heappush(ready, reader)
        if len(order) != len(self.nodes):
            stuck = next(n for i, n in enumerate(self.nodes) if waiting[i])
            raise InputError("the graph has a cycle", f"through {where(stuck)}")
        self.nodes = [self.nodes[i] for i in order]

    def infer_shapes(self, *, outputs: bool = False) -> None:
        """Fill in element types and shapes by ONNX shape inference with data propagation.

        Args:
            outputs: also those of the model's outputs, which are part of its signature.

        Raises:
            InputError: types or shapes contradict one another.
        """
        model, _ = self.to_probe()
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except Exception as error:
            raise InputError("shape inference failed", _one_line(error)) from None
        known = {v.name: v for v in [*inferred.value_info, *(inferred.output if outputs else ())]}
        fixed = {id(t) for t in [*self.inputs, *(() if outputs else self.outputs)]}
        for tensor in self.tensors().values():
            info = known.get(tensor.name)
            if (
                isinstance(tensor, gs.Variable)
                and id(tensor) not in fixed
                and info
                and info.type.HasField("tensor_type")
            ):
                tensor.dtype = get_onnx_tensor_dtype(info)
                shape = get_onnx_tensor_shape(info)
                if shape is not None:
                    tensor.shape = list(shape)

    def check(self, expected: Signature | None = None) -> None:
        """Prove that the graph is a valid model.

        Args:
            expected: the signature that must have survived.

        Raises:
            InputError: names what is wrong: a lost or changed input or output, a tensor nobody produces or that two
                nodes produce, a cycle, or the ONNX checker's complaint.
        """
        signature = self.signature()
        if expected is not None and signature != expected:
            raise InputError("the model's inputs or outputs changed", _difference(expected, signature))
        inputs = {id(t) for t in self.inputs}
        produced: dict[str, gs.Node | None] = {t.name: None for t in self.inputs}
        for node in self.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Variable) and tensor.name and id(tensor) not in inputs and not tensor.inputs:
                    raise InputError(f"{where(node)} reads {tensor.name!r}", "which no node produces")
            for tensor in node.outputs:
                if tensor.name and tensor.name in produced:
                    raise InputError(f"{tensor.name!r} is produced twice", f"the second time by {where(node)}")
                produced[tensor.name] = node
        for tensor in self.outputs:
            if isinstance(tensor, gs.Variable) and id(tensor) not in inputs and not tensor.inputs:
                raise InputError(f"the output {tensor.name!r} is produced by no node")
        model, _ = self.to_probe()
        try:
            onnx.checker.check_model(model)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        except Exception as error:
            raise InputError("the ONNX checker rejects the graph", _one_line(error)) from None


def named(graph: Graph) -> Graph:
    """A copy in which every node, at any depth, has a name of its own, since runtimes name their layers after nodes.

    A node without a name takes that of its first output; a name that is taken is numbered. What the node was called is
    kept as its only source, so that layers can be told by the names of ``graph``.
    """
    copy = graph.copy()
    taken: set[str] = set()
    for node in copy.walk():
        label = node.name or node.outputs[0].name
        node.name = label
        for count in itertools.count(1):
            if node.name not in taken:
                break
            node.name = f"{label}_{count}"
        taken.add(node.name)
        node.provenance = replace(provenance(node), sources=(label,))  # type: ignore[attr-defined]
    return copy


def redirect(old: Tensor, new: Tensor) -> None:
    """Let every node that reads ``old`` read ``new``, in time linear in their inputs.

    graphsurgeon's own lists search each other by value, which is quadratic in the readers of a tensor; hence ``list``.
    """
    if old is new:
        return
    for reader in {id(n): n for n in old.outputs}.values():
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                list.__setitem__(reader.inputs, index, new)
                list.append(new.outputs, reader)
    list.clear(old.outputs)


def disconnect(nodes: Iterable[gs.Node]) -> None:
    """Take nodes off the tensors they read and write, in time linear in the readers of these tensors."""
    dead = {id(n): n for n in nodes}
    for end, side in (("inputs", "outputs"), ("outputs", "inputs")):
        for tensor in {id(t): t for n in dead.values() for t in getattr(n, end)}.values():
            ends = getattr(tensor, side)
            kept = [n for n in ends if id(n) not in dead]
            list.clear(ends)
            list.extend(ends, kept)
        for node in dead.values():
            list.clear(getattr(node, end))


class _Elsewhere(LazyValues):
    """Stands for a weight whose bytes are stored outside the protobuf message."""

    def __init__(self, name: str, values: np.ndarray):
        dtype = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        self.tensor = onnx.TensorProto(name=name, data_type=dtype, dims=values.shape)
        self.tensor.data_location = onnx.TensorProto.EXTERNAL
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes


def _serialized(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of ``model`` with its weights inline, without building the whole message in memory.

    A protobuf message is the concatenation of its fields in any order, so the initializers can follow the rest of the
    graph, and the graph the rest of the model (https://protobuf.dev/programming-guides/encoding/).
    """
    streamed: list[tuple[bytes, np.ndarray]] = []
    kept = []
    for tensor in model.graph.initializer:
        array = weights.get(tensor.name)
        if array is not None and array.nbytes >= 1024 and array.dtype.name not in _PACKED:
            _clear_external(tensor)
            streamed.append((tensor.SerializeToString(deterministic=True) + _tag(9, array.nbytes), array))
        else:
            kept.append(_copied(tensor))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for tensor in _tensors(model.graph):
        if tensor.name in weights and tensor.data_location == onnx.TensorProto.EXTERNAL:
            _clear_external(tensor)
            tensor.raw_data = _bytes(weights[tensor.name])
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    heads = [(_tag(5, len(head) + array.nbytes) + head, array) for head, array in streamed]
    yield model.SerializeToString(deterministic=True)
    yield _tag(7, len(graph) + sum(len(head) + array.nbytes for head, array in heads))
    yield graph
    for head, array in heads:
        yield head
        yield _buffer(array)


def _tag(number: int, size: int) -> bytes:
    """Key and length of a length-delimited protobuf field."""
    encoded = bytearray()
    for value in (number << 3 | 2, size):
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)


def _clear_external(tensor: onnx.TensorProto) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def _bytes(array: np.ndarray) -> bytes:
    if array.dtype.name in _PACKED:
        return onnx.numpy_helper.from_array(array).raw_data
    return array.tobytes()


def _buffer(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _copied(proto):
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _info(tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes in the order of :meth:`Graph.walk`."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


_UNKEPT = {
    onnx.AttributeProto.TYPE_PROTO,
    onnx.AttributeProto.TYPE_PROTOS,
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
    onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.GRAPHS,
}


def _reject_unkept_attributes(graph: onnx.GraphProto, what: str) -> None:
    """Refuse what graphsurgeon would silently drop, rather than write a different model."""
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.type in _UNKEPT:
                kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                raise InputError(
                    f"{what}: {node.op_type} {node.name!r} cannot be kept", f"its {attribute.name} is a {kind}"
                )


def _read_weight(tensor: onnx.TensorProto, folder: Path | None, what: str) -> np.ndarray:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _map_external(tensor, folder, what)
    try:
        return onnx.numpy_helper.to_array(tensor)
    except Exception as error:
        raise InputError(f"{what}: weight {tensor.name!r} is malformed", _one_line(error)) from None


def _map_external(tensor: onnx.TensorProto, folder: Path | None, what: str) -> np.ndarray:
    """Memory-map a tensor stored as external data, after proving that it lies beneath the model's folder."""
    info = {e.key: e.value for e in tensor.external_data}
    name = info.get("location", "")

    def bad(why: str) -> InputError:
        return InputError(f"{what}: weight {tensor.name!r} cannot be read", f"external data {name!r} {why}")

    if folder is None or not name:
        raise bad("has no location")
    root = folder.resolve()
    file = (folder / name).resolve()
    if Path(name).is_absolute() or not file.is_relative_to(root):
        raise bad("lies outside the model's folder")
    try:
        status = file.stat()
    except OSError:
        raise bad("does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise bad("is not a regular file")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        offset = int(info.get("offset", 0))
        count = 1
        for dim in tensor.dims:
            count *= dim
        length = int(info.get("length") or count * dtype.itemsize)
    except (ValueError, TypeError, KeyError):
        raise bad("has a malformed offset, length or type") from None
    if dtype.name in _PACKED:
        raise bad(f"holds {dtype.name}, which is read only from inside the file")
    if offset < 0 or count < 0 or length != count * dtype.itemsize:
        raise bad(f"holds {length} bytes where {list(tensor.dims)} of {dtype.name} needs {count * dtype.itemsize}")
    if offset + length > status.st_size:
        raise bad(f"is too short: {status.st_size} bytes, {offset + length} needed")
    if not count:
        return np.zeros(tuple(tensor.dims), dtype)
    if offset % dtype.itemsize:
        return np.frombuffer(np.memmap(file, np.uint8, "r", offset, (length,)).tobytes(), dtype).reshape(tensor.dims)
    return np.asarray(np.memmap(file, dtype, "r", offset, tuple(tensor.dims)))


def _constant_node(node: gs.Node) -> np.ndarray | None:
    """The value of a Constant node in any of its spellings."""
    for key, value in node.attrs.items():
        if key == "value":
            return value.values if isinstance(value, gs.Constant) else None
        if key in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.array(value, np.int64)
    return None


def _reads(node: gs.Node) -> Iterator[Tensor]:
    """Tensors a node needs, also through its subgraphs."""
    yield from node.inputs
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            yield from attribute.outputs
            for inner in attribute.nodes:
                yield from _reads(inner)


def _names(node: gs.Node) -> Iterator[str]:
    yield node.name
    for tensor in [*node.inputs, *node.outputs]:
        yield tensor.name


def _port(tensor: Tensor) -> Port:
    dtype = tensor.dtype
    number = (
        0
        if dtype is None
        else dtype
        if isinstance(dtype, int)
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )
    return Port(tensor.name, number, None if tensor.shape is None else tuple(tensor.shape))


def _difference(expected: Signature, found: Signature) -> str:
    for kind in ("inputs", "outputs"):
        old, new = getattr(expected, kind), getattr(found, kind)
        if [p.name for p in old] != [p.name for p in new]:
            return f"{kind} were {[p.name for p in old]}, are {[p.name for p in new]}"
        for a, b in zip(old, new, strict=True):
            if a != b:
                return f"{kind[:-1]} {a.name!r} was type {a.dtype} {a.shape}, is type {b.dtype} {b.shape}"
    return ""


# -- provenance in metadata_props ------------------------------------------------------------------------------------


def _read_provenance(node: gs.Node, props: dict[str, str]) -> Provenance:
    """Provenance from our own keys, else from what the exporter left."""
    modules = tuple(json.loads(props.pop(_MODULES, "[]")))
    sources = tuple(json.loads(props.pop(_SOURCES, "[]")))
    if not modules:
        module = _dynamo_module(props.get(_SCOPES, "")) if _SCOPES in props else _torchscript_module(node.name)
        modules = (module,) if module else ()
    if _TRACE in props:
        props[_TRACE] = _FRAME.sub(lambda m: f'File "{_portable(m[1])}"', props[_TRACE])
    return Provenance(modules, sources or ((node.name,) if node.name else ()), tuple(props.items()))


def _portable(path: str) -> str:
    """A source path without what differs between machines and people: a bundle must not tell where its maker lives."""
    _, found, inner = path.rpartition("/site-packages/")
    return inner if found else path.rpartition("/")[2] if path.startswith("/") else path


def _dynamo_module(scopes: str) -> str:
    """``torch.onnx.export(dynamo=True)`` lists the scopes of a node: modules from the root, then the fx node's name."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""


def _torchscript_module(name: str) -> str:
    """The TorchScript exporter names nodes ``/layer1/layer1.0/conv1/Conv``: each scope extends or replaces the last."""
    if not name.startswith("/"):
        return ""
    path: list[str] = []
    for scope in name.split("/")[1:-1]:
        if path and scope.startswith(path[-1] + "."):
            path[-1] = scope
        else:
            path.append(scope)
    return ".".join(path)


def _write_provenance(proto: onnx.NodeProto, origin: Provenance) -> None:
    props = dict(origin.metadata)
    if origin.modules:
        props[_MODULES] = json.dumps(origin.modules)
    if origin.sources:
        props[_SOURCES] = json.dumps(origin.sources)
    for key, value in props.items():
        proto.metadata_props.add(key=key, value=value)
