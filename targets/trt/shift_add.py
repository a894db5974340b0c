"""Layers of coded weights inside an engine: the operators of ``ai.edgecompile`` as TensorRT plugins.

By default the weights of such layers are decoded while the graph is legalized, and TensorRT's own kernels run on
floats. With the option ``shift_add=plugin`` the codes stay packed, and one kernel decodes them in registers on the way
into a float32 sum: a product of one row then reads a quarter (8 bits) to a sixteenth (2 bits) of the bytes. Tensor
cores it does not use, so with many rows decoded weights win. Nothing here was timed on hardware, hence the default.

The plugins are compiled ahead of time: :func:`register` describes them to ``tensorrt.plugin`` and hands it PTX, which
the builder puts into the engine. What loads the engine needs neither this file nor Python. NVRTC compiles the kernel,
with every extent a constant, before the builder starts.

What the parser gets for a node of ``ai.edgecompile``: one of the same name in the domain :data:`NAMESPACE`, whose
attributes ``plugin_namespace`` and ``aot`` make it a plugin, with the codes as the kernel reads them, both INT32 since
TensorRT widens UINT8 constants to that:

- ``words`` ``[bits, ceil(columns / 32), rows]``: bit j of word w of plane i is bit i of the code in column
  ``32 w + j``.
- ``exponents`` ``[groups, ceil(n / 4)]``, four bytes each: of a book the exponent of each row, ``n = rows``; of a
  binary code those of each row, bit and term, ``n = 2 rows bits``. The last bytes are padding.

Its local function undoes this and goes on as the original operator does, so that any ONNX runtime runs the graph.

Sources: TensorRT documentation, ``tensorrt.plugin`` and "Providing an Ahead-of-Time Implementation";
samples/python/quickly_deployable_plugins/README.md of github.com/NVIDIA/TensorRT (names, namespace, ``aot``);
docs/Changelog.md of github.com/onnx/onnx-tensorrt (10.9).
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from edgecompile.errors import EnvironmentMissing
from edgecompile.functions import CODED, DOMAIN, drop_uncalled, inlined
from edgecompile.graph import Graph
from edgecompile.targets.trt.probe import NVRTC_FIX, no_plugins, nvrtc

NAMESPACE = "edgecompile"
VERSION = 1
NOTHING = "shift_add=plugin found no coded weights: the pass shift_add codes, legalize{target=trt,keep=true} keeps them"
LANES, SPLITS, TILE = 32, 8, 8  # rows of a block, parts of a row's sum, most tokens of a thread

# One block computes TILE tokens of LANES rows: thread (lane, split) adds up every SPLITS-th word of columns of its row,
# and the parts are added in order. A token is a row of a linear layer or a pixel of a convolution; a linear layer is a
# convolution of images of one pixel. Threads of a warp read neighbouring words, and the same inputs.
SOURCE = r"""
extern "C" __global__ void shift_add(const float *x, const unsigned int *words, const signed char *exponents,
#ifndef BINARY
                                     const float *levels,
#endif
                                     int tokens, int height, int width, float *y)
{
    __shared__ float partial[SPLITS][TILE][LANES];
#ifndef BINARY
    __shared__ float book[1 << BITS];
#endif
    const int lane = threadIdx.x, split = threadIdx.y, row = blockIdx.y * LANES + lane;
    const int across = (width - 1) / STRIDE_W + 1, down = (height - 1) / STRIDE_H + 1;
    const long long pixels = (long long)across * down, first = (long long)blockIdx.x * TILE;
    const float *from[TILE];
    float sum[TILE];
#ifndef BINARY
    for (int i = split * LANES + lane; i < 1 << BITS; i += SPLITS * LANES)
        book[i] = levels[i];
    __syncthreads();
#endif
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
        const long long token = first + t < tokens ? first + t : tokens - 1;
        const long long image = token / pixels, pixel = token % pixels;
        from[t] = x + image * COLUMNS * PLANE + pixel / across * STRIDE_H * width + pixel % across * STRIDE_W;
        sum[t] = 0.0f;
    }
    if (row < ROWS)
        for (int w = split; w < WORDS; w += SPLITS) {
            unsigned int bits[BITS];
            float scale[SCALES];
#pragma unroll
            for (int b = 0; b < BITS; ++b)
                bits[b] = words[((long long)b * WORDS + w) * ROWS + row];
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                const int column = 32 * w + j;
                if (COLUMNS % 32 && column >= COLUMNS)
                    break;
                if (j == 0 || (GROUP % 32 && column % GROUP == 0)) {
                    const signed char *e = exponents + (long long)(column / GROUP) * EXPONENT_BYTES;
#ifdef BINARY
#pragma unroll
                    for (int b = 0; b < BITS; ++b) {
                        const int one = e[(row * BITS + b) * 2], two = e[(row * BITS + b) * 2 + 1];
                        scale[b] = ldexpf(one & 1 ? -1.0f : 1.0f, one >> 1) + ldexpf(two & 1 ? -1.0f : 1.0f, two >> 1);
                    }
#else
                    scale[0] = ldexpf(1.0f, e[row]);
#endif
                }
#ifdef BINARY
                float weight = 0.0f;
#pragma unroll
                for (int b = 0; b < BITS; ++b)
                    weight += bits[b] >> j & 1 ? scale[b] : -scale[b];
#else
                int code = 0;
#pragma unroll
                for (int b = 0; b < BITS; ++b)
                    code |= (int)(bits[b] >> j & 1) << b;
                const float weight = book[code] * scale[0];
#endif
#pragma unroll
                for (int t = 0; t < TILE; ++t)
                    sum[t] += weight * from[t][column * PLANE];
            }
        }
