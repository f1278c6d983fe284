"""Processes that share trainings: one runs the command, and tells the others what to train with it.

Process 0 works as without a launcher, and keeps a connection to each of the others. They wait for trainings, take part in
them, and end when it ends: what they write are shards in memory. So a process that is gone is seen at once, whatever
libraries wait for.
"""

import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import SimpleQueue
from typing import Any

from ...editing.errors import ExciseError, RequestError, one_line
from .ranks import LAUNCH, Launch, stops

LONG = timedelta(days=20)
"""How long a process waits for others, which may measure for days; one that is gone is seen at once all the same. The
library counts milliseconds in 31 bits."""
ADDRESS, TRAIN, STOP, FAILED = "excise address", "train", "stop", "failed"
SECONDS_TO_TELL = 5.0
"""In which process 0 has noticed by itself that another one is gone; launchers kill it after 30."""
NOT_SHARED = "this run has no whole weights to train, which alone are shared by processes"


@dataclass
class Team:
    """The other processes, as process 0 sees them."""

    launch: Launch
    store: Any
    """In which processes find each other."""
    others: dict[int, Connection]
    """By rank, from 1."""
    say: Callable[[str], None]
    """Writes a line to the terminal."""
    trainings: int = 0
    in_training: bool = False
    lost: dict[int, str] = field(default_factory=dict)
    """What processes that are gone said last, by rank."""
    someone_is_gone: threading.Event = field(default_factory=threading.Event)

    def tell(self, kind: str, what: Any = None) -> None:
        """Send all others a message."""
        # Not by the connection's own pickling, to which torch has added that tensors stay with the sender.
        # Twice, because the other process hears it in a thread, and imports what it names where it works.
        message = pickle.dumps((kind, pickle.dumps(what)))
        for connection in self.others.values():
            with suppress(OSError):
                connection.send_bytes(message)

    def listen(self) -> None:
        """Notice others that are gone, and end this process too where a library goes on waiting for them."""
        connections = {id(connection): rank for rank, connection in self.others.items()}
        while True:
            for connection in wait(list(self.others.values())):
                rank = connections[id(connection)]
                try:
                    self.lost[rank] = pickle.loads(self.others[rank].recv_bytes())[1]
                except (EOFError, OSError):
                    self.lost.setdefault(rank, "")
            self.someone_is_gone.set()
            time.sleep(SECONDS_TO_TELL)
            if self.in_training:
                self.say(self.who_is_gone())
                os._exit(1)
            return

    def who_is_gone(self) -> str:
        """In words, with its last; of several one that said something."""
        for rank, words in sorted(self.lost.items(), key=lambda item: not item[1]):
            of = f"process {rank} of {self.launch.count}"
            return f"{of} stopped: {words}" if words else f"{of} {ENDED}"
        return ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A training; where it ends because another process did, the error says so.

        Raises:
            ExciseError: Another process is gone.
        """
        self.in_training = True
        try:
            yield
        except ExciseError:
            raise
        except BaseException as error:
            about_others = is_about_others(error)
            # A process that is ended by the launcher, or by the user with all others, is interrupted a moment later.
            self.someone_is_gone.wait(
                SECONDS_TO_TELL / 2 if about_others else 0.3 * isinstance(error, KeyboardInterrupt)
            )
            if said := self.who_is_gone():
                raise ExciseError(said) from error
            if about_others:
                raise ExciseError(f"the processes lost each other ({one_line(error, 120)}); {AGAIN}") from error
            raise
        finally:
            self.in_training = False


AGAIN = "no partial checkpoint was left. Run the same command again with --resume"
ENDED = f"ended without a word, as one that was killed does; {AGAIN}"
TEAM: ContextVar[Team | None] = ContextVar("TEAM", default=None)


def is_about_others(error: BaseException) -> bool:
    """Whether a library says that another process does not answer."""
    if type(error).__name__.startswith("Dist"):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def shared_with_others(shared: bool, say: Callable[[str], None]) -> Iterator[None]:
    """While this lasts, trainings are shared with the processes that a launcher started; without one, nothing changes.

    Args:
        shared: Whether the run has trainings that can be shared; otherwise the other processes are told to stop.
        say: Writes a line to the terminal.

    Raises:
        RequestError: The launcher's settings contradict a training that is shared.
    """
    launch = LAUNCH.get()
    if launch is None:
        yield
        return
    if launch.contradiction:
        if shared:
            raise RequestError(launch.contradiction)
        say(f"process 0 of {launch.count} works alone: {NOT_SHARED}")
        yield
        return
    team = _meet(launch, say)
    if not shared:
        team.tell(STOP, NOT_SHARED)
        say(f"process 0 of {launch.count} works alone: {NOT_SHARED}")
        yield
        return
    token = TEAM.set(team)
    try:
        yield
    finally:
        TEAM.reset(token)
        team.tell(STOP, "")


def _meet(launch: Launch, say: Callable[[str], None]) -> Team:
    store = _store(launch)
    key = secrets.token_hex(16)
    # Each of the others connects to this process alone, with the key that it finds in the store.
    with Listener(
        (socket.gethostname() if _several_machines(launch) else "localhost", 0), authkey=key.encode()
    ) as door:
        host, port = door.address
        store.set(ADDRESS, f"{host} {port} {key}")
        by_rank: dict[int, Connection] = {}
        while len(by_rank) < launch.count - 1:
            connection = door.accept()
            by_rank[int(connection.recv_bytes())] = connection
    team = Team(launch, store, by_rank, say)
    threading.Thread(target=team.listen, daemon=True).start()
    return team


def _store(launch: Launch) -> Any:
    from torch.distributed import rendezvous

    with launch.in_environment():
        store, _, _ = next(rendezvous("env://", timeout=LONG))
    return store


def _several_machines(launch: Launch) -> bool:
    return launch.variables.get("LOCAL_WORLD_SIZE", str(launch.count)) != str(launch.count)


def follow(launch: Launch, say: Callable[[str], None]) -> int:
    """Take part in the trainings of process 0 until it ends; the exit code."""
    if launch.contradiction:
        say(stops(launch.rank, launch.count, "the launcher asks for what is not shared"))
        return 0
    store = _store(launch)
    host, port, key = store.get(ADDRESS).decode().split()
    connection = Client((host, int(port)), authkey=key.encode())
    connection.send_bytes(str(launch.rank).encode())
    # From here on this process ends when process 0 ends, which alone says why.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    orders: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders, launch, say), daemon=True).start()
    from .sharded_run import take_part

    number = 0
    while True:
        order = orders.get()
        number += 1
        try:
            take_part(launch, store, number, pickle.loads(order))
        except BaseException as error:  # noqa: BLE001  whatever it is, process 0 tells it
            if not is_about_others(error):
                _fail(connection, error)
            # Process 0 sees that this one is gone, or is gone itself: then the listener says so.
            return 1


def _fail(connection: Connection, error: BaseException) -> None:
    """Tell process 0 why this one ends, which it does."""
    words = str(error) if isinstance(error, ExciseError) else f"unexpected {type(error).__name__}: {one_line(error)}"
    with suppress(OSError):
        connection.send_bytes(pickle.dumps((FAILED, words)))
    # Where all processes fail alike, process 0 says so itself meanwhile: launchers kill all others where one fails.
    time.sleep(2)
    os._exit(1)


def _listen(connection: Connection, orders: "SimpleQueue[Any]", launch: Launch, say: Callable[[str], None]) -> None:
    """Hear what process 0 says, whatever this process does meanwhile; end when it ends."""
    while True:
        try:
            kind, what = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            # Of several processes one says it.
            if launch.rank == 1:
                say(f"process 0 of {launch.count}, which writes the run, {ENDED}")
            os._exit(1)
        if kind == TRAIN:
            orders.put(what)
            continue
        if why := pickle.loads(what):
            say(stops(launch.rank, launch.count, why))
        os._exit(0)
