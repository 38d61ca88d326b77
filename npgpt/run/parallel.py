"""Threads: a batch split over workers that share one set of weights.

NumPy's matrix product and the compiled kernels release Python's global lock, so threads run side by side.  Each worker
takes a share of the batch through a model of its own, whose weights are views of the same memory and whose gradients
are its own; then the gradients are added in a fixed order and the update is made, each worker on a slice of the flat
arrays.

Only one kind of thread may be busy: either workers, with one BLAS thread each, or one worker with all BLAS threads.
Two pools of threads that both spin for work on the same cores make everything several times slower.

Several ranks (npgpt/run/ranks.py) each do this with their share of the sequences, and add their gradients up on top, in
buckets: while the last micro-step's backward is still busy with the first blocks, the gradients of the last ones are on
their way to other machines.
"""

import contextlib
import copy
import itertools
import os
from types import NoneType

import numpy as np

from npgpt.engine import no_grad, watched
from npgpt.kernels import sums
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.buffers import BufferPool, reuse_buffers
from npgpt.kernels.crew import Crew
from npgpt.kernels.masks import random_stream
from npgpt.kernels.matmul import let_threads_spin, products_of, way
from npgpt.machine import cores, processors
from npgpt.nn import Module, Parameter, structure
from npgpt.optim import FlatParameters, sum_of_squares
from npgpt.run.ranks import ALONE

TOKENS_PER_WORKER = 256
BUCKET = 2**20  # elements of the gradient that are sent at once, at least


