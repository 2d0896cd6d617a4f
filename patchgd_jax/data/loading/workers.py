"""Reads training batches in processes of their own, into memory that they share with this one.

Not with Grain's `mp_prefetch`: whatever its options it keeps five batches per process, and what it
has yet to free in the background when a program ends is reported as leaked.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import shutil
import signal
from collections.abc import Generator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from patchgd_jax.data.loading.order import TrainOrder
from patchgd_jax.data.loading.reading import Bad, Read, Reader
from patchgd_jax.errors import ConfigError, DataError, PatchGDError

_GUARD = 'a script that has reader workers must train inside if __name__ == "__main__":'
_SHARED = Path("/dev/shm")
_SECONDS_TO_END = 10


def read_in_workers(
    reader: Reader, order: TrainOrder, rows: slice, *, start: int, workers: int, ahead: int
) -> Generator[Read, None, None]:
    """Reads training batches in order, up to `ahead` of them before they are asked for.

    The processes end with the generator, or with this process.

    Args:
        reader: of the examples; closed at the end.
        order: which examples a batch has.
        rows: the rows of each batch that are read.
        start: number of the first batch.
        workers: number of processes, at most `ahead`.
        ahead: at least 1.

    Raises:
        ConfigError: if the examples cannot be sent to another process, or there is not enough
            shared memory.
        DataError: if a process dies.
    """
    pool = _Pool(reader, order, rows, ahead)
    try:
        pool.start(workers)
        for k in range(start, start + ahead):
            pool.ask(k)
        for k in itertools.count(start):
            read = pool.answer(k)
            pool.ask(k + ahead)
            yield read
            del read
    finally:
        pool.close()
        reader.close()


class _Pool:
    """Processes and the memory they read into: batch k is worker k's and in slot k, in turn."""

    def __init__(self, reader: Reader, order: TrainOrder, rows: slice, ahead: int) -> None:
        self._reader = reader
        self._rows = rows.stop - rows.start
        self._ahead = ahead
        self._slots: list[SharedMemory] = []
        self._workers: list[tuple[BaseProcess, Connection]] = []
        try:
            self._work = pickle.dumps((reader, order, rows))
        except Exception as error:
            # Pickling runs the source's own code.
            raise ConfigError(
                f"the examples cannot be sent to reader workers ({error}); read in threads only"
            ) from error

    def start(self, workers: int) -> None:
        """Takes the memory and starts the processes."""
        size = self._reader.batch_bytes(self._rows)
        if _SHARED.is_dir() and shutil.disk_usage(_SHARED).free < self._ahead * size:
            # Beyond that, writing to it ends a process without a word.
            raise ConfigError(
                f"reader workers need {self._ahead * size >> 20} MiB of shared memory, more than "
                f"is free in {_SHARED}; read in threads only, or give the container more "
                "(--shm-size)"
            )
        for _ in range(self._ahead):
            self._slots.append(SharedMemory(create=True, size=size))
        names = [slot.name for slot in self._slots]
        context = multiprocessing.get_context("spawn")
        # Signals to all, such as Ctrl-C, are for the main process: workers inherit the block.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, self._work, names), daemon=True
                )
                process.start()
                theirs.close()
                self._workers.append((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def ask(self, k: int) -> None:
        """Has batch k read into its slot, whose batch must have been answered."""
        process, connection = self._workers[k % len(self._workers)]
        try:
            connection.send((k, k % len(self._slots)))
        except OSError as error:
            raise _death(process) from error

    def answer(self, k: int) -> Read:
        """Waits for batch k."""
        process, connection = self._workers[k % len(self._workers)]
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise _death(process) from error
        if isinstance(answer, PatchGDError):
            raise answer
        bucket, good, bad = answer
        slot = self._slots[k % len(self._slots)].buf
        views = self._reader.arrays(bucket, self._rows, slot)
        return Read({name: view.copy() for name, view in views.items()}, good, bad)

    def close(self) -> None:
        """Ends the processes and gives the memory back."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(_SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
        for slot in self._slots:
            slot.close()
            slot.unlink()


def _death(process: BaseProcess) -> DataError:
    process.join(_SECONDS_TO_END)
    code = process.exitcode or 0
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}; if memory ran out, read in threads only"
    else:
        how = f"ended with code {code}; its own error stands above, or else: {_GUARD}"
    return DataError(f"a process that reads images {how}")


def check_main() -> None:
    """Checks that this process is not one that a worker's start made of an unguarded script.

    Raises:
        ConfigError: if it is.
    """
    # What multiprocessing itself goes by; it would refuse later, and less clearly.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(_GUARD)


def _work(connection: Connection, work: bytes, names: list[str]) -> None:
    """A worker: reads the batches it is asked for until nobody is there to ask."""
    reader: Reader
    order: TrainOrder
    reader, order, rows = pickle.loads(work)
    slots = [SharedMemory(name) for name in names]
    try:
        while True:
            k, slot = connection.recv()
            connection.send(_read(reader, order, rows, k, slots[slot]))
    except (EOFError, OSError):
        # The main process has closed its end, or is gone.
        pass
    finally:
        reader.close()
        for shared in slots:
            shared.close()


def _read(
    reader: Reader, order: TrainOrder, rows: slice, k: int, slot: SharedMemory
) -> tuple[int, np.ndarray, Bad] | PatchGDError:
    bucket, indices = order(k, rows)
    try:
        arrays = reader.arrays(bucket, len(indices), slot.buf)
        read = reader.start(bucket, indices, arrays).result()
    except PatchGDError as error:
        return error
    return bucket, read.good, read.bad
