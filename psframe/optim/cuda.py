"""Writes a formula as CUDA C and compiles it with CuPy: update and finite test in one kernel.

The Python of the formula is read as a syntax tree and written again as C, operation by operation,
so the GPU computes what the CPU does. Three things would make it differ in bits: contraction to
FMA, which `--fmad=false` forbids; division and square root that are not correctly rounded, which
is not NVRTC's default; and float32 subnormals, which CuPy always flushes to zero (it appends
`-ftz=true` after the caller's options). Only the last remains.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KernelText", "compile_kernel", "translate"]

OPTIONS = ("--fmad=false",)
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
# CuPy keeps `i`, `n` and names with a leading underscore for itself; `T` is the type.
_RESERVED = {"i", "n", "T", "z", "bad"}


@dataclass(frozen=True)
class KernelText:
    """The three texts of a `cupy.ElementwiseKernel`.

    Attributes:
        in_params: the arrays in_<name>, then the scalars by their names.
        out_params: the arrays out_<name>, and the flag `bad`, set when a result is not finite.
        operation: what is done for one element.
    """

    in_params: str
    out_params: str
    operation: str


def _refuse(node: ast.AST, rule: str) -> ValueError:
    return ValueError(
        f"formula {rule}: {ast.unparse(node)!r} cannot be written in C; "
        "use + - * /, sqrt, names and one comparison in a conditional expression"
    )


def _expression(node: ast.expr, names: set[str], rule: str) -> str:
    """Write an expression in C, with a pair of parentheses for each operation."""

    def write(child: ast.expr) -> str:
        return _expression(child, names, rule)

    match node:
        case ast.Name(id=name) if name in names:
            return name
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return f"({write(left)} {_OPERATORS[type(op)]} {write(right)})"
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument], keywords=[]):
            return f"sqrt({write(argument)})"
        case ast.IfExp(
            test=ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=int(value))]),
            body=body,
            orelse=orelse,
        ) if type(op) in _OPERATORS:
            test = f"{write(left)} {_OPERATORS[type(op)]} (T){value}"
            return f"({test} ? {write(body)} : {write(orelse)})"
    raise _refuse(node, rule)


def _statements(
    body: list[ast.stmt], arrays: list[str], scalars: list[str], rule: str
) -> list[str]:
    """Write the statements of a formula in C; the results go to new_<array>."""
    names = {*arrays, *scalars}
    lines = [f"T {name} = in_{name};" for name in arrays]
    for node in body:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # the docstring
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if (
                name not in scalars and name not in _RESERVED and not name.startswith("_")
            ):
                declare = "" if name in names else "T "
                lines.append(f"{declare}{name} = {_expression(value, names, rule)};")
                names.add(name)
            case ast.Return(value=value) if value is not None and node is body[-1]:
                results = value.elts if isinstance(value, ast.Tuple) else [value]
                if len(results) != len(arrays) - 1:
                    raise _refuse(node, rule)
                for name, result in zip(_results(arrays), results, strict=True):
                    lines.append(f"T new_{name} = {_expression(result, names, rule)};")
            case _:
                raise _refuse(node, rule)
    return lines


def _results(arrays: list[str]) -> list[str]:
    """Name what a formula returns: the parameter and the slots, that is all but the gradient."""
    return [arrays[0], *arrays[2:]]


@functools.cache
def translate(rule: Callable[..., Any], slots: int) -> KernelText:
    """Write a formula as the texts of an elementwise kernel.

    Args:
        rule: a function of `formulas`: parameter, gradient, slots, scalars.
        slots: how many slots it has.

    Raises:
        ValueError: the formula holds something else than arithmetic and sqrt.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    names = [argument.arg for argument in tree.args.args]
    for name in names:
        if name in _RESERVED or name.startswith("_"):
            raise ValueError(f"formula {rule.__name__}: {name!r} is a reserved name; rename it")
    arrays, scalars = names[: 2 + slots], names[2 + slots :]
    lines = _statements(tree.body, arrays, scalars, rule.__name__)
    results = _results(arrays)
    lines += [f"out_{name} = new_{name};" for name in results]
    # As on the CPU: x - x is 0 for a finite x and NaN otherwise.
    lines.append(f"T z = {' + '.join(f'(new_{name} - new_{name})' for name in results)};")
    lines.append("if (z != z) bad[0] = 1;")
    return KernelText(
        in_params=", ".join(
            [f"T in_{name}" for name in arrays] + [f"T {name}" for name in scalars]
        ),
        out_params=", ".join([f"T out_{name}" for name in results] + ["raw int32 bad"]),
        operation="\n".join(lines),
    )


@functools.cache
def compile_kernel(
    rule: Callable[..., Any], slots: int, scalars: int, dtype: np.dtype[Any]
) -> Callable[..., bool]:
    """Make the kernel of one rule; NVRTC compiles it at its first call on each device.

    Returns:
        kernel(begin, end, params, grad, out, scalars, old, new, ...) as `cpu.compile_loop` gives.
        It runs on the current stream, and waits for it to read the verdict.
    """
    import cupy

    text = translate(rule, slots)
    kernel = cupy.ElementwiseKernel(
        text.in_params,
        text.out_params,
        text.operation,
        f"psframe_{rule.__name__}",
        no_return=True,
        options=OPTIONS,
    )

    def apply(
        begin: int, end: int, params: Any, grad: Any, out: Any, values: Any, *pairs: Any
    ) -> bool:
        part = slice(begin, end)
        old, new = [a[part] for a in pairs[::2]], [a[part] for a in pairs[1::2]]
        bad = cupy.zeros(1, cupy.int32)
        # Scalars are passed by value; CuPy gives them the type T of the arrays.
        numbers = [dtype.type(value) for value in values[:scalars]]
        kernel(params[part], grad[part], *old, *numbers, out[part], *new, bad)
        return bool(bad.item())

    return apply
