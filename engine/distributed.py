"""Ranks of a distributed run: started by torchrun or `accelerate launch`, one for each GPU.

When a rank dies, the launcher ends the others on every machine. This module keeps their output to
one line a machine, and lets rank 0 prepare data before the process group exists.
"""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from engine.errors import UserError
from engine.gpu_memory import is_out_of_memory

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # covers a sample grid that rank 0 samples on a CPU
SUM = torch.distributed.ReduceOp.SUM
MAX = torch.distributed.ReduceOp.MAX
T = TypeVar("T")


def launched_rank() -> int:
    """Returns this process's rank according to the launcher, 0 without one."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """Returns the number of ranks that the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_launcher() -> None:
    """Raises UserError if a launcher's variables are incomplete or invalid."""
    advice = "Start with torchrun or accelerate launch, or unset the launcher's variables"
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 1}  # with the lowest
    values = {name: os.environ[name] for name in numbers if name in os.environ}
    for name, text in values.items():
        if not text.isdecimal() or int(text) < numbers[name]:
            raise UserError(f"{name} is {text!r}, but must be at least {numbers[name]}. {advice}")
    rank = launched_rank()
    world_size = launched_world_size()
    if "LOCAL_RANK" not in values and (rank, world_size) == (0, 1):
        return  # no launcher
    if missing := [name for name in (*numbers, "MASTER_ADDR") if not os.environ.get(name)]:
        raise UserError(f"{', '.join(values)} is set without {', '.join(missing)}. {advice}")
    if rank >= world_size:
        raise UserError(f"RANK is {rank}, but must be below WORLD_SIZE, {world_size}. {advice}")


def init() -> PartialState:
    """Initializes the process group, if there is a launcher: NCCL on GPUs, else gloo.

    Makes this rank's GPU the current one. Raises UserError if there are more ranks on this machine
    than GPUs.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus <= int(os.environ.get("LOCAL_RANK", 0)):
        raise UserError(f"more ranks than GPUs: this machine has {gpus}, so start at most {gpus}")
    # On a CPU, accelerate ignores torchrun's ranks unless cpu is set.
    cpu = not gpus and launched_world_size() > 1
    state = PartialState(cpu=cpu, timeout=COLLECTIVE_TIMEOUT)
    if state.device.type == "cuda" and state.device.index is not None:
        torch.cuda.set_device(state.device)  # accelerate leaves ACCELERATE_TORCH_DEVICE's alone
    return state


def shut_down() -> None:
    """Destroys the process group, if there is one; NCCL complains at exit otherwise."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class RankLostError(UserError):
    """This rank cannot continue: another one is gone, or the launcher ends them all."""


@contextlib.contextmanager
def session(resume_hint: Callable[[], str]) -> Iterator[PartialState]:
    """A block that all ranks run; adds `resume_hint()` to the error if one dies.

    With several ranks, SIGTERM raises RankLostError here unless the block handles it itself.
    """
    state = init()
    if state.num_processes == 1:
        yield state
        return
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        yield state
    except BaseException as error:
        # The launcher's SIGTERM must not end this rank before its message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, RankLostError):
            raise UserError(f"{error}. {resume_hint()}", error.exit_code) from error
        raise
    signal.signal(signal.SIGTERM, previous)


def _stop(*_: Any) -> None:
    raise RankLostError("stopped by SIGTERM: another rank died, or the launcher was stopped", 1)


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Turns the backend's errors into RankLostError, unless memory ran out."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = f"another rank may have died: {str(error).strip() or repr(error)}"
        message = f"a collective operation failed; {reason}"
        raise RankLostError(message, 1) from error


def all_reduce(tensor: Tensor, op: torch.distributed.ReduceOp = SUM) -> None:
    """Reduces a tensor over all ranks in place."""
    with _collective():
        torch.distributed.all_reduce(tensor, op=op)


def broadcast(tensor: Tensor) -> None:
    """Copies a tensor from rank 0 to all others in place."""
    with _collective():
        torch.distributed.broadcast(tensor, src=0)


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    values = [value]
    if torch.distributed.is_initialized():
        with _collective():
            torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def print0(line: str) -> None:
    """Prints a line on rank 0 only, also before the process group is initialized."""
    if launched_rank() == 0:
        print(line, flush=True)


def rank0_first(name: str, function: Callable[[], T]) -> T:
    """Calls function() on rank 0, then on the other ranks; returns its result.

    Needs no process group, and waits for any time. name: the same on every rank, used once.
    """
    if launched_rank() > 0:
        _wait_for(name)
        return function()
    result = function()
    if launched_world_size() > 1:
        _launcher_store().set(name, "done")
    return result


def wait_for_rank0(name: str) -> None:
    """Waits for any time until rank 0 gets here, too; name: as in rank0_first."""
    rank0_first(name, lambda: None)


def from_rank0(name: str, function: Callable[[], str]) -> str:
    """Calls function() on rank 0 only and returns its text on every rank."""
    if launched_world_size() == 1:
        return function()
    if launched_rank() == 0:
        _launcher_store().set(name, function())
    _wait_for(name)
    return _launcher_store().get(name).decode()


def _wait_for(name: str) -> None:
    while not _launcher_store().check([name]):  # unlike Store.wait, it lets signal handlers run
        time.sleep(0.1)


def is_first_failure() -> bool:
    """Whether this is the first rank of its machine to report a failure."""
    try:
        check_launcher()
        if launched_world_size() == 1:
            return True
        return _launcher_store().add(f"failures/{os.environ.get('GROUP_RANK', 0)}", 1) == 1
    except (UserError, RuntimeError, OSError):  # no proper launcher, or it is gone, too
        return True


@functools.cache
def _launcher_store() -> torch.distributed.Store:
    """The key-value store through which the launcher's ranks find each other."""
    store, _, _ = next(torch.distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    return torch.distributed.PrefixStore("ddpm", store)
