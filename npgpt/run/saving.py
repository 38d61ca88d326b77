"""What a run writes to its folder: checkpoints, and when they are due, and rows of the log.

Rank 0 writes; on the others there is no RunFolder, and nothing is done.  A file that cannot be written is no end of the
training: a Notice says so, and it is tried again; at the end of the run it is an error.
"""

import contextlib
import math
import os

import numpy as np

from npgpt.errors import BusyError, CheckpointError, quoted
from npgpt.files import folder
from npgpt.run import aside, state
from npgpt.run.divergence import diverged
from npgpt.run.events import Notice
from npgpt.run.ranks import ALONE

SAVE_SHARE = 0.01  # of the time that saves by the clock may take


class _LogError(CheckpointError):
    """A row of the log that waits to be written."""


class Saving:
    """The files of a run.

    folder        the RunFolder, while the run goes on, on rank 0
    saved_iter    the iteration of the last checkpoint
    unsaved       why the last checkpoint, or a row of the log, could not be written: a CheckpointError
    next_save     what the clock of rank 0 shows when it saves between evaluations
    aside         (number of the process that saves, the iteration that it saves), if there is one
    """

    def __init__(self, setup, standing, overwrite=False, origin=None):
        self.setup, self.standing, self.overwrite, self.origin = setup, standing, overwrite, origin
        self.there = None if origin is None else origin.there  # the checkpoints that were there last
        self.folder, self.was_open = None, False
        self.saved_iter, self.unsaved = standing.resumed_from, None
        self.next_save, self.said_slow = math.inf, False
        self.aside = None

    # ---- the folder

    def open(self):
        """Take the run folder into possession.  Raises BusyError, UsageError and CheckpointError."""
        out_dir = self.setup.out_dir
        self.folder = folder.RunFolder(out_dir)
        if self.origin is None and not self.was_open:
            if not self.overwrite:
                folder.refuse_earlier_run(out_dir)  # it may have come while the lock was another's
            self.folder.clear(self.setup.tokens.file)
        else:
            # before this run had the lock, another may have gone on
            if self.there is not None and not {*folder.checkpoints(out_dir)} <= {*self.there}:
                words = "nothing was changed; give the same command again to go on from there"
                raise BusyError(f"another training has just saved a checkpoint to {out_dir}: {words}")
            self.there = None
            if not self.was_open:
                # what was agreed on is on the disk before the first update
                val_loss, by_clock = self.origin.state.get("val_loss"), bool(self.origin.state.get("by_clock"))
                now = state.written(self.setup, self.standing, val_loss, by_clock)
                self.folder.go_on_from(self.standing.iter, self.origin.found, *now, bool(self.origin.changes))
        self.folder.open_log(self.standing.iter)
        self.was_open = True

    def close(self):
        """Let the next training in."""
        if self.folder is not None:
            with contextlib.suppress(CheckpointError):  # the folder cannot be read
                self.there = folder.checkpoints(self.setup.out_dir)
            self.folder.close()
            self.folder = None

    # ---- checkpoints, and the log

    def check_model(self):
        """Raise ValueError if the model is not the one that its config says."""
        if other := self.setup.model.difference():
            raise ValueError(f"a Trainer's checkpoints hold GPT(config) only: {other}")

    def check_weights(self):
        """Raise DivergedError if what a checkpoint would hold is not finite."""
        if not all(np.isfinite(values).all() for _, values in self.setup.arrays()):
            what = "weights are not finite: no checkpoint is written of them"
            raise diverged(what, self.setup.config, self.standing.iter)

    def save(self, val_loss=None, by_clock=False, world=None):
        """Write a checkpoint of the weights as they are, unless there is one.  Returns a list of Notices.

        Raises DivergedError if they are not finite; world: who learns of it, by default all ranks.
        """
        (world or self.setup.world).first(self.check_weights)
        self.wait_for_aside()
        if self.folder is None or (self.saved_iter == self.standing.iter and val_loss is None):
            return []
        self.check_model()
        started, notices = state.clock(), []
        try:
            now = state.written(self.setup, self.standing, val_loss, by_clock)
            self.folder.save(self.standing.iter, *now, self.setup.config.keep)
            self.saved_iter, self.unsaved = self.standing.iter, None
        except CheckpointError as error:
            self.unsaved = error
            notices.append(Notice(f"{error}; the training goes on, and tries again at the next save"))
        return [*notices, *self.set_next_save(state.clock() - started)]

    def set_next_save(self, took=0.0):
        """Say when the clock saves next, after a save of so many seconds.

        Returns a list: the first time that saves come less often than they should, a Notice.
        """
        minutes = self.setup.config.save_minutes
        if self.folder is None or not minutes:
            return []
        asked, least = 60 * minutes, took / SAVE_SHARE
        self.next_save = state.clock() + max(asked, least)
        if least <= asked or self.said_slow:
            return []
        self.said_slow = True
        words = f"a save takes {took:.3g} s: between evaluations one comes every {least / 60:.3g} minutes, not every "
        return [Notice(f"{words}{minutes:g}, so that saves take no more than {SAVE_SHARE:.0%} of the time")]

    def save_aside(self):
        """Save in a process of its own, from the memory as it is now: nobody knows how long this one has to live."""
        iteration = self.standing.iter
        if self.folder is None or iteration in (self.saved_iter, self.aside and self.aside[1]):
            return
        self.wait_for_aside()
        child = aside.start(self._is_saved)
        self.aside = child and (child, iteration)

    def _is_saved(self):
        """Whether there is a checkpoint of the weights as they are, after an attempt to write it."""
        self.save(world=ALONE)
        return self.saved_iter == self.standing.iter

    def wait_for_aside(self):
        """Wait until the process that saves, if there is one, has ended."""
        process, self.aside = self.aside, None
        if process and os.waitpid(process[0], 0)[1] == 0:  # it has saved
            self.saved_iter = process[1]

    def check_saved(self):
        """Raise CheckpointError if the last checkpoint, or a row of the log, could not be written."""
        if self.unsaved is not None:
            raise CheckpointError(str(self.unsaved))

    def farewell(self):
        """Words for a run that was stopped."""
        if self.saved_iter is None:
            return f"stopped; nothing could be saved: {self.unsaved}"
        again = f"{self.setup.world.command} --resume --out-dir {quoted(self.setup.out_dir)}"
        place = f"iteration {self.standing.iter:,}; the checkpoint is of iteration {self.saved_iter:,}"
        return f"stopped at {place}. Go on with: {again}"

    def log(self, row):
        """Add a row to the log.  Returns a list: a Notice if that fails."""
        if self.folder is None:
            return []
        try:
            self.folder.log(row)
            if isinstance(self.unsaved, _LogError):
                self.unsaved = None
        except CheckpointError as error:
            if self.unsaved is None:
                self.unsaved = _LogError(str(error))
                return [Notice(f"{error}; the training goes on, and tries again")]
        return []
