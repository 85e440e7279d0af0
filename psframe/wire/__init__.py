"""Turns events into messages and back; validates everything before allocating anything.

A message is a header of 72 bytes, little-endian, the same for all kinds, and a payload:

    magic "PSF1" 4s | kind u8 | flags u8 | reason u16 | worker i32 | slot i32 |
    seq i64 | version i64 | staleness i64 | norm f64 | payload_bytes i64 | aux i64 |
    log i64

    kind               flags              reason  slot    version  staleness  aux           payload
    1  Push            finite want_params         slot    version             release       array
    2  Pull            pinned                                                 release
    3  LeaseRequest    ahead                                                                task
    4  Report                                                                               sums
    5  Log                                                                                  sums
    6  Stop
    7  Leave           failure                                                              texts
    8  Answer          stopped applied    reason  buffer  version  staleness  push_version  array
    9  Lease                              kind            epoch    begin      end
    10 Decision        round held scaled  reason                                            members
    11 Gone
    12 Pin             on keep
    13 End             mark
    14 Withheld                                   server                      in_a_row
    15 Lost
    16 Finished                                   server
    17 GiveBack
    18 Spans                                      server                                    spans
    19 RandomState                                                                          numbers
    20 Mark
    21 ShardSaved                                 server                                    entry
    22 Forget

`worker` and `seq` are the event's, where it has them (a mark's number is its `seq`); `norm` is
Push's, and the clock of Spans; `log`, a position in the leader's log, is in Push, Pull, Answer and
Lease. A field that a kind does not use is zero. Bits 0 and 1 of flags are the `Delivery` of the
array, the kind's own begin at bit 2, in the order of the table. Only a Push, or an Answer with
parameters, speaks of an array.
The other payloads follow in the same message:

    task      7 i64: plan, n_samples, batch_size, epochs, shuffle, eval_samples, eval_batch_size
    sums      u32 count, then for each: text name, f64 sum, and in a Log i64 count
    texts     if `failure` is set: text type, text message, text traceback
    members   for each: i32 worker, i64 seq and, if `scaled`, f64 factor; in worker order
    numbers   u128 state, u128 increment, u8 has_uint32, u32 uinteger
    entry     UTF-8
    spans     for each: u8 kind, f64 begin, f64 end
    text      u16 length in bytes, UTF-8

Every event has one encoding: what `decode` accepts, `encode` gives back bit for bit.
"""

from psframe.wire.decoding import Message, decode
from psframe.wire.encoding import encode, encode_into
from psframe.wire.header import HEADER_BYTES, Delivery, Event, Kind, Limits, Link, payload_limit
from psframe.wire.payloads import NAME_BYTES_MAX, NAMES_MAX
from psframe.wire.plain import (
    read_plain_answer,
    read_plain_push,
    write_plain_answer,
    write_plain_push,
)

__all__ = [
    "HEADER_BYTES",
    "NAMES_MAX",
    "NAME_BYTES_MAX",
    "Delivery",
    "Event",
    "Kind",
    "Limits",
    "Link",
    "Message",
    "decode",
    "encode",
    "encode_into",
    "payload_limit",
    "read_plain_answer",
    "read_plain_push",
    "write_plain_answer",
    "write_plain_push",
]
