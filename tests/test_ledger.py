"""The account of pushes adds up."""

from __future__ import annotations

import pytest

from psframe import Ledger
from psframe.events import Reason
from psframe.ledger import LedgerBook
from psframe.state import Fields


def test_every_reason_has_its_column() -> None:
    book = LedgerBook()
    for reason in Reason:
        book.received += 1
        book.count(reason)
    book.count_fenced()
    ledger = book.ledger()
    assert ledger.received == len(Reason) + 1
    assert ledger.applied == 1
    assert ledger.refused == 4  # three reasons, and one from a worker that counts as lost
    assert ledger.dropped == 2  # late, or too stale
    assert ledger.lost == ledger.stopped == 1
    assert ledger.reasons == {
        "non-finite gradient": 1,
        "non-finite update": 1,
        "unknown version": 1,
        "late": 1,
        "stopped": 1,
        "lost": 1,
        "stale": 1,
        "fenced": 1,
    }
    settled = ledger.applied + ledger.refused + ledger.dropped + ledger.lost + ledger.stopped
    assert settled == ledger.received


def test_a_push_is_partial_once() -> None:
    book = LedgerBook()
    for push in ((0, 3), (1, 3), (0, 3)):
        book.count_partial(*push)
    assert book.ledger().partial == 2


def test_empty_and_as_dict() -> None:
    assert LedgerBook().ledger() == Ledger()
    book = LedgerBook()
    book.received = 1
    book.count(Reason.LATE)
    plain = book.ledger().as_dict()
    assert plain["reasons"] == {"late": 1}
    assert Ledger(**plain) == book.ledger()


def test_reasons_have_words() -> None:
    assert Reason.NONE.text == ""
    assert len({reason.text for reason in Reason}) == len(Reason)


def test_a_state_of_before_a_reason_was_known_counts_none_of_it() -> None:
    book = LedgerBook()
    for reason in (Reason.NONE, Reason.LATE):
        book.received += 1
        book.count(reason)
    state = book.state()
    del state["by_reason"]["stale"]
    later = LedgerBook()
    later.restore(Fields(state))
    assert later.ledger() == book.ledger()


def test_a_reason_that_nobody_knows_is_told() -> None:
    """Or the account would not add up."""
    state = LedgerBook().state()
    state["by_reason"]["tired"] = 1
    with pytest.raises(ValueError, match="tired is 1, expected no such reason; a later psframe"):
        LedgerBook().restore(Fields(state))
