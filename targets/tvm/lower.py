"""From a graph to a library: import into Relax, lower, schedule, compile, link; and which nodes each kernel stands for.

TVM keeps no record of where an operator came from. Every node of the graph is therefore bound to a variable with its
number in the name, which survives until operators are fused into kernels. What a kernel computes is then recognised by
its value: the same operators on the same operands.

Beside ``main`` a library for a CPU has the function :data:`TIMED`: the same calls of the same kernels on the same
constants, and one of a kernel that reads the clock before and after each of them. A function of the virtual machine is
some bytes per call, so that it costs little to have; it needs nobody who watches, and so it works on a board as well.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompile.errors import EdgecompileError, InputError
from edgecompile.functions import DOMAIN
from edgecompile.graph import Graph, provenance, where
from edgecompile.targets.tvm import cuda, int8, schedules, shift_add
from edgecompile.targets.tvm.options import Options

_NUMBER = re.compile(r"node_(\d+)(?:_.*)?")
_OPSETS = range(7, 25)
TIMED = "main_timed"
"""The function that runs the model and times its kernels.

It takes the inputs of ``main`` and int64 ``[2 * kernels, 2]``, and returns that and what ``main`` returns; a row is a
reading of the clock in seconds and nanoseconds, two for each kernel.
"""
_STAMP = "edgecompile_stamp"
_CLOCK_MONOTONIC = 1  # as Linux numbers clocks on all machines


def check(graph: Graph) -> None:
    """Refuse what Relax cannot take, all at once.

    Raises:
        InputError: the opset, an operator (by module path) or an input without a static shape.
    """
    from tvm.relax.frontend.onnx import onnx_frontend

    opset = graph.opsets.get("", 0)
    if opset not in _OPSETS:
        raise InputError(
            f"TVM cannot take opset {opset}", f"it is tested with {_OPSETS[0]} to {_OPSETS[-1]}", "export with another"
        )
    known = {*onnx_frontend._get_convert_map(), "If", "Constant"}
    coded = {(DOMAIN, op) for op in shift_add.OPERATORS}
    refused = [
        n
        for n in graph.walk()
        if (n.domain, n.op) not in coded and (n.domain not in (None, "", "ai.onnx") or n.op not in known)
    ]
    if refused:
        raise InputError(
            f"TVM has no operator for {', '.join(where(n) for n in refused[:5])}",
            f"{len(refused)} of {len(list(graph.walk()))} nodes have none",
            "run the pass legalize{target=tvm}, or use --target ort",
        )
    for tensor in graph.inputs:
        if tensor.shape is None or not all(isinstance(d, int) for d in tensor.shape):
            raise InputError(
                f"the input {tensor.name!r} has no static shape",
                "TVM's schedules are made for one shape",
                f"give it with --input {tensor.name}:1x3x224x224",
            )


@dataclass(frozen=True)
class Compiled:
    """A model that TVM's virtual machine runs.

    Attributes:
        executable: what the virtual machine takes, or what can be exported.
        kernels: as :func:`build` returns them, and whose choice each is
            (:attr:`edgecompile.targets.tvm.schedules.Kernel.origin`) if it was chosen.
        known: symbols and scheduled functions by the hash of what they are before they are scheduled.
        base: what :func:`varied` started from: the other kernels that it calls are there.
    """

    executable: Any
    kernels: Sequence[Mapping[str, Any]]
    known: Mapping[int, tuple[str, Any]]
    base: Compiled | None = None

    @functools.cached_property
    def linked(self) -> Any:
        """The executable with all kernels that it calls, for this process."""
        if self.base is not None:
            self.executable.mod.import_module(self.base.executable.mod.imports[0])
        return self.executable

    def export(self, path: Path, chosen: Options) -> None:
        """Write the library; that of what :func:`varied` made lacks the kernels of its base.

        Raises:
            InputError: it cannot be linked.
        """
        with _compiling(chosen):
            self.executable.export_library(str(path), **_link(chosen))


def build(
    graph: Graph, chosen: Options, path: Path, say: Callable[[str], None] | None = None
) -> list[Mapping[str, Any]]:
    """Compile ``graph`` into a shared library.

    Args:
        graph: the graph, its nodes named by :func:`edgecompile.graph.named`.
        chosen: the options.
        path: the library to write.
        say: told how coded weights are computed.

    Returns:
        for each kernel in the order of execution: its symbol and the names of the nodes it stands for.

    Raises:
        InputError: TVM refuses a node (named by module path) or fails to compile.
    """
    made = compiled(folded(graph, chosen, say), graph, chosen)
    made.export(path, chosen)
    return list(made.kernels)


def compiled(
    module: Any,
    graph: Graph,
    chosen: Options,
    pick: schedules.Pick | None = None,
    forms: schedules.Forms | None = None,
) -> Compiled:
    """Compile a model.

    Args:
        module: what :func:`folded` made of ``graph``.
        graph, chosen: as for :func:`build`.
        pick: chooses for each kernel that leaves a choice; None: the cost models do.
        forms: as for :func:`edgecompile.targets.tvm.schedules.legalizations`.

    Raises:
        InputError: TVM fails to compile it.
    """
    import tvm
    from tvm import relax

    with _compiling(chosen) as target:
        loops = _loops(module, chosen, pick, forms)
        grouped = relax.transform.FuseOps()(loops)
        kernels, fused = _kernels(loops, grouped, graph), relax.transform.FuseTIR()(grouped)
        numbers = {var.name_hint: _number(f) for var, f in _primitive(fused)} if pick else {}
        fused = _scheduled(fused, chosen)
        known = {numbers[v.name_hint]: (v.name_hint, f) for v, f in _primitive(fused)} if pick else {}
        finished, kernels = tvm.transform.Sequential(_finish())(fused), _with_origin(kernels, fused)
        timed, kernels = _timed(finished["main"], kernels)
        if not chosen.cuda:  # a GPU is not done when a call returns
            finished = tvm.IRModule({**finished.functions, TIMED: timed, _STAMP: _stamp()})
        with cuda.source_kept():
            executable = tvm.compile(finished, target=target, relax_pipeline=None)
    return Compiled(executable, kernels, known)


def varied(
    base: Compiled,
    module: Any,
    chosen: Options,
    pick: schedules.Pick,
    forms: schedules.Forms | None = None,
) -> Compiled:
    """Compile a model with other choices: only kernels that ``base`` has not; the others are called there.

    What is returned has :data:`TIMED` only, and its kernels know no nodes.

    Args, Raises: as of :func:`compiled`, which made ``base``.
    """
    import tvm
    from tvm import relax

    with _compiling(chosen) as target:
        fused = relax.transform.FuseTIR()(relax.transform.FuseOps()(_loops(module, chosen, pick, forms)))
        found = {var: base.known.get(_number(f)) for var, f in _primitive(fused)}
        fresh = tvm.IRModule({var: fused[var] for var, known in found.items() if known is None})
        fresh = schedules.apply(fresh, chosen)
        for var, known in found.items():
            fused.update_func(var, fresh[var] if known is None else known[1])
        symbols = {v.name_hint: known[0] if known else f"{v.name_hint}_varied" for v, known in found.items()}
        kernels = _with_origin([{"symbol": v.name_hint, "nodes": []} for v in found], fused)
        finished = tvm.transform.Sequential(_finish())(fused)
        timed, kernels = _timed(finished["main"], kernels)
        kernels = [{**kernel, "symbol": symbols[kernel["symbol"]]} for kernel in kernels]
        code = {
            symbol: finished[var].with_attr("global_symbol", symbol)
            for var, known in found.items()
            if known is None and (symbol := symbols[var.name_hint])
        }
        builder = relax.ExecBuilder()
        relax.vm_build._vmcodegen(builder, tvm.IRModule({TIMED: _by_symbol(timed, symbols)}))
        executable: Any = builder.get()
        executable.mod.import_module(tvm.tirx.build(tvm.IRModule({**code, _STAMP: _stamp()}), target=target))
    return Compiled(executable, kernels, base.known, base)


def _primitive(module: Any) -> list[tuple[Any, Any]]:
    """The kernels of a module."""
    from tvm.tirx import PrimFunc

    return [(var, function) for var, function in module.functions.items() if isinstance(function, PrimFunc)]


def _number(function: Any) -> int:
    import tvm_ffi

    return tvm_ffi.structural_hash(function)


def _with_origin(kernels: Sequence[dict[str, Any]], scheduled: Any) -> list[dict[str, Any]]:
    """Kernels and whose choice each is, which the schedules note."""
    origins = {v.name_hint: f.attrs.get(schedules.ORIGIN) for v, f in _primitive(scheduled) if f.attrs}
    return [{**k, "origin": int(origin)} if (origin := origins.get(k["symbol"])) else k for k in kernels]


def _timed(main: Any, kernels: Sequence[Mapping[str, Any]]) -> tuple[Any, list[Mapping[str, Any]]]:
    """:data:`TIMED` of a model, and the kernels that it calls in order; those that became views are none any more.

    Args:
        main: the model as :func:`_finish` leaves it.
        kernels: those of equal symbols in the order in which they are called.
    """
    from tvm import relax

    of: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        of.setdefault(kernel["symbol"], []).append(kernel)
    calls = [b for b in _bindings(main) if isinstance(b.value, relax.Call) and isinstance(b.value.op, _global())]
    timed = [b for b in calls if _symbol(b.value.op) in of]
    nothing = relax.TupleType([])
    times = relax.Var("times", relax.TensorType((2 * len(timed), 2), "int64"))

    def stamp(index: int) -> Any:
        call = relax.Call(relax.ExternFunc(_STAMP), [times, relax.prim_value(index)], None, [nothing])
        return relax.VarBinding(relax.Var("_", nothing), call)

    number = {binding.var: 2 * i for i, binding in enumerate(timed)}
    blocks = [
        relax.BindingBlock(
            [
                part
                for b in block.bindings
                for part in ([b] if b.var not in number else [stamp(number[b.var]), b, stamp(number[b.var] + 1)])
            ]
        )
        for block in main.body.blocks
    ]
    body = relax.SeqExpr(blocks, relax.Tuple([times, main.body.body]))
    made = relax.Function([*main.params, times], body, relax.TupleType([times.ty, main.ret_ty]), False, main.attrs)
    called = [_symbol(binding.value.op) for binding in timed]
    in_order = [of[symbol].pop(0) if of[symbol] else {"symbol": symbol, "nodes": []} for symbol in called]
    return made.with_attr("global_symbol", TIMED), in_order


def _stamp() -> Any:
    """The kernel that writes the time into a row."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def stamp(given: T.handle, row: T.int64) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = T.int64()
        times = T.match_buffer(given, (rows, 2), "int64")  # as C's timespec is on machines of 64 bits
        T.evaluate(T.call_extern("int32", "clock_gettime", T.int32(_CLOCK_MONOTONIC), T.address_of(times[row, 0])))

    return stamp.with_attr("global_symbol", _STAMP)


