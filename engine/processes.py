"""Several processes as one: how they come together, and what the others do when one of them is lost."""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from engine.errors import UserError

# of one collective operation. Whoever waits in one may wait for a data set to be decoded by another, which takes long;
# the death of a process is noticed at once, by other means
TIMEOUT = timedelta(hours=2)
MEETING = 60.0  # seconds that the processes may take to connect to the first
PATIENCE = 5.0  # seconds in which a process may find out for itself what another one has found out
DONE, FAILED, LOST = b"d", b"f", b"l"


def join() -> PartialState:
    """All processes that `accelerate launch` or torchrun started, as this one sees them; without a launcher, itself.

    They talk through NCCL on GPUs and through gloo elsewhere. Raises UserError if they are more than the GPUs.
    """
    gpus = torch.cuda.device_count()
    started, local_rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if gpus and local_rank >= gpus:
        raise UserError(f"more processes were started than there are GPUs: this machine takes {gpus} at most")
    # without being told, the library takes the processes that torchrun starts on a CPU for so many runs of their own
    return PartialState(cpu=not gpus and started > 1, timeout=TIMEOUT)


def from_first(value: Any) -> Any:
    """The first process's value, on every process."""
    values = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def say_once(line: str) -> None:
    """Prints a line; of several processes, even if they have not come together yet, only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


@contextlib.contextmanager
def together(how_to_go_on: Callable[[], str]) -> Iterator[PartialState]:
    """A block that the processes go through together: if one of them is lost in it, all others end within a minute.

    They end with exit code 1 and one line on each machine's stderr, which names the process that was lost and ends
    with how_to_go_on(); in a block within such a block the inner one's words are used. One process alone is left alone.
    """
    processes = join()
    if processes.num_processes == 1:
        yield processes
    elif Watch.current:
        Watch.current.advice.append(how_to_go_on)
        yield processes
        Watch.current.advice.pop()  # not after a failure: the line that may follow is still about this block
    else:
        watch = Watch.current = Watch(processes, how_to_go_on)
        parting = FAILED
        try:
            yield processes
            parting = DONE
        except SystemExit:
            parting = DONE
            raise
        except RuntimeError:  # perhaps of a collective operation that lacks a process: then the watch ends this one
            time.sleep(PATIENCE)
            raise
        finally:
            watch.leave(parting)
            Watch.current = None


class Watch:
    """Ends this process if another one is lost.

    Nothing else would: a collective operation on GPUs waits for a dead process for ever, and a launcher ends only the
    processes of its own machine. Each process keeps a connection to the first one; the operating system closes it
    when the process dies, however it dies, and keep-alive packets miss a machine that is gone within half a minute.
    """

    current: "Watch | None" = None

    def __init__(self, processes: PartialState, how_to_go_on: Callable[[], str]):
        self.rank, self.world = processes.process_index, processes.num_processes
        self.local_rank = processes.local_process_index
        self.advice = [how_to_go_on]
        self.left, self.ending = False, threading.Lock()
        self.names = [""] * self.world
        torch.distributed.all_gather_object(self.names, f"{socket.gethostname()}, pid {os.getpid()}")
        self.peers = self.receive() if self.rank == 0 else self.connect()
        os.register_at_fork(after_in_child=self.close)  # a data worker must not hold its dead parent's connection open
        for peer, connection in self.peers.items():
            threading.Thread(target=self.listen, args=(peer, connection), daemon=True).start()

    def receive(self) -> dict[int, socket.socket]:
        """The first process's connections from all others, by rank."""
        both = socket.has_dualstack_ipv6()
        peers: dict[int, socket.socket] = {}
        with socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=self.world, dualstack_ipv6=both
        ) as server:
            token = secrets.token_bytes(16)
            from_first((os.environ.get("MASTER_ADDR", socket.gethostname()), server.getsockname()[1], token))
            server.settimeout(MEETING)
            while len(peers) < self.world - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(rank) for rank in range(1, self.world) if rank not in peers)
                    raise UserError(f"no connection from process {missing} within {MEETING:.0f} s", 1) from None
                with contextlib.suppress(OSError):  # whoever else knocks at an open port
                    connection.settimeout(PATIENCE)
                    hello = connection.recv(len(token) + 4)
                    if hello[: len(token)] == token:
                        peers[int.from_bytes(hello[len(token) :], "big")] = keep_alive(connection)
        return peers

    def connect(self) -> dict[int, socket.socket]:
        """Another process's connection to the first."""
        host, port, token = from_first(None)
        try:
            connection = socket.create_connection((host, port), timeout=MEETING)
            connection.sendall(token + self.rank.to_bytes(4, "big"))
        except OSError as problem:
            raise UserError(f"process {self.rank} cannot reach the first one at {host}:{port}: {problem}", 1) from None
        return {0: keep_alive(connection)}

    def listen(self, peer: int, connection: socket.socket) -> None:
        """Waits for what a peer has to say, or for the end of it."""
        try:
            news = connection.recv(5)
        except OSError:  # no answer to the keep-alive packets
            news = b""
        kind, rank = (news[:1], int.from_bytes(news[1:], "big")) if news else (LOST, peer)
        if kind != DONE and not self.left:
            self.end(kind, rank)

    def end(self, kind: bytes, rank: int) -> None:
        """Passes the news on, says it once on each machine and ends this process."""
        with self.ending:
            self.tell(kind, rank)
            if kind == FAILED:
                time.sleep(PATIENCE)  # the same error may end this process too, with its own words
                if self.left:
                    return
            if self.local_rank == (1 if rank == self.rank - self.local_rank else 0):  # the first that is left here
                what = "was lost (killed, out of memory, or its machine is down)" if kind == LOST else "failed"
                who = f"process {rank} ({self.names[rank]}; there are {self.world}, from 0 on)"
                print(f"\nerror: {who} {what}, so all stop: {self.advice[-1]()}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # the main thread may be waiting for a GPU that will never answer

    def tell(self, kind: bytes, rank: int) -> None:
        """Sends news to the peers."""
        for connection in self.peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(kind + rank.to_bytes(4, "big"))

    def leave(self, kind: bytes) -> None:
        """This process goes its own way: the others need not wait for it (DONE), or must not (FAILED)."""
        self.left = True
        self.tell(kind, self.rank)

    def close(self) -> None:
        """Closes the connections of this process, not those of the process that it was forked from."""
        for connection in self.peers.values():
            connection.close()


def keep_alive(connection: socket.socket) -> socket.socket:
    """The connection, which from now on waits without limit and fails 25 to 30 s after the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection
