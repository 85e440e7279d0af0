"""What one rank of a run under MPI has to do with GPUs.

Which one it is on and who else is, whether MPI is given its memory as it is, and whose memory on
this node it opens. Every rank of the run makes these steps together, and alike.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable

from psframe.agreement import local_server
from psframe.device_store import DeviceStore
from psframe.devices import (
    NO_GPU,
    Device,
    Sharing,
    announce,
    choose_device,
    fit_memory,
    identify,
    make_device,
    memory_of,
    too_much_to_lend,
    use_gpu,
)
from psframe.devices.opening import lent_bytes
from psframe.gpu_direct import decide, explain
from psframe.plan import Plan
from psframe.server import Server
from psframe.server_device import Card, choose_server_device
from psframe.store import buffer_count
from psframe.transports.borrowing import Borrowing, lend_and_open
from psframe.transports.meeting import SLOTS, Neighbours
from psframe.transports.mpi import Mesh
from psframe.transports.mpi_endpoint import MpiEndpoint
from psframe.transports.mpi_facts import cuda_support
from psframe.transports.mpi_port import MpiServerPort

__all__ = ["Cards"]

_MEMORY = struct.Struct("<qq")  # of a rank's GPU: all of it, and what the rank can have
# Of a rank, how many arrays it lends, and their length.
Shape = Callable[[int], tuple[int, int]]

_log = logging.getLogger("psframe")


class Cards:
    """The GPUs of a run, as one of its ranks sees them.

    Args:
        mesh: the ranks, in their places.
        plan: the run's.
        neighbours: who shares memory with this rank.
    """

    def __init__(self, mesh: Mesh, plan: Plan, neighbours: Neighbours) -> None:
        self._mesh = mesh
        self._plan = plan
        self._neighbours = neighbours
        self._own: Sharing | None = None  # this rank's, if it is not on the CPU
        self._ids: list[bytes] = []  # by rank, if somebody may be on one
        self._direct = False  # whether device pointers are given to MPI
        self._in_use = False  # whether this rank's GPU has been opened
        self._open = Borrowing()  # memory of this node's ranks that is open to others of them
        self._lent_bytes = 0  # of this rank's GPU, by all who are on it

    def share(self) -> Exception | None:
        """Choose this rank's, hear who else is on it, and open what others lend.

        Returns:
            The error, on all ranks, if device pointers are to be given to MPI and cannot be.

        Raises:
            ValueError: this rank cannot have what it is to be on.
            RankLost: some rank did not take part.
        """
        self._choose()
        error = self._decide()
        if error is None:
            self._lend()
        return error

    @property
    def of_workers(self) -> list[str]:
        """Of each worker, "cpu" or "cuda"."""
        if not self._ids:
            return ["cpu"] * self._neighbours.workers
        return ["cpu" if one == NO_GPU else "cuda" for one in self._ids[self._plan.servers :]]

    # ---- a server ------------------------------------------------------------------------

    def open_card(self, port: MpiServerPort) -> Card | None:
        """Open a server's GPU; None if it is on the CPU."""
        port.borrow(self._open.opened, self._open.drop)
        ordinal = self._server_gpu()
        if ordinal is None:
            return None
        card = Card(ordinal)
        self._in_use = True
        if self._own is not None:
            self._limit(self._own)
        if self._open.lent is not None:
            card.lend(self._open.lent.array)
        return card

    def serve_from(self, card: Card, port: MpiServerPort, machine: Server) -> None:
        """Have others read and write the memory of a server's card, as has been decided."""
        if self._direct and port.takes_devices:
            self._open_door(card, port, machine)
        if self._open.lent is not None:
            servers = self._plan.servers
            machine.lend_snapshots(rank - servers for rank in self._open.partners)

    def _open_door(self, card: Card, port: MpiServerPort, machine: Server) -> None:
        """Have MPI read and write it."""
        plan = self._plan
        assert isinstance(machine.store, DeviceStore), "it is on the card"
        card.open_to_others()
        if plan.codec is None and not machine.reads_gradients:
            port.land_in(lambda size: card.settled(size, plan.layout.dtype))
        elif self._mesh.rank == 0:
            _log.info("servers are given gradients through the host, where they are read")
        if plan.pull_codec is None:
            port.leave_from(machine.store.device_half)
            machine.send_from_device()

    # ---- a worker ------------------------------------------------------------------------

    def open_device(self, endpoint: MpiEndpoint) -> Device:
        """Open the device that a worker computes on."""
        plan, own, lent = self._plan, self._own, self._open.lent
        if own is None:
            if plan.device == "auto":
                _log.info("worker %d computes on the CPU: there is no GPU", endpoint.index)
            return make_device("cpu", plan.layout)
        partners, leaves = self._open.partners, plan.leaves_devices
        direct = self._direct and endpoint.takes_devices
        if partners:
            endpoint.borrow(self._open.opened, partners if lent else (), pointers=direct)
        device = make_device(
            own.gpu,
            plan.layout,
            endpoint if direct or partners else None,
            gradients=leaves["gradients"] and (direct or lent is not None),
            parameters=leaves["parameters"] and direct,
            slots=None if lent is None else lent.array,
            borrows=bool(self._open.opened),
        )
        self._limit(own)
        self._in_use = True
        return device

    def _limit(self, own: Sharing) -> None:
        """Have this rank take no more than its share of its GPU's memory."""
        announce(own, fit_memory(own.gpu, len(own.users), lent_bytes=self._lent_bytes))

    # ---- another thread ------------------------------------------------------------------

    def adopt_thread(self) -> bool:
        """Make this rank's GPU the calling thread's, if MPI is given its memory.

        A call of MPI may carry on any transfer that is under way, whichever thread began it, and an
        MPI that does so asks the calling thread for its device.

        Returns:
            Whether that is done. Before the GPU is open it is not: nothing is under way then, and
            to open it here might take longer than a rank may be silent.
        """
        if not self._direct or self._own is None:
            return True
        if self._in_use:
            try:
                use_gpu(self._own.gpu)
            except RuntimeError as error:  # CuPy's for CUDA's; it fails where it computes, too
                _log.warning("the thread that shows signs of life has no GPU: %s", error)
        return self._in_use

    # ---- the end -------------------------------------------------------------------------

    def close(self) -> None:
        """Close what others have lent; nothing of it is used any more."""
        self._open.close()

    def free(self) -> None:
        """Let go what this rank has lent, at the end."""
        self._open.free(self._mesh.watch.lost)

    # ---- the steps of `share` ------------------------------------------------------------

    def _choose(self) -> None:
        mesh, plan = self._mesh, self._plan
        if plan.device == plan.server_device == "cpu":  # as on every rank
            return
        if mesh.rank >= plan.servers:
            device = choose_device(plan.device, self._neighbours.local_worker)
        else:
            ordinal = self._server_gpu()
            device = "cpu" if ordinal is None else f"cuda:{ordinal}"
        self._ids = mesh.all_gather(identify(device), "the GPUs")
        if device != "cpu":
            self._own = Sharing.of(device, mesh.rank, self._ids, mesh.nodes, mesh.names)

    def _server_gpu(self) -> int | None:
        in_front = range(self._plan.servers)
        return choose_server_device(self._plan.server_device, local_server(self._mesh, in_front))

    def _decide(self) -> Exception | None:
        """Decide whether device pointers are given to MPI."""
        mesh, plan = self._mesh, self._plan
        if plan.gpu_direct != "on" and plan.device == plan.server_device == "cpu":
            return None
        works = mesh.rank >= plan.servers
        others = range(plan.servers) if works else range(plan.servers, mesh.size)
        decision = decide(
            mesh,
            plan.gpu_direct,
            on_gpu=self._own is not None,
            apart=any(rank not in self._neighbours.segments for rank in others),
            ask=cuda_support,
        )
        self._direct = decision.direct
        if decision.error is None and mesh.rank == 0 and decision.why:
            level = logging.INFO if decision.direct else logging.WARNING
            _log.log(level, "%s", explain(decision, **plan.leaves_devices))
        return decision.error

    def _lend(self) -> None:
        """Have workers and servers of a node open each other's memory, where they can."""
        plan, neighbours = self._plan, self._neighbours
        if plan.gpu_direct == "off" or "cpu" in (plan.device, plan.server_device):
            return  # as on every rank
        servers, shards = plan.servers, plan.layout.shards(plan.servers)
        leaves = plan.leaves_devices
        slots = SLOTS if leaves["gradients"] and not plan.reads_gradients else 0
        snapshots = buffer_count(neighbours.workers) if leaves["parameters"] else 0
        if not (slots or snapshots):
            return  # all is read on the host

        def shape(rank: int) -> tuple[int, int]:
            if rank >= servers:
                return slots, plan.layout.size
            begin, end = shards[rank]
            return snapshots, end - begin

        self._open = lend_and_open(
            self._mesh,
            neighbours.own,
            neighbours.segments,
            gpu=None if self._own is None else self._own.gpu,
            ids=self._ids,
            shape=shape,
            dtype=plan.layout.dtype,
            refused=self._too_much(shape),
        )
        lenders = [rank for rank in self._on_my_gpu() if rank in self._open.lenders]
        self._lent_bytes = self._sum(lenders, shape)

    def _too_much(self, shape: Shape) -> str:
        """Say why nothing is to be lent on this rank's GPU, as all find who are on it; or ""."""
        mine, why = (0, 0), ""
        if self._own is not None:
            try:
                mine = memory_of(self._own.gpu)
            except RuntimeError as error:  # CuPy's for CUDA's; where it computes, all hear of it
                why = str(error)
        told = self._mesh.all_gather(_MEMORY.pack(*mine), "the GPUs' memory")
        places = self._on_my_gpu()
        memory = [_MEMORY.unpack(told[rank]) for rank in places]
        memory = [one for one in memory if one[0]]  # of those who know
        if why or not memory:
            return why
        lenders = [rank for rank in places if self._has_partner(rank)]
        return too_much_to_lend(
            self._sum(lenders, shape), memory[0][0], min(free for _, free in memory)
        )

    def _on_my_gpu(self) -> list[int]:
        """Give the ranks that are on this one's GPU, itself included; none if it has none."""
        if self._own is None:
            return []
        places = list(zip(self._ids, self._mesh.nodes, strict=True))
        mine = places[self._mesh.rank]
        return [rank for rank, place in enumerate(places) if place == mine]

    def _has_partner(self, rank: int) -> bool:
        """Whether a worker has a server on a GPU of its node, or a server a worker."""
        servers, nodes = self._plan.servers, self._mesh.nodes
        others = range(servers) if rank >= servers else range(servers, self._mesh.size)
        return any(nodes[r] == nodes[rank] and self._ids[r] != NO_GPU for r in others)

    def _sum(self, ranks: Iterable[int], shape: Shape) -> int:
        return sum(lent_bytes(*shape(rank), self._plan.layout.dtype) for rank in ranks)