def _by_symbol(function: Any, symbols: Mapping[str, str]) -> Any:
    """A function of the virtual machine that calls kernels by their symbols, wherever they are."""
    from tvm import relax

    @relax.expr_functor.mutator
    class ByName(relax.PyExprMutator):
        def visit_global_var_(self, op: Any) -> Any:
            return relax.ExternFunc(symbols[op.name_hint])

    return ByName().visit_expr(function)


def folded(graph: Graph, chosen: Options, say: Callable[[str], None] | None = None) -> Any:
    """The Relax module of a graph in the layout of the schedules: what does not depend on the choice of kernels.

    Args, Raises: as of :func:`build`.
    """
    check(graph)
    module = _imported(graph, chosen, say)
    with _compiling(chosen):
        return _folded(module, chosen)


@contextlib.contextmanager
def _compiling(chosen: Options) -> Iterator[Any]:
    """TVM's target, and its errors as ours."""
    import tvm

    target = tvm.target.Target(dict(chosen.target))
    try:
        with target, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield target
    except EdgecompileError:
        raise
    except Exception as error:  # TVM raises types of many kinds
        fix = "try the option schedules=no, which is slow, or --target ort" if chosen.schedules else "use --target ort"
        raise InputError("TVM cannot compile the graph", _last_line(error), fix) from error