def choose_threads(batch_size, block_size, workers=None, blas=None, n=None):
    """(workers, BLAS threads of each) for a micro-step of batch_size sequences; a number that is given is kept.

    A worker must be worth its own pass over all gradients: one for each 256 tokens, at most one per sequence and core.
    More workers than processors take turns.  BLAS threads cannot: of them there are no more than can run at a time, and
    no more than the environment allows; it is this number that the bits depend on.

    n: cores to use; by default all that there are.
    """
    n, most = n or cores(), processors()
    if workers is None:
        workers = max(1, min(n, batch_size, batch_size * block_size // TOKENS_PER_WORKER, most // (blas or 1)))
    workers = min(workers, batch_size)
    if blas is None:
        wanted = [os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")]
        limit = next((int(value) for value in wanted if value.isdigit() and int(value) > 0), n)
        blas = min(limit, n // workers)
    return workers, max(1, min(blas, most // workers))


class Replica:
    """What one worker owns: a model over the shared weights, its own gradients, and its own buffers."""

    def __init__(self, flat):
        self.model, self.flat, self.pool = flat.model, flat, BufferPool()


class DataParallel:
    """A model whose batches are split over worker threads.

    model    a GPT; its parameters are moved into flat storage (`flat`)
    workers  that share each batch, each in a thread, or in turn where there are fewer processors; results are the same
             bits for the same number of workers, and the same to rounding for any number
    blas     BLAS threads of each worker's matrix products
    world    the ranks whose gradients are added up, a World
    dtype    what matrix products round their operands to, as in `products_of`

    The other workers' models are copies of `model` as it is; where it is changed later, they are made anew at the next
    zero_grad().  New Parameters are not: RuntimeError is raised at the next update.
    """

    def __init__(self, model, workers=1, blas=1, world=ALONE, dtype="float32"):
        self.model, self.blas, self.world, self.dtype = model, blas, world, dtype
        let_threads_spin()  # before any kernel is loaded
        if dtype == "bfloat16":
            way()  # it is found out before the threads begin
        self.flat = FlatParameters(model)
        self.replicas = [Replica(self.flat), *(self._twin() for _ in range(1, workers))]
        self.fingerprint, self.n_unseeded = fingerprint(model), 0
        self.n_sent = 0  # buckets of this update's gradient that are on their way to the other ranks
        # adding gradients and updating weights uses no BLAS: there is a share for each thread that the products use
        size, self.n_threads = len(self.flat.weights), workers * blas
        self.slices = _cut(slice(0, size), self.n_threads)
        self.mine = _cut(slice(0, size), world.size)[world.rank]  # this rank's part of the sum of squares
        self.buckets = self._buckets()
        self.bucket_of = [  # number of each parameter's bucket
            next(n for n, bucket in enumerate(self.buckets) if bucket.start <= place.start < bucket.stop)
            for place in self.flat.names.values()
        ]
        self._crew = Crew(min(self.n_threads, processors()) - 1, "npgpt-worker")

    def each(self, work, n=None):
        """[work(0), ..., work(n - 1)], by default one per worker; number 0 runs in this thread, the others in any.

        So work sets itself all that is a thread's own: random_stream, reuse_buffers and the like.
        """
        with blas_threads(self.blas):
            return self._crew.each(work, n or len(self.replicas))

    def _shares(self, n):
        """How n sequences are cut: (start, stop) for each worker; they differ by one at most."""
        return list(itertools.pairwise(n * rank // len(self.replicas) for rank in range(len(self.replicas) + 1)))

    def _twin(self):
        """A Replica of the model as it is, over the same weights.  Raises ValueError for what cannot be copied."""
        for place in structure(self.model):
            if place.rpartition(".")[2] == "forward":
                words = "was set on this object alone, and would go on calling it; make it a class"
                raise ValueError(f"workers: model.{place} {words}")
        # what is not to be copied: FlatParameters give the twin its places
        shared = [getattr(self.model, "tokenizer", None)]
        shared += [array for parameter in self.model.parameters() for array in (parameter.data, parameter.grad)]
        twin = copy.deepcopy(self.model, {id(thing): thing for thing in shared})
        return Replica(FlatParameters(twin, share=self.flat))

    def _follow(self):
        """Have the other workers' models be what the first one is now."""
        self.flat.check_home()
        if self.fingerprint != (now := fingerprint(self.model)):
            self.flat.check()
            for rank in range(1, len(self.replicas)):
                self.replicas[rank] = self._twin()
            self.fingerprint = now

    def train(self, mode=True):
        for replica in self.replicas:
            replica.model.train(mode)
        self.fingerprint = fingerprint(self.model)

    def zero_grad(self):
        """Before an update's first micro-step.  Raises RuntimeError if the model's parameters are others by now."""
        self._follow()
        for replica in self.replicas:
            replica.flat.zero_grad()
        self.n_sent = 0

    def forward_backward(self, idx, targets, seed=None, weight=1.0, offset=0, last=False):
        """Add the gradients of weight * loss to the workers' gradients, and return the loss (the batch's mean).

        idx, targets  (B, T); targets of -1 do not count
        seed          of this micro-step's dropout masks; by default the number of calls without a seed before this one
        offset        number of the first sequence in the micro-step, if other ranks have the rest
        last          whether it is this rank's last micro-step of the update: then its gradients may be sent
        """
        if seed is None:
            seed, self.n_unseeded = self.n_unseeded, self.n_unseeded + 1
        shares, count = self._shares(len(idx)), _count(targets)
        if count == 0:
            raise ValueError("forward_backward: every target is -1: there is nothing to learn from")
        sending = self._sending() if last and self.world.between_machines else contextlib.nullcontext

        def work(rank):
            (start, stop), replica = shares[rank], self.replicas[rank]
            share = _count(targets[start:stop]) / count
            if share == 0:
                return 0.0
            # numbers that are not finite are for the caller to see in the result, not for NumPy to warn of
            quiet, rounded = np.errstate(all="ignore"), products_of(self.dtype)
            with quiet, rounded, reuse_buffers(replica.pool), random_stream(seed, offset + start), sending(rank):
                _, loss = replica.model(idx[start:stop], targets[start:stop])
                loss.backward(weight * share)
                return share * loss.item()

        return sum(self.each(work))

    def gather_grads(self):
        """Add the gradients of all workers and ranks into flat.grads.

        Returns the sum of their squares; where there are several ranks, of this rank's part of them only.
        """
        for replica in self.replicas:
            replica.flat.finish_grads()
        for twin in self.replicas[1:]:
            twin.flat.zero_grad()  # what they have is added below: once
        if self.world.size == 1:
            return self._sum_of_squares(self.slices, self._add_workers)
        rest = self.buckets[self.n_sent :]
        for bucket in rest:
            parts = _cut(bucket, self.n_threads)
            self._crew.each(lambda rank, parts=parts: self._add_workers(parts[rank]), len(parts))
        self.world.finish_sums(*(self.flat.grads[bucket] for bucket in rest))
        return self._sum_of_squares(_cut(self.mine, self.n_threads))

    def _add_workers(self, part):
        """Add the other workers' gradients to the first one's, in a slice of them."""
        total = self.flat.grads[part]
        for replica in self.replicas[1:]:
            sums.add(total, total, replica.flat.grads[part])

    def _sum_of_squares(self, parts, first=lambda part: None):
        """The sum of the squares of flat.grads in all parts, each in a thread, which calls first(part) before."""

        def work(rank):
            total = np.zeros(())
            first(parts[rank])
            sum_of_squares(total, self.flat.grads[parts[rank]])
            return float(total)

        return sum(self._crew.each(work, len(parts)))

    def _buckets(self):
        """Slices of the gradient, in the order in which a backward is done with them: blocks from the last one on."""
        starts, buckets, end = {}, [], self.flat.n_hidden
        for name, place in self.flat.names.items():
            if place.start < self.flat.n_hidden:
                starts.setdefault(int(name.split(".h.")[1].split(".")[0]), place.start)
        for _, start in sorted(starts.items(), reverse=True):
            if end - start >= BUCKET or start == 0:
                buckets.append(slice(start, end))
                end = start
        return [*buckets, slice(self.flat.n_hidden, len(self.flat.grads))]

    def _sending(self):
        """A context for each worker's forward and backward, in which the first one sends what all are done with.

        A bucket is done with when a backward has passed every op of the forward that used a parameter of it.  The last
        bucket waits for the end.
        """
        done = [0] * len(self.replicas)  # buckets that each worker is done with

        def context(rank):
            bucket_of = dict(zip(map(id, self.replicas[rank].flat.parameters), self.bucket_of, strict=True))
            uses = [0] * len(self.buckets)  # of each bucket's parameters, which the backward has not passed yet

            def count(parents, change):
                for parent in parents:
                    if id(parent) in bucket_of:
                        uses[bucket_of[id(parent)]] += change

            def passed(op, parents, grads):
                while done[rank] < len(uses) - 1 and uses[done[rank]] == 0:  # by the ops before this one
                    done[rank] += 1
                if rank == 0:
                    self._send(min(done))
                count(parents, -1)

            return watched(lambda op, out, parents, backward: count(parents, int(out.requires_grad)), passed)

        return context

    def _send(self, n):
        """Have the first n buckets be on their way to the other ranks."""
        for bucket in self.buckets[self.n_sent : n]:
            self._add_workers(bucket)
            self.world.start_sum(self.flat.grads[bucket])
            self.n_sent += 1

    def update(self, optimizer, lr, scale):
        """One update of the weights with flat.grads * scale; a .grad that was assigned to a Parameter counts."""
        self.flat.check_home()
        self.flat.finish_grads()
        optimizer.step += 1

        def work(rank):
            with products_of(self.dtype):  # Muon's last product, too
                optimizer.update(self.flat.grads, lr, scale, self.slices[rank])

        self.each(work, len(self.slices))

    def loss(self, idx, targets):
        """(sum of the loss over the targets that are not -1, number of these), without gradients."""
        self._follow()
        shares = self._shares(len(idx))

        def work(rank):
            (start, stop), replica = shares[rank], self.replicas[rank]
            count = _count(targets[start:stop])
            if count == 0:
                return 0.0
            with np.errstate(all="ignore"), products_of(self.dtype), no_grad(), reuse_buffers(replica.pool):
                _, loss = replica.model(idx[start:stop], targets[start:stop])
                return loss.item() * count

        return sum(self.each(work)), _count(targets)

    def close(self):
        """End the worker threads."""
        self._crew.close()


def fingerprint(module):
    """A number that changes with what a module is made of: anything but its parameters' numbers."""
    found = [type(module)]
    for name, value in vars(module).items():
        if isinstance(value, Parameter):
            value = id(value), value.requires_grad
        elif isinstance(value, Module):
            value = fingerprint(value)
        elif isinstance(value, list):
            value = tuple(fingerprint(item) if isinstance(item, Module) else id(item) for item in value)
        elif not isinstance(value, (int, float, str, NoneType)):
            value = id(value)
        found.append(hash((name, value)))
    return hash(tuple(found))


def _cut(whole, n):
    """A slice cut into n parts of about the same length, at multiples of 16 elements."""
    start, length = whole.start, whole.stop - whole.start
    cuts = [start + length * i // n // 16 * 16 for i in range(n)] + [whole.stop]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _count(targets):
    """How many targets count."""
    return int(np.count_nonzero(targets != -1))
