"""Replace a file by another as a whole: who looks sees the old one or the new one, whatever happens."""

import errno
import os
import platform
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name in a folder of its own beside `path`; what is written there becomes `path`, if nothing is raised.

    A symbolic link stays one, and its target is replaced. What processes left behind that were killed meanwhile is
    removed: all that is in their folders, as writers have unfinished files of their own.

    Raises:
        OSError: the file cannot be there: no folder, no regular file, or one that is read-only; or the disk is full.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target, str(path))
    _remove_leftovers(target.parent)
    folder = target.with_name(f".ocs.{_here()}.{os.getpid()}.{threading.get_ident()}.partial")
    partial = folder / target.name
    try:
        with naming(path):
            folder.mkdir(exist_ok=True)
            partial.touch()
            if mode is None:
                mode = stat.S_IMODE(partial.stat().st_mode)  # who writes there might make another, private one
            yield partial
            sync(partial)
            partial.chmod(mode)
            partial.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(target.parent)


@contextmanager
def naming(path: str | os.PathLike[str], what: str = "it cannot be written") -> Iterator[None]:
    """Make of an error of the system one that says which file was to be written: a full disk does not.

    Libraries and compilers have such errors, too, and tell of them in their own.
    """
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None or str(error).startswith(f"{os.fspath(path)}: "):
            raise
        kind = next(each for each in type(found).__mro__ if each.__module__ == "builtins")
        made = kind(f"{os.fspath(path)}: {what} ({found})")
        made.errno = found.errno
        raise made from error


def system_error(error: Exception) -> OSError | None:
    """Find the error of the system that another one tells of: a line has the system's words or, from Rust, number."""
    if isinstance(error, OSError):
        return error
    for line in str(error).splitlines():
        number = re.search(r"\(os error (\d+)\)", line)
        codes = [int(number[1])] if number else [code for words, code in _FULL.items() if words in line]
        if codes:
            found = OSError(line.strip())
            found.errno = codes[0]
            return found
    return None


_FULL = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)}
_FULL["File size limit exceeded"] = errno.EFBIG  # the signal that a compiler is ended by


def _mode_of(target: Path, shown: str) -> int | None:
    """Tell the permissions of the file that is to be replaced, None where there is none yet; refuse all else."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{shown}: there is no folder {target.parent}")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{shown}: it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(f"{shown}: it is no regular file but a device, pipe, socket or circular link: give another name")
    if not mode & 0o222 or not os.access(target, os.W_OK):  # root may write to any
        raise PermissionError(f"{shown}: it is read-only: make it writable, or give another name")
    return stat.S_IMODE(mode)


def _here() -> str:
    """Name where the numbers of processes are those that we see: a host, and there a container."""
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return f"{platform.node()[:60]}-{namespace}"


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that are no more, of this machine, were writing when they were killed."""
    pattern = re.compile(rf"\.ocs\.{re.escape(_here())}\.(\d+)\.\d+\.partial")
    with suppress(PermissionError):  # a folder that may be written but not read
        for found in filter(None, map(pattern.fullmatch, os.listdir(folder))):
            if not _is_alive(int(found[1])):
                shutil.rmtree(folder / found[0], ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the system lets us."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


class FolderLock:
    """Keep all others who would take it out of a folder until this is closed or the process ends, where locks are."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> None:
        """Take a folder that is there; a BlockingIOError where another has it."""
        import fcntl

        if self._descriptor is not None:
            return
        try:
            self._descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: another process is writing there: wait, or give another folder") from None
        except OSError:  # no locks there, or it may be written but not read
            pass

    def close(self) -> None:
        """Let the folder go, whoever was forked meanwhile and has it open, too."""
        import fcntl

        if self._descriptor is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None
