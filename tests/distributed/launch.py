"""Several processes on one CPU, as torchrun would start them: what they return, or why they failed; never a hang."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the server that the processes are forked from.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "dowser_peft", "tests.models"])


class RankError(AssertionError):
    """A rank failed; its traceback is in the message."""


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout_s: float = 300.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """What ``function(*args)``, of a module that can be imported, returns on each of ``size`` ranks.

    Raises:
        RankError: if a rank raises, dies or takes longer than ``timeout_s``.
    """
    return [
        _result(rank, outcome) for rank, outcome in enumerate(outcomes(function, args, size, timeout_s, environment))
    ]


def outcomes(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    size: int = 2,
    timeout_s: float = 300.0,
    environment: dict[str, str] | None = None,
) -> list[tuple[bool, Any]]:
    """Of each rank whether ``function`` returned, and what; or the text of what it raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port of its own choice
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there, as under torchrun
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        **(environment or {}),
    }
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_main, args=(function, args, own, timeout_s, sender), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    found: dict[int, tuple[bool, Any]] = {}
    end = time.monotonic() + timeout_s
    try:
        while len(found) < size:
            left = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
            ready = wait(left, max(0.0, end - time.monotonic()))
            if not ready:
                missing = sorted(set(range(size)) - set(found))
                raise RankError(f"ranks {missing} are not done after {timeout_s:.0f} s; the others: {found}")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    found[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    found[rank] = (False, "it died")
    finally:
        for process in processes:
            process.join(5.0 if len(found) == size else 0.0)
            process.kill()
    return [found[rank] for rank in range(size)]


def _result(rank: int, outcome: tuple[bool, Any]) -> Any:
    succeeded, result = outcome
    if not succeeded:
        raise RankError(f"rank {rank}: {result}")
    return result


def _main(
    function: Callable[..., Any],
    args: Sequence[Any],
    environment: dict[str, str],
    timeout_s: float,
    sender: Connection,
) -> None:
    os.environ.update(environment)
    faulthandler.dump_traceback_later(max(1.0, timeout_s - 2.0), exit=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        outcome = True, function(*args)
    except BaseException:
        outcome = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
