"""What a worker waits for when it likes: a push, or a pull, that is under way."""

from __future__ import annotations

from collections.abc import Callable

from psframe.exchange import Exchange
from psframe.params import Params, Receipt, receipt_of
from psframe.worker import Request

__all__ = ["Pending", "PendingPull"]


class Pending:
    """A push under way."""

    def __init__(self, exchange: Exchange, request: Request) -> None:
        self._exchange = exchange
        self._request = request

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        self._exchange.poll()
        return self._request.done

    def wait(self, timeout_s: float | None = None) -> Receipt:
        """Wait for the servers' answers.

        Args:
            timeout_s: seconds; None waits as long as the servers live.

        Returns:
            The receipt; after the end of the run one with applied=False, reason="stopped".

        Raises:
            WaitTimeout: the bound has passed; the push stays under way.
        """
        self._exchange.wait(self._request, timeout_s)
        return receipt_of(self._request.receipt)


class PendingPull:
    """A pull under way; the parameters that the worker has stay valid until `wait`."""

    def __init__(
        self, exchange: Exchange, request: Request, take: Callable[[Request], Params]
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._take = take  # makes what the answered request brought the present parameters
        self._params: Params | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        self._exchange.poll()
        return self._request.done

    def wait(self, timeout_s: float | None = None) -> Params:
        """Wait for the parameters; they replace the worker's present ones.

        Raises:
            Stopped: the run is over.
            WaitTimeout: the bound has passed; the pull stays under way.
        """
        if self._params is None:
            self._exchange.wait(self._request, timeout_s)
            self._params = self._take(self._request)
        return self._params
