"""Writes formulas as CUDA C and compiles them with CuPy: all that becomes of a gradient, at once.

The Python of a formula is read as a syntax tree and written again as C, operation by operation,
so the GPU computes what the CPU does. Three things would make it differ in bits: contraction to
FMA, which `--fmad=false` forbids; division and square root that are not correctly rounded, which
is not NVRTC's default; and float32 subnormals, which CuPy always flushes to zero (it appends
`-ftz=true` after the caller's options). Only the last remains.

One kernel widens the payload of a gradient, applies the stages that come before the rule (such as
the correction of a stale gradient), then the rule, and tests whether the results are finite.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Incoming",
    "KernelText",
    "Stage",
    "Staged",
    "check_formula",
    "compile_distance",
    "compile_kernel",
    "translate",
]

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
# What a gradient's elements may be, by NumPy's name of their dtype: CuPy's name, and how one is
# widened to T. NumPy has no bfloat16; it is the upper half of a float32.
_PAYLOADS = {
    "float32": ("T", "in_{g}"),
    "float64": ("T", "in_{g}"),
    "float16": ("float16", "(T)(float)in_{g}"),
    "uint16": ("uint16", "(T)__uint_as_float((unsigned int)in_{g} << 16)"),
}


@dataclass(frozen=True)
class Stage:
    """A formula on a gradient before the rule.

    Attributes:
        formula: takes g, then w, the present parameter, if one is named so; then an element of
            each array that it reads and of each state that it keeps; then scalars. It returns the
            gradient and the new states. It may hold what those of `formulas` may.
        reads: arrays that it only reads.
        states: arrays of which it reads the old one and writes the new one.
    """

    formula: Callable[..., Any]
    reads: int = 0
    states: int = 0


@dataclass(frozen=True)
class Staged:
    """A stage with its arrays and scalars, for one gradient."""

    stage: Stage
    scalars: tuple[float, ...] = ()
    reads: tuple[Any, ...] = ()
    old: tuple[Any, ...] = ()
    new: tuple[Any, ...] = ()


class Incoming:
    """A gradient on the device, what becomes of it before the rule, and where its verdict is.

    It takes the place of a gradient in an updater's `extend`, which then cannot say whether the
    results are finite: kernels set `bad` where one is not, and nobody waits for them.

    Args:
        array: its elements as they are: of the parameters' dtype, float16, or the bits of bfloat16.
        bad: one int32.
        stages: in their order.
    """

    __slots__ = ("array", "bad", "stages", "_first")

    def __init__(
        self, array: Any, bad: Any, stages: tuple[Staged, ...] = (), first: int = 0
    ) -> None:
        self.array, self.bad, self.stages = array, bad, stages
        self._first = first  # where it begins in the arrays of the stages

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: slice) -> Incoming:
        return Incoming(self.array[part], self.bad, self.stages, self._first + part.start)

    def part_of(self, array: Any, begin: int, end: int) -> Any:
        """Give [begin, end) of an array of a stage, counted as in this gradient."""
        return array[self._first + begin : self._first + end]


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


def _expression(node: ast.expr, names: Mapping[str, str], rule: str) -> str:
    """Write an expression in C, with a pair of parentheses for each operation."""

    def write(child: ast.expr) -> str:
        return _expression(child, names, rule)

    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
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
    body: list[ast.stmt], given: list[str], scalars: list[str], results: list[str], names: _Names
) -> list[str]:
    """Write the statements of a formula in C.

    Args:
        body: of its function.
        given: the arguments that are variables of the kernel already, and may be changed.
        scalars: the other arguments.
        results: where what it returns goes: a declaration and a name each.
        names: of its variables.
    """
    known = {name: names.prefix + name for name in (*given, *scalars)}
    lines: list[str] = []
    for node in body:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # the docstring
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if (
                name not in scalars and name not in _RESERVED and not name.startswith("_")
            ):
                declare = "" if name in known else "T "
                text = _expression(value, known, names.formula)
                known[name] = names.prefix + name
                lines.append(f"{declare}{known[name]} = {text};")
            case ast.Return(value=value) if value is not None and node is body[-1]:
                returned = value.elts if isinstance(value, ast.Tuple) else [value]
                if len(returned) != len(results):
                    raise _refuse(node, names.formula)
                for target, result in zip(results, returned, strict=True):
                    lines.append(f"{target} = {_expression(result, known, names.formula)};")
            case _:
                raise _refuse(node, names.formula)
    return lines


class _Names(NamedTuple):
    """How the variables of a formula are called in the kernel."""

    formula: str
    prefix: str = ""


def _parse(formula: Callable[..., Any]) -> tuple[list[ast.stmt], list[str]]:
    """Read the statements of a formula, and the names of its arguments."""
    try:
        source = inspect.getsource(formula)
    except OSError:
        raise ValueError(
            f"formula {formula.__name__}: its source is not to be had; define it in a file"
        ) from None
    tree = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    arguments = [argument.arg for argument in tree.args.args]
    for name in arguments:
        if name in _RESERVED or name.startswith("_"):
            raise ValueError(f"formula {formula.__name__}: {name!r} is a reserved name; rename it")
    return tree.body, arguments


def _stage(number: int, stage: Stage, w: str, g: str) -> tuple[list[str], list[str], list[str]]:
    """Write a stage: its lines, the names of its inputs, and those of the states it writes."""
    body, arguments = _parse(stage.formula)
    names = _Names(stage.formula.__name__, f"s{number}_")
    variables = arguments[: 2 if arguments[1:2] == ["w"] else 1]
    first = len(variables)
    arrays = arguments[first : first + stage.reads + stage.states]
    states, scalars = arrays[stage.reads :], arguments[first + len(arrays) :]
    lines = [
        f"T {names.prefix}{name} = {source};"
        for name, source in zip(variables, (g, w), strict=False)
    ]
    lines += [f"T {names.prefix}{name} = in_{names.prefix}{name};" for name in arrays]
    results = [g, *(f"T new_{names.prefix}{name}" for name in states)]
    lines += _statements(body, [*variables, *arrays], scalars, results, names)
    inputs = [f"T in_{names.prefix}{name}" for name in arrays]
    inputs += [f"T {names.prefix}{name}" for name in scalars]
    return lines, inputs, [names.prefix + name for name in states]


def _results(arrays: list[str]) -> list[str]:
    """Name what a formula returns: the parameter and the slots, that is all but the gradient."""
    return [arrays[0], *arrays[2:]]


@functools.cache
def translate(
    rule: Callable[..., Any], slots: int, stages: tuple[Stage, ...] = (), payload: str = "float32"
) -> KernelText:
    """Write a formula, and what comes before it, as the texts of an elementwise kernel.

    Args:
        rule: a function of `formulas`: parameter, gradient, slots, scalars.
        slots: how many slots it has.
        stages: what is done with the gradient first.
        payload: the dtype of the gradient's elements; float32 and float64 mean the parameters'.

    Raises:
        ValueError: a formula holds something else than arithmetic and sqrt.
    """
    body, arguments = _parse(rule)
    arrays, scalars = arguments[: 2 + slots], arguments[2 + slots :]
    w, g = arrays[:2]
    kind, widened = _PAYLOADS[payload]
    sources = {g: widened.format(g=g)}
    lines = [f"T {name} = {sources.get(name, f'in_{name}')};" for name in arrays]
    inputs = [f"{kind if name == g else 'T'} in_{name}" for name in arrays]
    inputs += [f"T {name}" for name in scalars]
    kept: list[str] = []
    for number, stage in enumerate(stages):
        more, its_inputs, states = _stage(number, stage, w, g)
        lines += more
        inputs += its_inputs
        kept += states
    results = _results(arrays)
    targets = [f"T new_{name}" for name in results]
    lines += _statements(body, arrays, scalars, targets, _Names(rule.__name__))
    lines += [f"out_{name} = new_{name};" for name in (*results, *kept)]
    # As on the CPU: x - x is 0 for a finite x and NaN otherwise.
    lines.append(f"T z = {' + '.join(f'(new_{name} - new_{name})' for name in results)};")
    lines.append("if (z != z) bad[0] = 1;")
    return KernelText(
        in_params=", ".join(inputs),
        out_params=", ".join([f"T out_{name}" for name in (*results, *kept)] + ["raw int32 bad"]),
        operation="\n".join(lines),
    )


def check_formula(rule: Callable[..., Any], slots: int) -> None:
    """Raise ValueError if a formula, of a rule of a user's own perhaps, cannot be a kernel."""
    translate(rule, slots)


