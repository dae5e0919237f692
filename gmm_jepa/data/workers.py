"""Do numbered pieces of work in other processes and get the results in order.

A thin layer over `torch.utils.data.DataLoader`, which brings tensors over in shared memory. It
adds what a training run needs: a failure in a worker is one clear error, and so is a worker that
cannot start; signals meant for the main process do not kill workers, nothing is left running, and
torch's global random state is not touched.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children, get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from gmm_jepa.errors import InputError

Result = TypeVar("Result")


class WorkerError(RuntimeError):
    """A loader's worker failed; the message says at which piece of work and why."""


class _Failure(NamedTuple):
    message: str
    is_input: bool
    trace: str


class _Calls(Dataset):
    """A function seen as a map-style data set; failures become values."""

    def __init__(self, function: Callable[[int], object]):
        self._function = function

    def __getitem__(self, index: int) -> object:
        try:
            return self._function(index)
        except InputError as error:
            return _Failure(str(error), True, "")
        except Exception as error:
            message = f"item {index}: {type(error).__name__}: {error}"
            return _Failure(message, False, traceback.format_exc())

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: the function goes in a file, its descriptor by the pipe.

        A worker that dies before it reads a full pipe leaves the writer waiting for ever.
        """
        self._file = _anonymous_file()  # open until the next worker's: this one inherits it
        ForkingPickler(self._file, pickle.HIGHEST_PROTOCOL).dump(self._function)
        self._file.seek(0)
        return {"file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        with open(state["file"].detach(), "rb") as file:
            self._function = pickle.load(file)


class _Begun:
    """Which workers have come to their first call: a byte each, set by the worker."""

    def __init__(self, n_workers: int, start_method: str | None):
        self._begun = get_context(start_method).RawArray("b", n_workers)

    def __call__(self, number: int) -> None:
        """What a worker does first."""
        self._begun[number] = 1

    def wait(self, workers: list[BaseProcess]) -> None:
        """Return once all have begun."""
        while not all(self._begun):
            self.check(workers)
            wait([w.sentinel for w, begun in zip(workers, self._begun) if not begun], 0.01)

    def check(self, workers: list[BaseProcess]) -> None:
        """Raise InputError, and leave no worker, if one ended before it had begun."""
        codes = [worker.exitcode for worker in workers]  # before it is seen who has begun
        for number, code in enumerate(codes):
            if code is None or self._begun[number]:
                continue
            for worker in workers:
                worker.kill()  # one that still starts would be waited for
            raise InputError(
                f"loader worker {number} of {len(workers)} (from 0) ended before it began, exit "
                f"code {code}: see what it printed; a script must start work only under "
                f'`if __name__ == "__main__":`, and 0 workers need no other process'
            )


def map_in_order(
    function: Callable[[int], Result],
    indices: range,
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[Result]:
    """Yield ``function(i)`` for `indices`, in order, computed by worker processes.

    Closing the iterator, or leaving the loop over it, ends the workers.

    Args:
        function: called in the workers; picklable where they are spawned. Its results should be
            tensors, or objects of tensors, where they are large.
        indices: what to call it with.
        workers: processes; 0 calls it here.
        prefetch: calls each worker runs ahead.
        pin_memory: page-lock the tensors of the results (CUDA only).
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; None is the platform's.

    Raises:
        InputError: `function` raised one, `workers` is negative, or a worker could not start.
        WorkerError: `function` raised something else, or a worker died.
    """
    if workers < 0:
        raise InputError(f"workers must be 0 or more, got {workers}")
    begun = _Begun(workers, start_method if workers else None)
    loader = DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=begun,
        generator=torch.Generator(),  # else the global one would be drawn from
    )
    results = _started(loader)
    processes = getattr(results, "_workers", [])
    _open.append(results)
    try:
        while True:
            try:
                begun.wait(processes)
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # torch's word for a worker that was killed, or the end of its connection
                begun.check(processes)
                raise WorkerError(f"a loader worker died: {error}") from None
            if isinstance(result, _Failure):
                _raise(result)
            yield result
    finally:
        if results in _open:  # else the process ends
            _open.remove(results)
            _shut_down(results)


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's results; its workers are started, all or none."""
    others = active_children()
    try:
        with _signals_blocked():
            return iter(loader)
    except BaseException as error:
        started = [child for child in active_children() if child not in others]
        for child in started:
            child.kill()
            child.join()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half_made = frame.f_locals.get("self")
            if hasattr(half_made, "_shutdown_workers"):
                half_made._shutdown = True  # it lacks what its end would need
        if isinstance(error, OSError):
            raise InputError(
                f"loader worker {len(started)} of {loader.num_workers} (from 0) could not be "
                f"started ({error}): try fewer workers; 0 need no other process"
            ) from None
        raise


def _anonymous_file() -> BinaryIO:
    """In memory where the system can."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("gmm_jepa_call"), "w+b")
    return tempfile.TemporaryFile()


def _raise(failure: _Failure) -> None:
    if failure.is_input:
        raise InputError(failure.message)
    raise WorkerError(f"{failure.message}\n{failure.trace.rstrip()}")


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Leave Ctrl-C and SIGTERM, sent to the whole group, to the main process.

    What is started inside inherits the block and keeps it; here it ends, and nothing is lost. A
    worker ends when its parent tells it to or is gone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shut_down(results: Iterator[Any]) -> None:
    """End the workers of a loader's results, if it has any."""
    shut_down = getattr(results, "_shutdown_workers", None)
    if shut_down is None:
        return
    try:
        with suppress(RuntimeError):  # a worker that dies now is not missed
            shut_down()
    finally:  # a second Ctrl-C may end that early, and SIGTERM does not reach them
        for worker in results._workers:
            worker.kill()


_open: list[Iterator[Any]] = []
"""Results that may still come."""


@atexit.register
def _shut_all_down() -> None:
    """The traceback of what nobody caught holds an iterator open.

    Last come, first served: then multiprocessing asks its children to end by SIGTERM, which they do
    not hear, and waits for them.
    """
    while _open:
        _shut_down(_open.pop())


def _as_it_is(item: object) -> object:
    return item
