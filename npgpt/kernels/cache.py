"""Where compiled kernels are kept, so that the next process need not compile them: only jit.py, with Numba, needs it.

A file's kernels have a folder of their own, which nobody but the user can write to (private.py), because what lies in
it is run.  It is named after all that the kernels are made of: Numba itself notices a change in their own file only.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import llvmlite
import numba
from numba.core import caching
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys

from npgpt.kernels.permission import amx_is_permitted
from npgpt.kernels.private import NotPrivate, private_folder
from npgpt.machine import cache_folder

ROOT = Path(__file__).parents[2]
_IMPORT = re.compile(rb"\n(?:from|import) (npgpt[\w.]*)(?: import (\([^)]*\)|.*))?")
_SETTING = re.compile("(?!CACHE|NUMBA)[A-Z_]+")


@functools.cache
def _read(path):
    """A hash of a file's content, and the files of npgpt that it imports at its top."""
    raw, imported = path.read_bytes(), set()
    for module, names in _IMPORT.findall(b"\n" + raw):
        place = ROOT.joinpath(*module.decode().split("."))
        if (file := place.with_suffix(".py")).is_file():
            imported.add(file)
        else:
            files = (place / f"{name.decode()}.py" for name in re.findall(rb"\w+", names))
            imported.update(filter(Path.is_file, files))
    return hashlib.sha256(raw).digest(), imported


def kernel_sources(file):
    """path -> hash of the files whose change may change a kernel that stands in a file, or how it is kept.

    They are itself, jit.py, compiler.py, this one, and of those that it imports, and so on, the ones that import
    jit.py: no other can hold a helper.  What a kernel is made of comes from nowhere else.
    """
    jit, *others = (ROOT / "npgpt" / "kernels" / name for name in ("jit.py", "compiler.py", "cache.py"))
    always = {file, jit, *others}
    found, todo = {}, [*always]
    while todo:
        path = todo.pop()
        content, imported = _read(path)
        if path not in found and (path in always or jit in imported):
            found[path] = content
            todo += imported
    return found


def _key(file):
    """A hash of all that a kernel in a file is made of: sources, Numba, and settings but for places and threads."""
    settings = [item for item in vars(numba.config).items() if _SETTING.fullmatch(item[0])]
    wanted = os.environ.get("NPGPT_BFLOAT16", "")
    may_use_amx = wanted == "amx" or (wanted == "" and amx_is_permitted())  # (else memory stands for its registers)
    digest = hashlib.sha256(repr((numba.__version__, llvmlite.__version__, sorted(settings), may_use_amx)).encode())
    for _, content in sorted(kernel_sources(file).items()):
        digest.update(content)
    return digest.hexdigest()[:16]


_said = set()


def _say(kind, text):
    """Tell of something about the cache, once of each kind."""
    if kind not in _said:
        _said.add(kind)
        with contextlib.suppress(OSError):  # behind standard error there may be a full disk
            print(f"npgpt: {text}", file=sys.stderr, flush=True)


@functools.cache
def _kernel_folder(file):
    """Folder of the compiled kernels of a file, or None where there is none: then they compile anew each time."""
    if not file.is_file():
        if not Path(__file__).is_file():
            _say("zip", f"the kernels compile anew in each process, because {ROOT} is not a folder: unpack it")
        return None
    base = Path(os.path.expanduser(os.environ.get("NUMBA_CACHE_DIR") or cache_folder()))
    try:
        folder = private_folder(base / f"kernels-{_key(file)}")
        probe = folder / f"probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return folder
    except NotPrivate as error:
        words = f"{error}, or set NUMBA_CACHE_DIR to a folder of your own"
        _say("private", f"the kernels compile anew in each process, because {words}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say("kept", f"the kernels cannot be kept in {base}: {error.strerror}; they compile anew each time")
    return None


def keep(kernel):
    """Have what Numba compiles for a kernel kept in the folder for its file; in no other, if there is none."""
    if (folder := _kernel_folder(Path(kernel.py_func.__code__.co_filename))) is not None:
        kernel._cache = _KernelCache(kernel.py_func, folder)


class _KernelFiles(caching.IndexDataCacheFile):
    """Numba's files for one kernel, each named after the key that Numba would look up in an index.

    Processes that start together race for an index: it may name a file that has another kernel's code by then.
    A file ends in a hash of what it holds, so that no damaged one is read.
    """

    def _name(self, key):
        return f"{self._index_name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def save(self, key, data):
        self._save_data(self._name(key), data)

    def load(self, key):
        if not (path := Path(self._data_path(self._name(key)))).exists():
            return None
        raw = path.read_bytes()
        if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
            raise ValueError(f"{path.name} is damaged")
        return self._load_data(path.name)

    @contextlib.contextmanager
    def _open_for_write(self, path):
        with super()._open_for_write(path) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


class _KernelCache:
    """Numba's cache of one kernel, which no error in it keeps from running: then it compiles anew."""

    def __init__(self, function, folder):
        self._function, self._folder, self._made = function, folder, None

    def _cache(self):
        """Numba's, made when a kernel is first called: Numba tries with a file whether it can write to the folder."""
        with global_compiler_lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self):
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(self._folder)  # read here; a user's own functions keep theirs
        try:
            cache = caching.FunctionCache(self._function)
        except RuntimeError:  # Numba has found no folder that it can write to
            return caching.NullCache()
        finally:
            numba.config.CACHE_DIR = before
        if os.path.dirname(cache.cache_path) != str(self._folder):  # Numba took a folder that nobody has checked
            return caching.NullCache()
        cache._cache_file = _KernelFiles(cache.cache_path, cache._impl.filename_base, None)
        return cache

    def __getattr__(self, name):
        return getattr(self._cache(), name)

    def load_overload(self, signature, context):
        """As Numba's, but without all that compiling needs: that alone would take 70 ms."""
        try:
            if isinstance(cache := self._cache(), caching.NullCache):
                return None
            rtsys.initialize(context)  # what compiled kernels call
            with cache._guard_against_spurious_io_errors():  # Windows refuses a file that others read
                return cache._load_overload(signature, context)
        except Exception as error:  # Numba's, of pickle, of LLVM: whatever is wrong with what lies there
            _say("read", f"compiled kernels in {self._folder.parent} cannot be read: {error}; they compile anew")
            return None

    def save_overload(self, *args):
        try:
            self._cache().save_overload(*args)
        except Exception as error:
            why = getattr(error, "strerror", None) or error
            _say("kept", f"the kernels cannot be kept in {self._folder.parent}: {why}; they compile anew each time")