#pragma unroll
    for (int t = 0; t < TILE; ++t)
        partial[split][t][lane] = sum[t];
    __syncthreads();
    for (int t = split; t < TILE; t += SPLITS) {
        const long long token = first + t;
        if (row >= ROWS || token >= tokens)
            continue;
        float total = partial[0][t][lane];
        for (int s = 1; s < SPLITS; ++s)
            total += partial[s][t][lane];
        y[(token / pixels * ROWS + row) * pixels + token % pixels] = total;
    }
}
"""
ENTRY = "shift_add"


@dataclass(frozen=True)
class Kernel:
    """What is constant in the kernel of one node.

    The attribute ``constants`` of the node lists it. Single numbers 10.16 cannot hand on to a plugin: it makes a number
    of an array of one, which NumPy 2.4 refuses.

    Attributes:
        columns, group: as of the operator: inputs, and how many of them share a scale.
        rows: outputs.
        bits: of a code.
        stride_h, stride_w: of a convolution, 1 for a linear layer.
        tile: tokens that a thread works on, 1 to :data:`TILE`.
    """

    columns: int
    group: int
    rows: int
    bits: int
    stride_h: int
    stride_w: int
    tile: int

    @classmethod
    def of(cls, constants: Iterable[Any]) -> Kernel:
        """The kernel of the attribute ``constants``."""
        return cls(**{field.name: int(c) for field, c in zip(fields(cls), constants, strict=True)})

    def source(self, name: str) -> str:
        """The kernel of the operator ``name`` in CUDA C."""
        binary = name.startswith("Binary")
        values = {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "words": -(-self.columns // 32),
            "exponent_bytes": -(-self.rows * (2 * self.bits if binary else 1) // 4) * 4,
            "scales": self.bits if binary else 1,
            "plane": "((long long)height * width)" if name.endswith("Conv") else 1,  # between two columns of the input
            "lanes": LANES,
            "splits": SPLITS,
        }
        head = [f"#define {label.upper()} {value}" for label, value in values.items()]
        return "\n".join([*head, *["#define BINARY"] * binary, SOURCE])


# -- the graph ---------------------------------------------------------------------------------------------------------


def lower(graph: Graph) -> Graph:
    """A copy of a graph in which coded layers are plugin nodes; those whose codes are computed, or whose input is not
    float32, stay as they are.

    Args:
        graph: it is not changed.
    """
    from onnx import helper

    made = graph.copy()
    made.infer_shapes()
    stored: dict[tuple[int, ...], list[Any]] = {}
    used: set[str] = set()
    for node in list(made.nodes):
        codes = [c for t in node.inputs[1:] if (c := made.constant(t)) is not None]
        if node.domain != DOMAIN or node.op not in CODED or len(codes) < len(node.inputs) - 1:
            continue
        x, y = node.inputs[0], node.outputs[0]
        if x.dtype != np.float32 or x.shape is None:
            continue
        key = tuple(map(id, node.inputs[1:]))
        if key not in stored:
            words, exponents = packed(codes[0], codes[1])
            stored[key] = [made.new_constant(f"{y.name}_words", words)]
            stored[key] += [made.new_constant(f"{y.name}_exponents", exponents), *node.inputs[3:]]
        bits, rows = codes[0].shape[:2]
        strides = [int(s) for s in node.attrs.get("strides", (1, 1))]
        tile = _tile(node.op, list(y.shape or x.shape))
        kernel = Kernel.of([node.attrs["columns"], node.attrs["group"], rows, bits, *strides, tile])
        attributes = {"plugin_version": str(VERSION), "plugin_namespace": NAMESPACE, "aot": 1}
        attributes |= {"constants": list(vars(kernel).values()), **node.attrs}
        node.outputs = []
        plugin = made.insert(node.op, [x, *stored[key]], [y], attributes, replaces=[node], domain=NAMESPACE)
        plugin.name, node.inputs = node.name, []  # a profile tells layers by the names of the graph
        used.add(node.op)
    if not used:
        return made
    made.tidy()
    plugins = [function(f, made.opsets[""]) for f in made.function_protos if f.domain == DOMAIN and f.name in used]
    drop_uncalled(made)
    made.function_protos = [*made.function_protos, *plugins]
    made.import_domains = [*made.import_domains, helper.make_opsetid(NAMESPACE, VERSION)]
    return made


def decoded(graph: Graph) -> Graph:
    """The graph, or a copy in which the weights of the coded layers are decoded if there are such."""
    if not any(node.domain == DOMAIN and node.op in CODED for node in graph.nodes):
        return graph
    made = graph.copy()
    for node in list(made.nodes):
        if node.domain == DOMAIN and node.op in CODED and (change := inlined(made, node)):
            change()
    made.tidy()
    drop_uncalled(made)
    return made


def _tile(name: str, shape: Sequence[Any]) -> int:
    """Tokens of a thread for an output of this shape: all if they are few."""
    counts = [*shape[:1], *shape[2:]] if name.endswith("Conv") else shape[:-1]
    fixed = all(isinstance(c, int) and c > 0 for c in counts)
    return min(math.prod(counts), TILE) if fixed else TILE


def packed(planes: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as the operators hold them, as the kernel reads them: int32 words and exponents.

    Args:
        planes: uint8 ``[bits, rows, ceil(columns / 8)]``.
        exponents: int8 ``[rows, groups]`` or ``[bits, rows, groups, 2]``.
    """
    words = np.pad(planes, ((0, 0), (0, 0), (0, -planes.shape[2] % 4))).view("<u4").view("<i4")
    order = (1, 0) if exponents.ndim == 2 else (2, 1, 0, 3)
    moved = exponents.transpose(order)
    flat = moved.reshape(len(moved), -1)
    padded = np.ascontiguousarray(np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4))))
    return np.ascontiguousarray(words.transpose(0, 2, 1)), padded.view("<i4")


