"""Own one server process: start it, wait for its answer, pause, kill, restart and stop it.

Laws: a process outlives neither its owner object's `stop()` nor the Python process that started
it, however that one ends; nothing is ever signalled but the pid that was started here; a restart
keeps the command line, and with it ports and data.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.servers.ports import can_listen, listening_ports

# The child asks for KILL on its parent's death and then becomes the server under the same pid.
# Done after exec and not in a preexec_fn: forking Python code in a process with gRPC threads hangs.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerStartError(RuntimeError):
    """A server did not come up; the message ends with the last lines of its log."""


class ManagedProcess:
    """One server process in `folder`, its output in `folder/<name>.log`."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        ports: Sequence[int] = (),
        ready: Callable[[], bool] | None = None,
        ready_timeout: float = 180.0,
        stop_grace: float = 15.0,
    ) -> None:
        """`ready` is asked until it is true; OSError and TimeoutError from it mean "not yet".

        `env` is laid over this process's environment. All of `ports` must be free at each start
        and listened on by the started process itself before it counts as ready.
        """
        self.name = name
        self.folder = folder
        self.log_path = folder / f"{name}.log"
        self._argv = [str(part) for part in argv]
        self._env = dict(env or {})
        self._ports = tuple(ports)
        self._ready = ready
        self._ready_timeout = ready_timeout
        self._stop_grace = stop_grace
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running process's id; RuntimeError when it was never started."""
        if self._child is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit code (negative: ended by that signal); None while running or never started."""
        return None if self._child is None else self._child.poll()

    def set_env(self, env: Mapping[str, str]) -> None:
        """Lays this over its environment, from the next start on."""
        self._env |= env

    def start(self) -> Self:
        """Spawn and wait until it answers; ServerStartError otherwise, with nothing left behind."""
        self.spawn()
        self.wait_ready()
        return self

    def spawn(self) -> None:
        """Start without waiting, so that several servers can start side by side."""
        if self.running:
            raise RuntimeError(f"{self.name} is already running as pid {self.pid}")
        self._wait_ports_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._child = _spawn_from_lasting_thread(
                self._argv, self._env, self.folder, log.fileno()
            )
        _started.append(self)

    def wait_ready(self) -> None:
        """Wait for the spawned process to answer; stops it and raises ServerStartError if not."""
        deadline = time.monotonic() + self._ready_timeout
        while True:
            if not self.running:
                raise ServerStartError(
                    f"{self.name} ended with code {self.returncode} before it was ready;"
                    f" see {self.log_path}\n{self.log_tail()}"
                )
            if self._is_ready():
                return
            if time.monotonic() > deadline:
                self.stop()
                raise ServerStartError(
                    f"{self.name} was not ready within {self._ready_timeout:.0f} s;"
                    f" see {self.log_path}\n{self.log_tail()}"
                )
            time.sleep(0.1)

    def stop(self, grace: float | None = None) -> int | None:
        """TERM, after `grace` seconds KILL; returns the exit code. Nothing happens if not running.

        A paused process is resumed first: it could not act on TERM.
        """
        if self._child is None:
            return None
        if self.running:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            try:
                self._child.wait(self._stop_grace if grace is None else grace)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
        code = self._child.wait()
        if self in _started:
            _started.remove(self)
        return code

    def kill(self) -> None:
        """`kill -9` and reap."""
        if self._child is not None:
            self._signal(signal.SIGKILL)
            self._child.wait()
            if self in _started:
                _started.remove(self)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)
        # On a busy machine it may still run for a moment after the signal was sent.
        deadline = time.monotonic() + 10
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, f"{self.name} does not stop"
            time.sleep(0.01)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self, *, hard: bool = False) -> None:
        """Stop (`hard`: `kill -9`) and start again on the same ports and data."""
        if hard:
            self.kill()
        else:
            self.stop()
        self.start()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines the process wrote, newest run last."""
        try:
            text = self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _is_ready(self) -> bool:
        if not listening_ports(self.pid).issuperset(self._ports):
            return False
        if self._ready is None:
            return True
        try:
            return self._ready()
        except (OSError, TimeoutError):
            return False

    def _wait_ports_free(self) -> None:
        # A process killed a moment ago frees its sockets shortly after it is reaped.
        deadline = time.monotonic() + 5
        while taken := [port for port in self._ports if not can_listen(port)]:
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"{self.name} cannot start: ports {taken} are held by another process;"
                    " end that process, then start again"
                )
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


_SpawnResult = subprocess.Popen[bytes] | BaseException
_SpawnOrder = tuple[list[str], dict[str, str], Path, int, "queue.SimpleQueue[_SpawnResult]"]

_started: list[ManagedProcess] = []
_spawner_lock = threading.Lock()
_spawn_orders: queue.SimpleQueue[_SpawnOrder] | None = None


def _spawn_from_lasting_thread(
    argv: list[str], env: dict[str, str], folder: Path, log: int
) -> subprocess.Popen[bytes]:
    # "Parent's death" means the death of the thread that forked: a server started from a
    # short-lived worker thread would be killed with it. One daemon thread starts them all.
    global _spawn_orders
    with _spawner_lock:
        if _spawn_orders is None:
            _spawn_orders = queue.SimpleQueue()
            threading.Thread(
                target=_serve_spawns, args=(_spawn_orders,), name="spawner", daemon=True
            ).start()
    answer: queue.SimpleQueue[_SpawnResult] = queue.SimpleQueue()
    _spawn_orders.put((argv, env, folder, log, answer))
    result = answer.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _serve_spawns(orders: queue.SimpleQueue[_SpawnOrder]) -> None:
    while True:
        argv, env, folder, log, answer = orders.get()
        try:
            answer.put(
                subprocess.Popen(
                    [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv],
                    env={**os.environ, **env},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Ctrl-C in a terminal must reach the owner alone: it stops servers in order.
                    start_new_session=True,
                )
            )
        except Exception as error:
            answer.put(error)


def _stop_all() -> None:
    for process in reversed(_started.copy()):
        with contextlib.suppress(Exception):
            process.stop(grace=5)


atexit.register(_stop_all)
