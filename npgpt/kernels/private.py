"""Folders for files that run code when they are read: nobody but the user may be able to put any there."""

import contextlib
import os
import stat
from pathlib import Path

from npgpt.machine import cache_folder


class NotPrivate(Exception):
    """Others could change what lies in a folder; says how, and what helps."""


def private_folder(path):
    """The path, without links, of a folder that nobody else can put anything into; made if it is missing.

    Numba's index of kernels, a pickle, is a file that runs code when it is read.  On POSIX:

    - The folder is the user's own, and nobody else can write to it.  Made here, it has mode 0700.  So nobody else
      reaches what lies in it either, whatever mode that has.
    - Whoever can write to a folder above can put another folder in its place, even after it was looked at.  So every
      folder and link on the way, from / on, belongs to the user or to the system, and no folder on the way is writable
      by others.  A sticky one, such as /tmp, may be: only the owner of a file or folder in it can rename that.  A link
      of the user's own, such as ~/.cache -> /big/cache, is as good as a folder.
    - Older versions left the mode to the umask.  A folder that the group can write to is therefore emptied, unread, and
      closed.  No usual umask opens a folder to everybody: such a folder is refused.

    Raises NotPrivate, or OSError where there can be no folder.
    """
    path = Path(path).absolute()
    if not hasattr(os, "geteuid"):  # Windows
        path.mkdir(parents=True, exist_ok=True)
        return path
    folder = _way(path.parent) / path.name
    status = _made(folder)
    if status.st_uid != os.geteuid():
        raise NotPrivate(f"{folder} belongs to another user: remove it")
    if not stat.S_ISDIR(status.st_mode):
        raise NotPrivate(f"{folder} is not a folder: remove it")
    if status.st_mode & stat.S_IWOTH:
        raise NotPrivate(f"everybody can write to {folder}: remove it")
    if _open_to_group(folder):
        _empty_and_close(folder)
    return folder


def _made(folder):
    """The lstat of a folder or link; if nothing is there, a folder of mode 0700 is made."""
    try:
        return os.lstat(folder)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(folder, 0o700)
        return os.lstat(folder)


def _way(path):
    """The path, without links, of a folder in which nobody else can replace what is the user's own."""
    place = path if path == path.parent else _way(path.parent) / path.name
    status = _made(place)
    system = {0, os.lstat("/").st_uid}  # in a user namespace, root's files may show another number
    if status.st_uid not in {os.geteuid(), *system}:
        raise NotPrivate(f"{place} belongs to another user: chown it")
    if stat.S_ISLNK(status.st_mode):
        os.stat(place)  # an OSError where links go round in a circle
        return _way(place.parent / os.readlink(place))
    mode = status.st_mode
    if path == cache_folder().absolute() and status.st_uid == os.geteuid() and mode & 0o022 == 0o020:
        os.chmod(place, 0o700)  # made by an older version; what lies in it is checked before it is used
    elif (mode & 0o002 or (mode & 0o020 and not _private_group(status.st_gid))) and not mode & stat.S_ISVTX:
        raise NotPrivate(f"others can write to {place}: chmod go-w it")
    return place


def _private_group(gid):
    """Whether a group is the user's alone.  Many systems give each user a group of the same name, and umask 002."""
    import grp
    import pwd

    with contextlib.suppress(KeyError):  # a number without a name
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
        return (gid, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {user.pw_name}
    return False


def _open_to_group(folder):
    """Whether the group can write to a folder, or may reach what lies in it and write there."""
    mode = os.lstat(folder).st_mode
    return mode & (stat.S_ISVTX | 0o020) or (
        mode & 0o011 and any(file.lstat().st_mode & 0o022 for file in folder.rglob("*"))
    )


def _empty_and_close(folder):
    """Remove all that is in a folder, and give it mode 0700.  The sticky bit marks one that is not empty yet."""
    import fcntl
    import shutil

    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that has begun to use it keeps its files
            if _open_to_group(folder):
                os.fchmod(opened, 0o1700)
                for entry in folder.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
                os.fchmod(opened, 0o700)
        finally:
            os.close(opened)
    if _open_to_group(folder):  # something in it cannot be removed, another process is at it, or modes are not kept
        raise NotPrivate(f"others could write to {folder}, and it cannot be emptied now: remove it")
