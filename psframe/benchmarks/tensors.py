"""Parameters cut into tensors whose every element is known, and the look at what a pull brings.

Gradients and parameters are those of `checks`. Every shard has equally many elements and tensors,
and no tensor lies in two, so that each has the version of one server.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psframe.benchmarks.checks import (
    PAIRS_A_PAGE,
    PAIRS_ALL,
    codes_sum,
    compile_check,
    payload,
)
from psframe.benchmarks.job import WrongAnswer
from psframe.benchmarks.report import parse_count
from psframe.errors import ArgumentError
from psframe.layout import Array

__all__ = ["Tensors", "parse_size", "parse_sizes"]

_ALIGN = 16  # elements: a server's shard begins at a multiple of this
# Tensors looked at in one answer, in turn: a look at each costs as much as its push and pull.
_LOOKS = 2


def parse_sizes(texts: Sequence[str], servers: int, tensors: int = 1) -> list[int]:
    """Read sizes that can be cut into equal shards, each of whole pairs.

    Raises:
        ArgumentError: one is none.
    """
    try:
        sizes = [parse_count(text, "B") for text in texts]
    except ValueError as error:
        raise ArgumentError(f"--bytes: {error}") from error
    if tensors % servers and tensors > 1:
        raise ArgumentError(f"--tensors {tensors}: expected a multiple of {servers} servers")
    unit = 4 * _ALIGN * servers
    for n_bytes in sizes:
        if n_bytes % unit:
            raise ArgumentError(
                f"--bytes {n_bytes}: expected a multiple of {unit}"
                f" ({_ALIGN} float32 for each of {servers} servers)"
            )
        if not 0 < tensors <= n_bytes // 8:
            raise ArgumentError(f"--tensors {tensors}: expected 1 to {n_bytes // 8} in {n_bytes} B")
    return sizes


def parse_size(text: str, servers: int) -> int:
    """Read one size; see `parse_sizes`."""
    return parse_sizes((text,), servers)[0]


class Tensors:
    """Names and sizes.

    Args:
        size: elements in all, a multiple of 16 S.
        servers: S.
        tensors: in all, a multiple of S; or 1, which is one a server.
        apart: elements between two pairs that are looked at in an answer; PAIRS_ALL to read it.

    Attributes:
        size: elements in all.
        sizes: of the tensors, by name.
    """

    def __init__(
        self, size: int, servers: int, tensors: int = 1, *, apart: int = PAIRS_A_PAGE
    ) -> None:
        self.size = size
        each = max(1, tensors // servers)
        pairs = size // servers // 2
        bounds = [pairs * i // each for i in range(each + 1)]
        self.sizes: dict[str, int] = {}
        self._servers: list[int] = []
        for server in range(servers):
            for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
                name = f"shard {server}" if each == 1 else f"shard {server}, tensor {i}"
                self.sizes[name] = 2 * (end - begin)
                self._servers.append(server)
        self._names = list(self.sizes)
        self._stride = apart
        # Looked at in answer k are those of _turns[k % len(_turns)].
        every = list(zip(self._names, self._servers, strict=True))
        few = len(every) <= max(_LOOKS, servers) or apart == PAIRS_ALL
        self._turns = (
            [every] if few else [every[i : i + _LOOKS] for i in range(0, len(every), _LOOKS)]
        )
        self._every = every
        self._check = compile_check()

    def zeros(self) -> dict[str, Array]:
        """Make the first parameters."""
        return {name: np.zeros(size, np.float32) for name, size in self.sizes.items()}

    def gradients(self, worker: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """Make a worker's gradients of even and of odd steps."""
        return self.cut(payload(self.size, worker, 0)), self.cut(payload(self.size, worker, 1))

    def look(self, params: Mapping[str, Any], versions: Sequence[int], number: int) -> None:
        """Look at answer `number`.

        Raises:
            WrongAnswer: a tensor that is looked at is not of its server's version, or not whole.
        """
        check, stride, turns = self._check, self._stride, self._turns
        for name, server in turns[number % len(turns)] if len(turns) > 1 else turns[0]:
            second = check(params[name], -versions[server], stride)
            if second != second:
                raise _wrong(name, versions[server])

    def read(self, params: Mapping[str, Any], versions: Sequence[int]) -> None:
        """Read every element of an answer.

        Raises:
            WrongAnswer: as `look`.
        """
        for name, server in self._every:
            second = self._check(params[name], -versions[server], PAIRS_ALL)
            if second != second:
                raise _wrong(name, versions[server])

    def check_end(self, params: Mapping[str, Any], version: int, workers: int, steps: int) -> None:
        """Compare the parameters after `steps` steps of every worker with what they must be.

        Raises:
            WrongAnswer: they are not.
        """
        self.check_sum(params, version, steps * workers, codes_sum(workers, steps))

    def check_sum(self, params: Mapping[str, Any], version: int, updates: int, codes: int) -> None:
        """Compare the parameters after some updates with what they must be, every element.

        Args:
            params, version: as a run's result has them.
            updates: how many there were.
            codes: the sum of their codes.

        Raises:
            WrongAnswer: they are not.
        """
        if version != updates:
            raise WrongAnswer(f"{version} updates, expected {updates}")
        for name in self._names:
            got = self._check(params[name], -version, PAIRS_ALL)
            if got != -codes:
                raise WrongAnswer(f"{name}: the gradients' codes sum to {got}, expected {-codes}")

    def cut(self, flat: Array) -> dict[str, Array]:
        """Name the tensors inside a flat array."""
        cut, end = {}, 0
        for name, size in self.sizes.items():
            cut[name] = flat[end : end + size]
            end += size
        return cut


def _wrong(name: str, version: int) -> WrongAnswer:
    return WrongAnswer(f"{name} is not of version {version}, or not whole")
