"""The training loop, from one TrainConfig.

    trainer = Trainer(config)              # or Trainer.resume(out_dir)
    for event in trainer.run():            # Progress after an update, Evaluation, Audited, Notice
        print(event)

The loop computes and writes files; what is shown to a person is the business of npgpt/train.py.  Around it: setup.py
makes what a run is made of, state.py is where it stands and what a checkpoint says of it, saving.py writes.
"""

import contextlib
import math
from operator import attrgetter

import numpy as np

from npgpt.config import SAMPLE
from npgpt.errors import GradientError, StoppedError
from npgpt.files import folder
from npgpt.generate.generation import unprompted
from npgpt.generate.writer import Writer
from npgpt.kernels.profiler import profiling
from npgpt.model import GPT
from npgpt.optim import clip_scale
from npgpt.run import state
from npgpt.run.beginning import doubt_of
from npgpt.run.divergence import diverged, first_not_finite
from npgpt.run.events import Audited, Evaluation, Notice, Progress, log_row
from npgpt.run.parallel import DataParallel
from npgpt.run.ranks import ALONE
from npgpt.run.saving import Saving
from npgpt.run.setup import prepare
from npgpt.run.tokens import TokensChanged
from npgpt.signals import NEVER, StopNow, held, until_interrupted

MOST_SKIPPED = 5  # updates in a row that may be skipped because something was not finite


