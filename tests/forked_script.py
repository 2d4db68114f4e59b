"""Runs scripts of the repository in processes forked from one that has imported torch.

Each is a process of its own, with its arguments, folder, environment and exit code, but it starts
in a tenth of a second instead of five. Imports nothing of the project: the script does.
write_changed_training makes a script like one of the repository, but with other losses.
"""

import inspect
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
# Not this module: torch-fidelity installs a package `tests`, too.
FORKSERVER.set_forkserver_preload([
    "torch", "torchvision", "denoising_diffusion_pytorch", "torch.utils.tensorboard",
    "matplotlib.pyplot",
])  # fmt: skip


class ForkedScript:
    """A running script on the CPU, with the methods of subprocess.Popen that the tests need.

    script: a file of the repository, or a path.
    """

    def __init__(self, folder: Path, script: str | Path, *arguments: str, **environment: str):
        command = [str(Path(__file__).parent.parent / script), *arguments]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
        pipes = [FORKSERVER.Pipe(duplex=False) for _ in ("stdout", "stderr")]
        writers = [writer for _, writer in pipes]
        arguments = command, str(folder), environment, writers
        self.process = FORKSERVER.Process(target=run, args=arguments)
        self.process.start()
        for writer in writers:
            writer.close()
        pool = ThreadPoolExecutor(2)
        self.texts = [pool.submit(read_all, reader) for reader, _ in pipes]
        pool.shutdown(wait=False)

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs; -N after signal N."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the script."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kills the script, if it still runs, and waits for its end."""
        self.process.kill()
        self.process.join()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Waits for the end and returns stdout and stderr; TimeoutError if it takes longer."""
        self.process.join(timeout)
        is_late = self.process.exitcode is None
        self.kill()
        output, errors = (text.result() for text in self.texts)
        if is_late:
            raise TimeoutError(output + errors)
        return output, errors


def start_two_ranks(folder: Path, script: str | Path, *arguments: str) -> list[ForkedScript]:
    """Starts a script on two ranks, as a launcher does, but faster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        ForkedScript(folder, script, *arguments, RANK=rank, LOCAL_RANK=rank, **common)
        for rank in ("0", "1")
    ]


def finish(ranks: list[ForkedScript]) -> str:
    """Returns what ranks that must succeed print."""
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return "".join(output for output, _ in outputs)


def read_all(reader: Connection) -> str:
    """Reads what a process writes into a pipe until all writers have ended."""
    with reader, open(os.dup(reader.fileno())) as file:
        return file.read()


def run(
    command: list[str], folder: str, environment: dict[str, str], outputs: list[Connection]
) -> None:
    """Becomes the script: runs in the forked process."""
    for stream, writer in enumerate(outputs, start=1):
        os.dup2(writer.fileno(), stream)
        writer.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


CHANGED_TRAINING = """
import functools
import os
import runpy
import signal
import time

from engine import cli  # first: sets what torch reads

from ddpm_model import DDPMModel

forward = DDPMModel.forward
calls = 0


@functools.wraps(forward)
def changed_forward(*args, **kwargs):
    global calls
    calls += 1
    return {function}(forward(*args, **kwargs), calls)


DDPMModel.forward = changed_forward
"""


def write_changed_training(
    folder: Path, change: Callable[[Any, int], Any], script: str = "train.py"
) -> Path:
    """Writes a script like one of the repository, but its n-th loss is change(loss, n).

    change: a function of a module, which may use os, signal and time.
    """
    path = folder / "changed_training.py"
    start = CHANGED_TRAINING.format(function=change.__name__)
    end = f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    path.write_text(f"{start}\n\n{inspect.getsource(change)}\n\n{end}\n")
    return path