_BYTES = """
   tail = Constant <value_ints = [-1]> ()
   offsets = Constant <value = uint32[4] {0, 8, 16, 24}> ()
   as_they_are = Constant <value_ints = [0, 0, -1]> ()
   by_row = Transpose <perm = [0, 2, 1]> (words)
   by_row_wide = Unsqueeze (by_row, tail)
   by_row_unsigned = Cast <to = 12> (by_row_wide)
   by_row_moved = BitShift <direction = "RIGHT"> (by_row_unsigned, offsets)
   by_row_bytes = Cast <to = 2> (by_row_moved)
   planes = Reshape (by_row_bytes, as_they_are)
   stored_wide = Unsqueeze (stored, tail)
   stored_unsigned = Cast <to = 12> (stored_wide)
   stored_moved = BitShift <direction = "RIGHT"> (stored_unsigned, offsets)
   stored_bytes = Cast <to = 3> (stored_moved)
   by_group = Constant <value_ints = [0, -1]> ()
   stored_flat = Reshape (stored_bytes, by_group)
   extents = Shape (words)
   last_extent = Constant <value_ints = [2]> ()
   row_count = Gather (extents, last_extent)
   origin = Constant <value_ints = [0]> ()
   along_rows = Constant <value_ints = [1]> ()
"""
_BOOK = """
   trimmed = Slice (stored_flat, origin, row_count, along_rows)
   exponents = Transpose <perm = [1, 0]> (trimmed)
"""
_BINARY = """
   plane_count = Gather (extents, origin)
   pair = Constant <value_ints = [2]> ()
   pairs = Mul (row_count, plane_count)
   numbers = Mul (pairs, pair)
   trimmed = Slice (stored_flat, origin, numbers, along_rows)
   apart = Concat <axis = 0> (origin, row_count, plane_count, pair)
   by_term = Reshape (trimmed, apart)
   exponents = Transpose <perm = [2, 1, 0, 3]> (by_term)
"""