def _imported(graph: Graph, chosen: Options, say: Callable[[str], None] | None):
    """The Relax module; the variable that holds the result of node i is called ``node_i``."""
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    nodes = {node.name: (index, node) for index, node in enumerate(graph.walk())}

    class Importer(onnx_frontend.ONNXGraphImporter):
        def _check_for_unsupported_ops(self, graph):
            """Done before, by :func:`check`, which knows our own operators."""

        def _convert_operator(self, op_name, inputs, attrs, opset):
            index, node = nodes[attrs["tvm_custom"]["name"]]
            try:
                if op_name == "Clip" and (clip := _clip(inputs)) is not None:
                    return self.bb.emit(clip, f"node_{index}")
                if node.domain == DOMAIN:
                    result, how = shift_add.convert(self.bb, op_name, list(inputs), attrs, chosen)
                    if say is not None:
                        say(f"{where(node)}: {how}")
                    return self.bb.emit(result, f"node_{index}")
                result = super()._convert_operator(op_name, inputs, attrs, opset)
            except Exception as error:  # the importer raises whatever it meets
                raise InputError(f"TVM cannot take {where(node)}", _last_line(error)) from error
            tensor = isinstance(result, relax.Call) and isinstance(result.ty, relax.TensorType | relax.TupleType)
            return self.bb.emit(result, f"node_{index}") if tensor else result

    model = graph.to_proto()
    importer: Any = Importer({}, "float32")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importer.from_onnx(model.graph, graph.opsets[""])
        except EdgecompileError:
            raise
        except Exception as error:  # as above
            raise InputError("TVM cannot take the graph", _last_line(error)) from error


