"""Build an output directory under another name and rename it when complete; does not know what is in it.

For an output `DIR` there is `DIR.partial/` while the run works, `DIR.lock` while it runs, and for an instant
`DIR.replaced/` while an older `DIR` is being exchanged. `DIR` itself is only ever absent or complete. A lock
file that nobody holds says that a run died, or was told to keep its partial directory: only then are
leftovers ours to delete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType

from memscrub.errors import IncompleteError, OutputError, would_repeat
from memscrub.storage.files import cache_link_roots

_IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing `place` into one sentence with advice.

    Raises:
        IncompleteError: the disk or quota is full, or the device failed.
        OutputError: the place is read-only or not ours to write.
    """
    try:
        yield
    except OSError as problem:
        name = place if problem.filename is None else problem.filename
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise IncompleteError(f"No space is left for {place}; free some space and run again.") from problem
        if problem.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise OutputError(f"{name} cannot be written ({problem.strerror}); choose another place.") from problem
        if problem.errno in _IN_THE_WAY:
            raise OutputError(f"{name} cannot be used ({problem.strerror}); choose another place.") from problem
        raise IncompleteError(f"{name} could not be read or written: {problem.strerror or problem}.") from problem


def refuse_overlap(out: Path, source: Path) -> None:
    """Raise OutputError when `out` is `source`, lies in it, or contains it, by whatever links.

    A cache snapshot counts with its whole repository: writing next to its blobs is writing into the cache.
    """
    resolved, inner = _real(out), _real(source)
    outer = inner.parent.parent if cache_link_roots(inner) else inner
    if resolved.is_relative_to(outer) or inner.is_relative_to(resolved):
        raise OutputError(f"{out} overlaps the input {source}, which is never written; choose another place.")


class PartialDirectory:
    """`DIR.partial/`, which becomes `DIR` on `commit()` and disappears otherwise.

    `overwrite` lets `commit` replace an existing checkpoint directory. `inputs` must not overlap `DIR`. Of a dead
    run's partial directory, only the files that `resume` names survive; it is asked when the lock is held. `keep`,
    set while it is open, leaves the partial directory in place when the run fails, unless it would fail in the same
    way again.

    Raises:
        OutputError: `DIR` exists, another run is writing it, it overlaps an input, or it is not writable.
        IncompleteError: the disk is full.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        inputs: Collection[Path] = (),
        resume: Callable[[Path], Collection[str]] = lambda path: (),
    ) -> None:
        # Resolving only the parent keeps a link named `out` visible, so that it is refused and not followed.
        given = Path(out)
        if given.name in ("", "..", "."):
            raise OutputError(f"{out} does not name a new directory; choose another place.")
        self.target = _real(given.parent) / given.name
        self.path = self.target.with_name(self.target.name + ".partial")
        self.overwrite, self._resume = overwrite, resume
        self.keep = False
        self.committed = False
        self._lock: int | None = None
        self._leftovers = self._exchanged = False
        self._lock_path = self.target.with_name(self.target.name + ".lock")
        self._replaced = self.target.with_name(self.target.name + ".replaced")
        for source in inputs:
            for place in (self.target, self.path, self._replaced):
                refuse_overlap(place, source)

    def __enter__(self) -> PartialDirectory:
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        try:
            with disk_errors(self.target):
                if self._leftovers:
                    self._recover()
                self._refuse_replaced()
                self._refuse_existing()
                self._clear()
        except BaseException:  # an interrupt too must let go of the lock
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self.committed and not (self.keep and error is not None and not would_repeat(error)):
                # The reason for the failure must reach the user, not a second failure while cleaning up;
                # what stays behind is removed by the next run.
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            self._release()

    def commit(self) -> Path:
        """Make every byte durable, then rename to `DIR` and return it.

        Raises:
            OutputError: `DIR` has appeared meanwhile, or cannot be replaced.
            IncompleteError: the disk is full or failed; `DIR` is as it was.
        """
        if self._lock is None or self.committed:
            raise OutputError(f"{self.target} is not being written.")
        with disk_errors(self.target):
            _sync_tree(self.path)
            self._refuse_replaced()
            self._refuse_existing()
            try:
                if self.target.is_dir():
                    self._exchanged = True
                    os.rename(self.target, self._replaced)
                os.rename(self.path, self.target)
            except BaseException:  # an interrupt in either of the two renames must not lose the old directory
                self._recover()
                raise
            self.committed = True
            _sync(self.target.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return self.target

    def sync(self) -> None:
        """Make every byte of the partial directory durable."""
        with disk_errors(self.target):
            _sync_tree(self.path)

    def _acquire(self) -> None:
        """Hold an exclusive lock on `DIR.lock` until `_release`; the system drops it when we die."""
        while True:
            self._leftovers = os.path.lexists(self._lock_path)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise OutputError(
                    f"Another run is writing {self.target}; wait for it or choose another place."
                ) from None
            except OSError:
                os.close(lock)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.lstat(self._lock_path)):
                    self._check_lock(lock)
                    self._lock = lock
                    return
            os.close(lock)  # its previous holder deleted the file between our open and our lock: try the new one

    def _check_lock(self, lock: int) -> None:
        # Ours are empty. `--out poetry` must not take over, and in the end delete, somebody's `poetry.lock`.
        if os.fstat(lock).st_size:
            os.close(lock)
            raise OutputError(f"{self._lock_path} is not a lock of memscrub; choose another place.")

    def _release(self) -> None:
        if self._lock is not None:
            # The file stays behind as the mark of directories that the next run may delete.
            left = (self._leftovers and self.path.exists()) or (self._exchanged and self._replaced.exists())
            if not left:
                with contextlib.suppress(OSError):
                    self._lock_path.unlink()
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Finish or undo an exchange of directories that a crash interrupted."""
        if self._replaced.is_dir():
            if os.path.lexists(self.target):
                shutil.rmtree(self._replaced)
            else:
                os.rename(self._replaced, self.target)

    def _refuse_replaced(self) -> None:
        # An exchange ends with its deletion: one that is not left of an exchange of ours is somebody's own.
        if os.path.lexists(self._replaced):
            raise OutputError(f"{self._replaced} is in the way, and no run of memscrub left it; rename or delete it.")

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise OutputError(f"{self.target} exists already; choose another place, or replace it with --overwrite.")
        if self.target.is_symlink() or not self.target.is_dir():
            raise OutputError(f"{self.target} is not a directory; choose another place.")
        # Overwriting deletes: a mistyped `--out ~` must not.
        known = any((self.target / name).is_file() for name in ("config.json", "memscrub-report.json"))
        if not known and any(self.target.iterdir()):
            raise OutputError(f"{self.target} holds something other than a checkpoint; choose another place.")

    def _clear(self) -> None:
        """Start from an empty partial directory, except for the files to resume from."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(f"{self.path} is in the way; delete it.")
        self.path.mkdir(exist_ok=True)
        if not self._leftovers and any(self.path.iterdir()):
            raise OutputError(f"{self.path} exists, and no run of memscrub left it; delete it.")
        self._leftovers = True
        kept = frozenset(self._resume(self.path))
        for folder, folders, files in os.walk(self.path, topdown=False):
            for name in (*folders, *files):
                entry = Path(folder) / name
                if entry.is_dir() and not entry.is_symlink():
                    if not any(entry.iterdir()):
                        entry.rmdir()
                elif entry.relative_to(self.path).as_posix() not in kept or entry.is_symlink():
                    entry.unlink()


def _real(path: Path) -> Path:
    # Path.resolve() raises RuntimeError for a circle of links before Python 3.13; this never raises.
    return Path(os.path.realpath(path))


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
