"""Do numbered pieces of work in other processes and get the results in order.

A thin layer over `torch.utils.data.DataLoader`, which brings tensors over in shared memory. It
adds what a training run needs: a failure in a worker is one clear error, signals meant for the
main process do not kill workers, nothing is left running, and torch's global random state is not
touched.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

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
        InputError: `function` raised one, or `workers` is negative.
        WorkerError: `function` raised something else, or a worker died.
    """
    if workers < 0:
        raise InputError(f"workers must be 0 or more, got {workers}")
    loader = DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the global one would be drawn from
    )
    with _signals_blocked():
        results = iter(loader)  # starts the workers
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # torch's word for a worker that was killed, or the end of its connection
                raise WorkerError(f"a loader worker died: {error}") from None
            if isinstance(result, _Failure):
                _raise(result)
            yield result
    finally:
        shut_down = getattr(results, "_shutdown_workers", None)
        if shut_down is not None:
            try:
                with suppress(RuntimeError):  # a worker that dies now is not missed
                    shut_down()
            finally:  # a second Ctrl-C may end that early, and SIGTERM does not reach them
                for worker in results._workers:
                    worker.kill()


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


def _as_it_is(item: object) -> object:
    return item