def _clip(inputs: Sequence[Any]) -> Any:
    """Clip to constant bounds that have as many axes as what is clipped, which a change of layout can pass."""
    from tvm import relax

    bounds: list[Any] = [b.value.numpy() if isinstance(b, _constant()) else None for b in inputs[1:3]]
    if len(bounds) < 2 or any(b is None or b.size != 1 for b in bounds):
        return None
    low, high = (relax.const(b.reshape((1,) * inputs[0].ty.ndim)) for b in bounds)
    return relax.op.minimum(relax.op.maximum(inputs[0], low), high)


def _folded(module, chosen: Options):
    """Operators in the layout of the schedules, constants folded."""
    import tvm
    from tvm import relax

    own = chosen.schedules and not chosen.cuda
    module = int8.integers(module) if own else module
    steps = [
        relax.transform.DecomposeOpsForInference(),
        *(schedules.layout() if own else ()),
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        *((tvm.transform.module_pass(lambda m, _: int8.lowered(m, chosen), opt_level=0),) if own else ()),
    ]
    return tvm.transform.Sequential(steps)(module)


def _loops(module, chosen: Options, pick: schedules.Pick | None = None, forms: schedules.Forms | None = None):
    """Operators as loops."""
    import tvm
    from tvm import relax

    own = chosen.schedules and not chosen.cuda
    steps = [
        *(
            (relax.transform.LegalizeOps(schedules.legalizations(chosen, pick, forms), list(schedules.LATER)),)
            if own
            else ()
        ),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(steps)(module)


def _scheduled(module, chosen: Options):
    if chosen.cuda:
        from tvm.s_tir import dlight

        gpu = dlight.gpu
        rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
        schedule: Any = dlight.ApplyDefaultSchedule(*rules)
        return schedule(module)
    return schedules.apply(module, chosen) if chosen.schedules else module


def _finish() -> list:
    """From kernels and their calls to the instructions of the virtual machine."""
    from tvm.relax import transform

    return [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


def _link(chosen: Options) -> dict[str, Any]:
    """How ``export_library`` links."""
    how: dict[str, Any] = {"fpack_imports": cuda.packer(chosen.cuda)} if chosen.cuda else {}
    if not chosen.linker:
        return how
    from tvm.support import cc

    return {**how, "fcompile": cc.cross_compiler(chosen.linker)}


# -- which nodes a kernel stands for -----------------------------------------------------------------------------------


class _Values:
    """Numbers for values: equal computations on equal values have equal numbers, whatever variables hold them."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, expr: Any, env: Mapping[Any, int]) -> int:
        """The number of an expression, given those of variables."""
        from tvm import relax

        if isinstance(expr, relax.Var):
            return env[expr]
        if isinstance(expr, relax.Call):
            key: Hashable = (str(expr.op), *(self.of(a, env) for a in expr.args), str(expr.attrs))
        elif isinstance(expr, relax.Tuple):
            key = tuple(self.of(field, env) for field in expr.fields)
        elif isinstance(expr, relax.TupleGetItem):
            key = (self.of(expr.tuple_value, env), "item", expr.index)
        else:  # constants are the same objects before and after fusion; shapes and functions print as what they are
            key = expr if isinstance(expr, _constant()) else str(expr)
        return self._numbers.setdefault(key, len(self._numbers))


def _kernels(loops, grouped, graph: Graph) -> list[dict[str, Any]]:
    """The calls of kernels of ``grouped`` in order, with the nodes whose operators in ``loops`` they compute."""
    from tvm import relax

    values, names = _Values(), [node.name for node in graph.walk()]
    env = {p: -1 - i for i, p in enumerate(loops["main"].params)}
    owner: dict[int, str] = {}
    waiting: list[int] = []
    last: dict[int, str] = {}
    for binding in _bindings(loops["main"]):
        number = env[binding.var] = values.of(binding.value, env)
        waiting.append(number)
        if match := _NUMBER.fullmatch(binding.var.name):  # what was emitted since the last node is part of this one
            owner |= dict.fromkeys((w for w in waiting if w not in owner), str(names[int(match[1])]))
            waiting = []
        elif _calls_tir(binding.value):
            taken = [owner[env[a]] for a in binding.value.args[1].fields if env.get(a) in owner]
            last |= dict.fromkeys([number], taken[0]) if taken else {}
    owner = last | owner  # the layout of an output is part of the node that computes it
    env = {p: -1 - i for i, p in enumerate(grouped["main"].params)}
    kernels = []
    for binding in _bindings(grouped["main"]):
        call: Any = binding.value
        function = grouped[call.op] if isinstance(call, relax.Call) and isinstance(call.op, _global()) else None
        if function is None:
            numbers = [values.of(call, env)]
            symbol = _symbol(call.args[0]) if _calls_tir(call) else ""
        else:
            inner = dict(zip(function.params, (values.of(a, env) for a in call.args), strict=True))
            for step in _bindings(function):
                inner[step.var] = values.of(step.value, inner)
            numbers = [inner[step.var] for step in _bindings(function)]
            numbers.append(values.of(function.body.body, inner))
            symbol = _symbol(call.op)
        env[binding.var] = numbers[-1]
        if symbol:
            nodes = dict.fromkeys(owner[n] for n in numbers if n in owner)
            kernels.append({"symbol": symbol, "nodes": list(nodes)})
    return kernels


def _bindings(function) -> Iterator[Any]:
    for block in function.body.blocks:
        yield from block.bindings


def _symbol(function: Any) -> str:
    return function.name_hint


def _calls_tir(call: Any) -> bool:
    from tvm import relax

    return isinstance(call, relax.Call) and "call_tir" in str(call.op) and isinstance(call.args[0], _global())


def _global() -> type:
    from tvm.ir import GlobalVar

    return GlobalVar


def _constant() -> type:
    from tvm.ir import GenericConst

    return GenericConst


def modules(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """Torch module paths by name of node."""
    return {node.name: provenance(node).modules for node in graph.walk()}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
