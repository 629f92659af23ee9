"""One run at a time writes a run folder: rank 0 holds a lease on it, a small file whose time it renews.

A lock of the system (fcntl, flock) would go with its process, too, but on storage that several machines share it works
as that is mounted: NFS with `nolock` and Lustre without `flock` lock nothing between machines, or refuse, and NFS 3
keeps the lock of a machine that was lost until that machine is back. The lease needs files that others see, and nothing
else. A holder on the same machine is asked for by process: a dead one is replaced at once. A holder elsewhere is
watched: one that has not renewed its lease for EXPIRY_S is dead. Clocks are not compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ross.checkpoint.agreement import run_on_rank_0
from megatron_ross.config.shown import shown
from megatron_ross.threads import in_thread

LEASE_NAME = "lease.json"
BEAT_S, EXPIRY_S = 5.0, 60.0
_POLL_S, _SETTLE_S = 0.5, 1.0
_MAX_BYTES = 4096
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links says."""


class LeaseError(ValueError):
    """Another run writes the folder; names its machine and process."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: a process of a machine. `born` tells it from a later one of the same number."""

    token: str
    host: str
    machine: str
    pid: int
    born: str

    @classmethod
    def myself(cls) -> Holder:
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _born(os.getpid()) or "")

    def is_here(self) -> bool:
        """On this machine and among the processes that this one sees, so that `is_alive` knows."""
        return bool(self.machine) and (self.host, self.machine) == (socket.gethostname(), _machine())

    def is_alive(self) -> bool:
        """Of a process here: it is there, and no zombie. One that may not be looked at counts as alive."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return _born(self.pid) in (self.born, None)
        return _born(self.pid) == self.born


class Lease:
    """The right to write a run folder, from `acquire` to `release`.

    Args:
        folder: the run folder; it must exist.
        expiry_s: how long a holder on another machine may be silent.
    """

    def __init__(self, folder: Path, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S) -> None:
        self.path = folder / LEASE_NAME
        self._beat_s, self._expiry_s = beat_s, expiry_s
        self._me = Holder.myself()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; waits up to `expiry_s` where a holder on another machine gives no sign of life.

        Raises:
            LeaseError: somebody else holds it. OSError: the folder cannot be written.
        """
        if not self._create():
            holder = self._read()
            if holder is None:  # gone, no lease, or just being written where there are no links
                time.sleep(_SETTLE_S)
                holder = self._read()
            if holder is not None and self._is_held(holder):
                raise LeaseError(_refusal(self.path, holder))
            self._replace()
            time.sleep(_SETTLE_S)  # who else found the same dead holder has written, too; the last one has it
            holder = self._read()
            if holder is None or holder.token != self._me.token:
                raise LeaseError(_refusal(self.path, holder))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give it back. Nothing is raised, and storage that does not answer is not waited for: who comes next finds out
        that this process is gone."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(self._beat_s)
        with contextlib.suppress(OSError, TimeoutError):
            in_thread(self._give_back, "lease").result(self._beat_s)

    def _give_back(self) -> None:
        holder = self._read()
        if holder is not None and holder.token == self._me.token:
            self.path.unlink()

    def _text(self) -> str:
        return json.dumps(asdict(self._me)) + "\n"

    def _replace(self) -> None:
        """Write the lease over that of a dead holder, through a file of its own."""
        partial = self._partial
        partial.write_text(self._text())
        os.replace(partial, self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{LEASE_NAME}.{self._me.token}")

    def _create(self) -> bool:
        """Write the lease where there is none, whole from the first moment on."""
        partial = self._partial
        try:
            partial.write_text(self._text())
            os.link(partial, self.path)
        except FileExistsError:
            holder = self._read()  # a server that was asked twice refuses what it has done
            return holder is not None and holder.token == self._me.token
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._create_without_links()
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _create_without_links(self) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _read(self) -> Holder | None:
        """None: there is no lease, or a file that is none."""
        return _look(self.path)[0]

    def _is_held(self, holder: Holder) -> bool:
        """Whether it is alive, by its process here or by a new time of its lease."""
        if holder.is_here():
            return holder.is_alive()
        seen, deadline = _look(self.path), time.monotonic() + self._expiry_s
        print(
            f"{self.path}: held by process {holder.pid} of {shown(holder.host)}; it has {self._expiry_s:g} s to give a "
            "sign of life",
            file=sys.stderr,
            flush=True,
        )
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            now = _look(self.path)
            if now[0] is None:
                return False
            if now != seen:
                return True
        return False

    def _renew(self) -> None:
        """A new time every few seconds. A disk that is full has room for that; one that does not answer, later."""
        while not self._over.wait(self._beat_s):
            with contextlib.suppress(OSError):
                holder = self._read()
                if holder is None:
                    self._create()
                elif holder.token != self._me.token:
                    _leave(self.path, holder)
                else:
                    os.utime(self.path)


@contextlib.contextmanager
def leased(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Inside, rank 0 holds the lease of this run folder; it is given back afterwards. A collective.

    Args:
        check: called on rank 0 when it holds the lease, before anything is written; raises ValueError to give it back.

    Raises:
        CheckpointError: on every rank: another run writes there, or `check` says no.
    """
    lease = Lease(folder)

    def take() -> None:
        lease.acquire()
        check()

    try:
        run_on_rank_0(take, f"start in {folder}")
        yield
    finally:
        lease.release()


def _look(path: Path) -> tuple[Holder | None, int]:
    """Holder and time of a lease. Opened anew each time, for which NFS asks the server."""
    try:
        with path.open("rb") as file:
            text, stamp = file.read(_MAX_BYTES), os.fstat(file.fileno()).st_mtime_ns
        return _holder(json.loads(text)), stamp
    except (FileNotFoundError, ValueError):
        return None, 0


def _holder(fields: Any) -> Holder | None:
    kinds = {"token": str, "host": str, "machine": str, "pid": int, "born": str}
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        return None
    if not all(type(fields[name]) is kind for name, kind in kinds.items()):
        return None
    return Holder(**fields)


def _refusal(path: Path, holder: Holder | None) -> str:
    who = "" if holder is None else f", process {holder.pid} of {shown(holder.host)}"
    return (
        f"another run writes there{who}; stop it and start again, or save elsewhere (where no such run is alive, "
        f"remove {path})"
    )


def _leave(path: Path, holder: Holder) -> None:
    """Two runs would write the same files. The others lose this rank, and leave, too."""
    text = (
        f"error: {path} was taken by process {holder.pid} of {shown(holder.host)}, because this run had not renewed it "
        "in time; it ends, so that one run writes there\n"
    )
    os.write(2, text.encode())  # not through sys.stderr, which the main thread may hold
    os._exit(1)


def _machine() -> str:
    """The boot of this machine and its process table, by number; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process started, in ticks since the boot; empty of a zombie, None where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if words[0] in "ZX" else words[19]
