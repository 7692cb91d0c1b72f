"""Tests with several processes that take a second: fork, gloo, one thread each."""

import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from parallel import comm


def run(n: int, function: Callable, *args, seconds: float = 300.0) -> list:
    """function(*args) on n CPU ranks (gloo); returns what each returned, in rank order.

    The ranks are forked, so the function may be a closure, sees what the parent has loaded or patched, and starts in
    milliseconds; never call this after the parent has used a GPU. Results are pickled. An error of any rank raises
    AssertionError with its traceback, and so does a rank that has said nothing after `seconds`.
    """
    fork = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ears, children = [], []
        for rank in range(n):
            ear, mouth = fork.Pipe(duplex=False)
            child = fork.Process(target=_child, args=(rank, n, Path(folder) / "store", mouth, seconds, function, args))
            child.start()
            mouth.close()
            ears.append(ear)
            children.append(child)
        try:
            return _verdicts(ears, time.monotonic() + seconds)
        finally:
            for child in children:
                child.kill()
                child.join()


def on_its_own() -> None:
    """First of all in a forked process: what it must not have from its parent. Threads do not survive a fork, and a
    parallel region would wait for them. The lock of progress bars is that of all who were forked, and who is killed
    while holding it keeps it."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())


def _child(rank: int, n: int, store: Path, mouth: Connection, seconds: float, function: Callable, args: tuple) -> None:
    on_its_own()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        comm.begin("gloo", seconds, init_method=f"file://{store}", rank=rank, world_size=n)
        verdict = (True, function(*args))
        comm.barrier(comm.world())
    except BaseException:
        verdict = (False, traceback.format_exc())
    mouth.send_bytes(pickle.dumps(verdict))
    os._exit(0)  # gloo's threads abort an interpreter that tears them down


def _verdicts(ears: list[Connection], deadline: float) -> list:
    """One verdict a rank. The first error ends the wait: the other ranks may hang in a collective for its sake."""
    verdicts = {}
    while len(verdicts) < len(ears):
        silent = [ear for rank, ear in enumerate(ears) if rank not in verdicts]
        ready = wait(silent, max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"no word from ranks {[ears.index(ear) for ear in silent]} before the deadline")
        for ear in ready:
            rank = ears.index(ear)
            try:
                good, verdicts[rank] = pickle.loads(ear.recv_bytes())
            except EOFError:
                good, verdicts[rank] = False, "died without a word"
            if not good:
                raise AssertionError(f"rank {rank} of {len(ears)}: {verdicts[rank]}")
    return [verdicts[rank] for rank in range(len(ears))]