class Trainer:
    """A training run.  Raises UsageError and CheckpointError before anything is trained.

    config     a TrainConfig
    overwrite  whether an earlier run in config.out_dir may be lost
    force      whether to begin even if the memory seems too small
    profile    a Profile that gets to know where the updates' time goes; not that of the first, which compiles kernels,
               and not that of audited ones
    stop       a Stop; when it has a number while the data is read, StoppedError is raised
    world      the World of ranks that share the work; all of them must be given the same settings

    setup      the Setup: data, model, workers, optimizer, and what else is made once
    standing   the Standing: how many updates were made, which evaluation was the best
    saving     the Saving: its checkpoints and its log
    """

    def run(self, stop=NEVER):
        """Train to the end; yields a Progress after each logged update and an Evaluation at each evaluation.

        stop: a Stop; when it has a number, the work ends within a micro-step, a checkpoint is written, and StoppedError
        is raised.  Without it, Ctrl-C (or a notebook's stop button) does the same, and KeyboardInterrupt is raised.

        Called again, it goes on where the loop over it was left, and yields nothing if it had come to the end.
        Parameters of `model` with requires_grad = False stay as they are, also after a resume.

        Raises DivergedError, GradientError, BusyError; CheckpointError if at the end the last checkpoint or the log
        could not be written (while it goes on, that is a Notice); and ValueError for a model that is not GPT(config).
        """
        if self.at_end:
            return
        if stop is NEVER:
            yield from until_interrupted(self.run)
            return
        with self._in_folder(stop):
            yield from self._begin()
            while not self.at_end:
                evaluation = None
                if self.iter >= self.max_iters or self.iter % self.config.eval_interval == 0:
                    evaluation = yield from self._evaluate_and_save(stop)
                if not self.at_end:
                    yield from self._update(stop, evaluation)

    def step(self, stop=NEVER):
        """One update -> (loss, learning rate, gradient norm, whether it was skipped).

        If the loss or the gradient's norm is not finite, the update is skipped: weights and moments stay as they are.
        Raises DivergedError at the fifth in a row, and GradientError if the gradient is audited and wrong.
        """
        setup, at, parallel = self.setup, self.standing, self.parallel
        self.audit = None
        parallel.zero_grad()
        mine, n, loss = setup.sequences, len(setup.micro_steps) * setup.world.size, 0.0
        for i, (x, y, seed) in zip(setup.micro_steps, setup.micro_batches(at.iter, setup.micro_steps), strict=False):
            if stop.number is not None:
                break  # what there is goes into the sum all the same, by which all ranks learn of it
            loss += parallel.forward_backward(
                x[mine], y[mine], seed, weight=1 / n, offset=mine.start, last=i == setup.micro_steps[-1]
            ) / n  # fmt: skip
        squares, due = parallel.gather_grads(), state.clock() >= self.saving.next_save
        loss, squares, due = setup.sum(stop, loss, squares, due)
        self.save_is_due = due > 0
        norm, lr = math.sqrt(squares), setup.learning_rate(at.iter)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        n_skipped = at.skipped + 1 if skipped else 0
        if n_skipped == MOST_SKIPPED:
            at.skipped = n_skipped
            where = first_not_finite(setup.model, setup.micro_batches(at.iter)) if setup.world.rank == 0 else ""
            raise diverged(f"the loss is {loss}, the gradient's norm {norm}{where}", setup.config, at.iter)
        if self._is_audited() and not skipped:
            self._audit(stop)
        with held():  # weights, moments and iter belong together
            if not skipped:
                parallel.update(setup.optimizer, lr, clip_scale(norm, setup.config.grad_clip))
            at.skipped, at.iter = n_skipped, at.iter + 1
        return loss, lr, norm, skipped

    # ---- how a run is made

    def __init__(self, config, overwrite=False, profile=None, force=False, stop=NEVER, world=ALONE, *, origin=None):
        """origin: the Origin that the run goes on from; see `resume`, which opens it."""
        self.setup = prepare(config, world, stop, overwrite, force, origin)
        self.standing, self.notices = state.first(self.setup, origin)  # notices: what run() has to say at first
        self.saving = Saving(self.setup, self.standing, overwrite, origin)
        self.profile, self.pace = profile, None
        self.audit, self.audited_iter = None, -1  # of the last update if it was audited; the last that passed
        self.save_is_due = False  # whether at the last update rank 0's clock asked for a save
        self.at_end = False  # whether run() came to the end

    @classmethod
    def resume(cls, path, changes=None, profile=None, force=False, stop=NEVER, world=ALONE):
        """The run in a folder, or in a checkpoint file, as it stood when its newest checkpoint was written.

        changes: settings that are to be other than before, as a dict; the rest is as for a new run.
        Raises CheckpointError if there is no good checkpoint, and UsageError if data or changes do not fit it.
        """
        with state.opened(path, changes, world) as origin:
            return cls(origin.config, False, profile, force, stop, world, origin=origin)

    config = property(attrgetter("setup.config"))
    out_dir = property(attrgetter("setup.out_dir"))
    tokenizer = property(attrgetter("setup.tokenizer"))
    model: GPT = property(attrgetter("setup.model"))
    parallel: DataParallel = property(attrgetter("setup.parallel"))
    optimizer = property(attrgetter("setup.optimizer"))
    max_iters = property(attrgetter("setup.max_iters"))
    val_sample = property(attrgetter("setup.val_sample"))
    iter = property(attrgetter("standing.iter"))
    skipped = property(attrgetter("standing.skipped"))
    best_loss = property(attrgetter("standing.best_loss"))
    best_iter = property(attrgetter("standing.best_iter"))
    resumed_from = property(attrgetter("standing.resumed_from"))

    # ---- around the updates

    @contextlib.contextmanager
    def _in_folder(self, stop):
        """Within this context the run folder is this run's; what was learnt is saved, however it ends."""
        world, saving = self.setup.world, self.saving
        saving.check_model()
        try:
            world.first(saving.open)
            if world.size > 1:
                stop.warned = saving.save_aside
            self.setup.broadcast()
            yield
        except (StopNow, TokensChanged) as stopped:
            saving.save()
            if isinstance(stopped, TokensChanged):
                raise TokensChanged(f"{stopped}; {saving.farewell()}, with the data as they were") from None
            raise StoppedError(stopped.number, saving.farewell()) from None
        except GeneratorExit:  # nobody asks for the next event: the output was closed, say
            saving.save(world=ALONE)
            raise
        finally:
            stop.warned = None
            self.notices = []
            self.standing.pause()
            saving.close()

    def _begin(self):
        at, saving = self.standing, self.saving
        for text in (*self.notices, *(() if saving.folder is None else saving.folder.notices)):
            yield Notice(text)
        if at.resumed_from == at.iter and at.changes:
            yield from saving.log({"iter": at.iter, "changed": at.changes})
        at.start()
        self.pace = state.Pace(at.iter, self.setup.tokens_per_iter, self.setup.max_iters)
        yield from saving.set_next_save()

    def _update(self, stop, evaluation):
        """A step, and what is told of it; evaluation: the one just before it, if there was one."""
        at, pace, saving, n = self.standing, self.pace, self.saving, self.standing.iter
        try:
            with profiling(None if pace.steady is None or self._is_audited() else self.profile):
                loss, lr, norm, skipped = self.step(stop)
        except GradientError:
            if self.audit is not None:
                yield from saving.log({"iter": n, "gradcheck": self.audit.errors})
            raise
        is_told = n % self.config.log_interval == 0
        pace.since += 0.0 if self.audit is None else self.audit.seconds
        speed, left = pace.measure(at.iter, is_told)
        if self.audit is not None:
            yield Audited(n, self.audit)
        progress = Progress(n, loss, lr, norm, speed, left, skipped)
        yield from saving.log(log_row(n, at.seconds(), progress, evaluation, self.audit))
        if skipped:
            yield Notice(f"iteration {n:,}: loss {loss}, gradient norm {norm}; the update was skipped")
        if is_told:
            yield progress
        if self.save_is_due:
            started = state.clock()
            notices = saving.save(by_clock=True)
            pace.since += state.clock() - started
            yield from notices

    def _is_audited(self):
        return self.config.gradcheck_every and self.iter % self.config.gradcheck_every == 0

    def _audit(self, stop):
        """Compare the gradient with finite differences, on rank 0.  Raises GradientError if it is wrong."""
        auditor, n = self.setup.auditor, self.iter
        if auditor is not None and not self.setup.tokens.changed():
            self.audit = auditor.audit(list(self.setup.micro_batches(n)), (self.config.seed, n), stop)
        (wrong,) = self.setup.world.sum(stop, self.audit is not None and not self.audit.passed)
        if wrong:
            good = folder.newest_until(self.out_dir, self.audited_iter + 1)
            worst = self.audit and self.audit.worst  # there is none where rank 0 has the words
            hint = f". The last checkpoint before it that is beyond doubt is {good}" if good else ""
            raise GradientError(f"the gradient at iteration {n} is wrong: {worst}; nothing of it was saved{hint}")
        self.audited_iter = n

    # ---- evaluation

    def _evaluate_and_save(self, stop):
        """Evaluate, and save; at the end on the whole split as well.  Returns the Evaluation that it has yielded."""
        setup, at, saving, patience = self.setup, self.standing, self.saving, self.config.patience
        loss = setup.mean_loss(setup.val_sample, stop)
        if not math.isfinite(loss):  # of text that the training may know nothing of: what was learnt is not lost
            yield from saving.save()
            raise diverged(f"the validation loss is {loss}", setup.config, at.iter)
        is_best = at.evaluated(loss)
        if setup.brought_together():
            words = "(are their processors, and numbers of threads?); now all have those of rank 0"
            yield Notice(f"the ranks' weights were no longer the same {words}")
        yield from saving.save(loss)
        if at.iter == 0 and (words := doubt_of(setup.config, setup.model, loss)):
            yield Notice(words)
        evaluation = Evaluation(at.iter, loss, is_best)
        out_of_patience = patience is not None and at.since_best >= patience
        if at.iter < setup.max_iters and not out_of_patience:
            yield evaluation
            self.pace.restart(at.iter)
            return evaluation
        # (the best may have come when the disk was full)
        best = at.best_loss, at.best_iter
        at.best_loss, at.best_iter = setup.world.first(lambda: folder.best_there(setup.out_dir, at.iter, *best))
        evaluation = Evaluation(at.iter, loss, is_best, self.evaluate(setup.val_blocks, stop))
        yield evaluation
        yield from saving.log(log_row(at.iter, at.seconds(), evaluation=evaluation))
        if out_of_patience:
            yield Notice(f"no new best in {patience} evaluations: the run ends here")
        self.at_end = True
        setup.world.first(saving.check_saved)

    def evaluate(self, blocks, stop=NEVER):
        """Mean loss over EvaluationBlocks.  Raises DivergedError if it is not finite, and TokensChanged."""
        loss = self.setup.mean_loss(blocks, stop)
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss}", self.config, self.iter)
        return loss

    def sample(self, n_tokens):
        """Iterator of text that the model writes now, from a line break on, if it knows one."""
        rng = np.random.default_rng([self.config.seed, SAMPLE, self.iter])
        writer = Writer(self.tokenizer)
        for token in unprompted(self.model, n_tokens, rng):
            yield writer.feed(token)
        yield writer.end()
