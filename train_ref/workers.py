"""Processes that load images, out of reach of the signals that stop a training."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)  # a training


class _OutOfReach:
    """A process that starts with these signals blocked, and keeps them so.

    A terminal, or a scheduler, sends them to all processes of a group. The training answers by ending its
    step, for which it needs a batch. A handler would come too late: it is set when the process runs, which
    takes seconds where it is not forked. Processes end with the one that trains, also when that is killed.
    """

    def start(self) -> None:
        resource_tracker.ensure_running()  # or it is started within, and leaves signals unblocked
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Whoever ends it, the loader or multiprocessing at exit, would wait for what it does not hear.
        self._popen.terminate = self._popen.kill


class _Forked(_OutOfReach, multiprocessing.get_context("fork").Process):
    pass


class _Spawned(_OutOfReach, multiprocessing.get_context("spawn").Process):
    def _bootstrap(self, *arguments: Any, **named: Any) -> NoReturn:
        """Ends as those of the other methods do, without taking the interpreter down: threads of PyTorch's
        that still run would abort the process, and the training with it."""
        os._exit(super()._bootstrap(*arguments, **named))


class _ForkServed(_OutOfReach, multiprocessing.get_context("forkserver").Process):
    pass


_PROCESSES = {"fork": _Forked, "spawn": _Spawned, "forkserver": _ForkServed}


def context() -> BaseContext:
    """What a loader starts its processes with, in the way that is multiprocessing's default."""
    method = multiprocessing.get_start_method()
    kind = type(multiprocessing.get_context(method))
    return type(kind.__name__, (kind,), {"Process": _PROCESSES[method]})()