def _make_kernel(
    rule: Callable[..., Any], slots: int, stages: tuple[Stage, ...], payload: str
) -> Callable[..., None]:
    """Make a kernel; NVRTC compiles it at its first call on each device."""
    import cupy

    text = translate(rule, slots, stages, payload)
    kernel: Callable[..., None] = cupy.ElementwiseKernel(
        text.in_params,
        text.out_params,
        text.operation,
        "_".join(["psframe", *(stage.formula.__name__ for stage in stages), rule.__name__]),
        no_return=True,
        options=OPTIONS,
    )
    return kernel


@functools.cache
def compile_kernel(
    rule: Callable[..., Any], slots: int, scalars: int, dtype: np.dtype[Any]
) -> Callable[..., bool]:
    """Make the kernel of one rule.

    Returns:
        kernel(begin, end, params, grad, out, scalars, old, new, ...) as `cpu.compile_loop` gives.
        It runs on the current stream, and waits for it to read the verdict; but not of an
        `Incoming` gradient, which takes the verdict itself: then it is false.
    """
    import cupy

    kernels: dict[tuple[tuple[Stage, ...], str], Callable[..., None]] = {}

    def apply(
        begin: int, end: int, params: Any, grad: Any, out: Any, values: Any, *pairs: Any
    ) -> bool:
        incoming = grad if isinstance(grad, Incoming) else None
        if incoming is None:
            incoming = Incoming(grad, cupy.zeros(1, cupy.int32))
        part, payload = slice(begin, end), incoming.array
        # Scalars are passed by value; CuPy gives them the type T of the arrays.
        arguments = [params[part], payload[part], *(a[part] for a in pairs[::2])]
        arguments += [dtype.type(value) for value in values[:scalars]]
        written = [out[part], *(a[part] for a in pairs[1::2])]
        for staged in incoming.stages:
            for array in (*staged.reads, *staged.old):
                arguments.append(incoming.part_of(array, begin, end))
            arguments += [dtype.type(value) for value in staged.scalars]
            written += [incoming.part_of(array, begin, end) for array in staged.new]
        key = tuple(staged.stage for staged in incoming.stages), payload.dtype.name
        kernel = kernels.get(key)
        if kernel is None:
            kernel = kernels[key] = _make_kernel(rule, slots, *key)
        kernel(*arguments, *written, incoming.bad)
        return incoming is not grad and bool(incoming.bad.item())

    return apply


@functools.cache
def compile_distance() -> Callable[[Any, Any], Any]:
    """Make the sum of the squares of a - b, in float64, as an array of one element.

    Its order, and so its last bits, are CuPy's.
    """
    import cupy

    kernel: Callable[[Any, Any], Any] = cupy.ReductionKernel(
        "T x, T y",
        "float64 total",
        "((double)x - (double)y) * ((double)x - (double)y)",
        "a + b",
        "total = a",
        "0",
        "psframe_distance",
    )
    return kernel
