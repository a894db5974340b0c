"""Permutations of constants, done by numpy: Relax's FoldConstant compiles a kernel for each, which takes seconds."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def permuted(module: Any) -> Any:
    """A module in which no ``permute_dims`` of a constant is left; run it on normal form."""
    mutator = _mutator()(module)
    mutator.builder_.update_func(module.get_global_var("main"), mutator.visit_expr(module["main"]))
    return mutator.builder_.get()


@functools.cache
def _mutator() -> Any:
    from tvm import relax
    from tvm.ir import GenericConst, Op
    from tvm.relax.expr_functor import PyExprMutator, mutator

    permute = Op.get("relax.permute_dims")

    @mutator
    class Permuted(PyExprMutator):
        def __init__(self, module: Any):
            super().__init__(module)
            self.known: dict[Any, Any] = {}

        def visit_var_binding_(self, binding: Any) -> None:
            call, value = binding.value, None
            if isinstance(binding.var, relax.DataflowVar) and isinstance(call, relax.Call) and call.op == permute:
                value = self.known.get(call.args[0], call.args[0])
            if isinstance(value, GenericConst):
                axes = None if call.attrs.axes is None else [int(a) for a in call.attrs.axes]
                array: Any = value.value  # type: ignore[attr-defined]
                self.known[binding.var] = relax.const(np.ascontiguousarray(array.numpy().transpose(axes)))
            else:
                super().visit_var_binding_(binding)

        def visit_dataflow_var_(self, var: Any) -> Any:
            return self.known[var] if var in self.known else super().visit_dataflow_var_(var)

    return Permuted