def function(operator: Any, opset: int) -> Any:
    """The local function of a plugin: its constants as the operator holds them, then the operator's own body.

    Args:
        operator: the function of the operator, an ``onnx.FunctionProto``.
        opset: of the graph.
    """
    from onnx import parser

    name = operator.name
    body = _BYTES + (_BINARY if name.startswith("Binary") else _BOOK)
    inputs = ", ".join(["x", "words", "stored", *list(operator.input)[3:]])
    made = parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{NAMESPACE}">\n{name} ({inputs}) => (y) {{{body}}}'
    )
    made.node.extend(operator.node)
    made.attribute.extend(["plugin_version", "plugin_namespace", "aot", "constants", *operator.attribute])
    return made


def kernels(graph: Graph) -> list[tuple[str, Kernel]]:
    """Name and kernel of each plugin node of a graph."""
    return [(n.op, Kernel.of(n.attrs["constants"])) for n in graph.nodes if n.domain == NAMESPACE]


# -- the plugins -------------------------------------------------------------------------------------------------------

Compiler = Callable[[str, str], bytes]


def register(trt: Any, used: Sequence[tuple[str, Kernel]], architecture: str, compiler: Compiler | None = None) -> None:
    """Make plugins known to TensorRT's builder, their kernels compiled.

    Args:
        trt: the module ``tensorrt``.
        used: the kernels that will be asked for.
        architecture: compute capability to compile for, e.g. ``8.7``. Later GPUs can run it.
        compiler: from source and architecture to PTX; NVRTC by default.

    Raises:
        EnvironmentMissing: this TensorRT has no such plugins, or there is no compiler.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise no_plugins(trt.__version__)
    try:
        plugin = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise EnvironmentMissing("tensorrt.plugin cannot be loaded", str(error), "use shift_add=inline") from None
    compiled = {one: (compiler or compile_ptx)(one[1].source(one[0]), architecture) for one in dict.fromkeys(used)}
    for name in CODED:
        identity = f"{NAMESPACE}::{name}"
        if not hasattr(getattr(plugin.op, NAMESPACE, None), name):
            plugin.register(identity)(_description(plugin, name))
        plugin.aot_impl(identity)(_implementation(plugin, name, compiled))


def _signature(plugin: Any, name: str, described: bool) -> inspect.Signature:
    """What ``tensorrt.plugin`` wants a function to declare: tensors first, then attributes, by name and type."""
    tensors = ["x", "words", "exponents", *["levels"] * (not name.startswith("Binary"))]
    types = dict.fromkeys(tensors, plugin.TensorDesc) | {"constants": np.ndarray[Any, np.dtype[np.int32]]}
    if described:
        returns = plugin.TensorDesc
    else:
        types |= dict.fromkeys(("outputs", "tactic"), inspect.Parameter.empty)
        returns = tuple[str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(label, kind, annotation=given) for label, given in types.items()], return_annotation=returns
    )


def _spatial(x: Any, kernel: Kernel) -> tuple[Any, Any]:
    """Height and width of what a convolution gives, as expressions."""
    return (x.shape_expr[2] - 1) // kernel.stride_h + 1, (x.shape_expr[3] - 1) // kernel.stride_w + 1


def _description(plugin: Any, name: str) -> Callable[..., Any]:
    """Shape and type of the output; the type is that of the input."""

    def described(*tensors: Any, constants: np.ndarray) -> Any:
        x, kernel = tensors[0], Kernel.of(constants)
        if name.endswith("Conv"):
            shape = (x.shape_expr[0], kernel.rows, *_spatial(x, kernel))
        else:
            shape = (*(x.shape_expr[i] for i in range(x.ndim - 1)), kernel.rows)
        return plugin.from_shape_expr(shape, x.dtype)

    described.__signature__ = _signature(plugin, name, True)  # type: ignore[attr-defined]
    return described


def _implementation(plugin: Any, name: str, compiled: dict[tuple[str, Kernel], bytes]) -> Callable[..., Any]:
    """Kernel, grid and scalar arguments."""

    def implemented(*given: Any) -> Any:
        x, (constants, _, _) = given[0], given[-3:]
        kernel = Kernel.of(constants)
        if name.endswith("Conv"):
            down, across = _spatial(x, kernel)
            tokens, height, width = x.shape_expr[0] * down * across, x.shape_expr[2], x.shape_expr[3]
        else:
            tokens, height, width = x.shape_expr.numel() // kernel.columns, 1, 1
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y = plugin.cdiv(tokens, kernel.tile), -(-kernel.rows // LANES)
        launch.block_x, launch.block_y = LANES, SPLITS
        arguments = plugin.SymIntExprs(3)
        for index, value in enumerate((tokens, height, width)):
            arguments[index] = plugin.SymInt32(value)
        return ENTRY, compiled[name, kernel], launch, arguments

    implemented.__signature__ = _signature(plugin, name, False)  # type: ignore[attr-defined]
    return implemented


# -- the compiler ------------------------------------------------------------------------------------------------------


def compile_ptx(source: str, architecture: str) -> bytes:
    """PTX of CUDA C.

    Args:
        source: one translation unit.
        architecture: compute capability, e.g. ``8.7``.

    Raises:
        EnvironmentMissing: there is no NVRTC, or it does not compile for this GPU.
    """
    binding = nvrtc()

    def call(name: str, *arguments: Any) -> Any:
        try:
            error, *result = getattr(binding, name)(*arguments)
        except RuntimeError as problem:  # the library itself is looked for now
            raise EnvironmentMissing("NVRTC cannot be loaded", str(problem), NVRTC_FIX) from None
        if error != binding.nvrtcResult.NVRTC_SUCCESS:
            raise EnvironmentMissing("NVRTC cannot compile the shift-add plugins", f"{name}: {error!r}", NVRTC_FIX)
        return result[0] if result else None

    program = call("nvrtcCreateProgram", source.encode(), b"shift_add.cu", 0, [], [])
    options = [f"--gpu-architecture=compute_{architecture.replace('.', '')}".encode()]
    call("nvrtcCompileProgram", program, len(options), options)
    text = b" " * call("nvrtcGetPTXSize", program)
    call("nvrtcGetPTX", program, text)
    call("nvrtcDestroyProgram", program)
    return text.rstrip(b"\0")
