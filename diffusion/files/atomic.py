"""Atomic file replacement, and locks."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:
    raise SystemExit("Windows is not supported: run this in WSL2 or in a container") from None

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and some FUSE file systems cannot sync a folder, and do not need it.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file atomically: after a kill, the old or the new content is there. With `sync`, also after a power
    failure.

    Links are followed. Special files, such as `/dev/stdout`, are written directly.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` in UTF-8. Bytes of another encoding that were read with `surrogateescape` are written back."""
    replace_bytes(path, text.encode("utf-8", "surrogateescape"))


def written_by(mark: str) -> Callable[[Path], bool]:
    """A function that tells whether a file carries the mark of the command that writes it near its beginning."""
    return lambda path: mark.encode() in path.read_bytes()[:4096]


_held: set[int] = set()
"""Open locks. Child processes must not inherit them, since they may outlive their parent."""


os.register_at_fork(after_in_child=lambda: list(map(os.close, _held)))


def lock(path: Path, warn: Callable[[str], None] = lambda message: None) -> int:
    """Lock a file, created if missing, and return its descriptor for `unlock`.

    Raises BlockingIOError if another process holds it. `warn` is called if the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # NFS only locks files opened for writing
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        warn(f"the file system of {path.parent} has no locks: make sure that no other process writes there")
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):  # its last holder removed it
        os.close(descriptor)
        return lock(path, warn)
    _held.add(descriptor)
    return descriptor


def unlock(descriptor: int) -> None:
    """Let other processes lock the file."""
    _held.discard(descriptor)
    os.close(descriptor)
