"""The folder of the compiled kernels: what lies in it can run code, so nobody else may be able to put it there.

And what else becomes of it: kernels and settings of Numba's that change, damaged files, full disks.
"""

import ast
import errno
import gc
import hashlib
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from npgpt.kernels import cache, jit, private
from npgpt.kernels.private import NotPrivate, private_folder

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no owners and modes of POSIX")
ROOT = Path(__file__).resolve().parent.parent
SOMEBODY = 54321  # the number of a user that is neither this one nor root


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def refused(words):
    return pytest.raises(NotPrivate, match=re.escape(words))


def give_away(path):
    """Make another user the owner of a folder or link."""
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.lchown(path, SOMEBODY, -1)


@pytest.fixture
def base(tmp_path):
    """A folder of the user's own, without links on the way."""
    return tmp_path.resolve()


@pytest.fixture
def folder(base):
    """A folder with mode 0700 with an index of kernels in a folder of its own."""
    folder = base / "kernels"
    for place in (folder, folder / "ops"):
        place.mkdir()
        place.chmod(0o700)
    (folder / "ops" / "index.nbi").touch()
    return folder


# ---- whose folder it is, and who can write to it


def test_a_missing_folder_is_made_for_the_user_alone(base):
    before = os.umask(0)
    try:
        assert private_folder(base / "cache" / "npgpt" / "kernels") == base / "cache" / "npgpt" / "kernels"
    finally:
        os.umask(before)
    assert {mode(base / name) for name in ("cache", "cache/npgpt", "cache/npgpt/kernels")} == {0o700}


@pytest.mark.parametrize("bits", [0o700, 0o755])
def test_a_folder_that_nobody_else_can_write_to_stays_as_it_is(folder, bits):
    folder.chmod(bits)
    assert private_folder(folder) == folder
    assert mode(folder) == bits and (folder / "ops" / "index.nbi").exists()


def test_a_folder_that_everybody_can_write_to_is_refused_and_left_alone(folder):
    folder.chmod(0o777)
    with refused(f"everybody can write to {folder}: remove it"):
        private_folder(folder)
    assert mode(folder) == 0o777 and (folder / "ops" / "index.nbi").exists()


def test_a_folder_of_another_user_is_refused_for_root_too(folder):
    give_away(folder)
    with refused(f"{folder} belongs to another user"):
        private_folder(folder)


def test_a_folder_is_refused_for_a_user_that_it_does_not_belong_to(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)  # as sudo -u does, which keeps HOME
    with refused("belongs to another user"):
        private_folder(folder)
    assert (folder / "ops" / "index.nbi").exists()


def test_a_folder_in_one_of_another_user_is_refused(base):
    (base / "theirs").mkdir()
    give_away(base / "theirs")
    with refused(f"{base / 'theirs'} belongs to another user"):
        private_folder(base / "theirs" / "deep" / "kernels")
    assert not list((base / "theirs").iterdir())


@pytest.mark.parametrize("bits", [0o777, 0o757])
def test_a_folder_that_others_can_replace_is_refused(folder, base, bits):
    base.chmod(bits)
    with refused(f"others can write to {base}: chmod go-w it"):
        private_folder(folder)
    base.chmod(bits | stat.S_ISVTX)  # as /tmp is: nobody else can rename what lies in it
    assert private_folder(folder) == folder


def test_a_group_that_others_are_in_cannot_be_trusted_with_the_way(folder, base, monkeypatch):
    base.chmod(0o770)
    monkeypatch.setattr(private, "_private_group", lambda gid: False)
    with refused(f"others can write to {base}"):
        private_folder(folder)
    monkeypatch.setattr(private, "_private_group", lambda gid: gid == os.lstat(base).st_gid)
    assert private_folder(folder) == folder


def test_a_private_group_has_the_users_name_and_no_other_member(monkeypatch):
    import grp
    import pwd
    from types import SimpleNamespace as Entry

    groups = {
        7: Entry(gr_name="ada", gr_mem=[]),
        8: Entry(gr_name="ada", gr_mem=[]),
        9: Entry(gr_name="staff", gr_mem=["ada"]),
    }
    user = Entry(pw_name="ada", pw_gid=7)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: groups[gid])
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    assert private._private_group(7)
    assert not private._private_group(8)  # not the user's first one
    assert not private._private_group(10)  # without a name
    user.pw_gid = 9
    assert not private._private_group(9)
    user.pw_gid = 7
    groups[7].gr_mem = ["ada", "bob"]
    assert not private._private_group(7)


def test_what_stands_in_the_folders_place_is_refused(base):
    (base / "kernels").touch()
    with refused("is not a folder"):
        private_folder(base / "kernels")
    with pytest.raises(OSError):
        private_folder(base / "kernels" / "below")


# ---- a folder that a umask left open to the group


@pytest.mark.parametrize("bits", [0o770, 0o775, 0o2775, 0o1700])  # the last: the process that emptied it was killed
def test_a_folder_that_is_open_to_the_group_is_emptied_and_closed_once(folder, base, bits):
    (base / "mine").touch()
    (base / "precious").mkdir()
    (base / "precious" / "file").touch()
    (folder / "planted").touch()
    (folder / "ops" / "mine").symlink_to(base / "mine")
    (folder / "link").symlink_to(base / "precious")
    folder.chmod(bits)
    assert private_folder(folder) == folder
    assert mode(folder) & 0o1777 == 0o700 and not list(folder.iterdir())
    assert (base / "mine").exists() and (base / "precious" / "file").exists()
    (folder / "compiled").touch()
    assert private_folder(folder) == folder and (folder / "compiled").exists()


@pytest.mark.parametrize("name", ["ops", "ops/index.nbi"])
def test_a_folder_with_something_in_it_that_the_group_can_write_to_is_emptied(folder, name):
    (folder / name).chmod(0o775)
    assert private_folder(folder) == folder and (folder / name).exists()  # the group cannot get there
    folder.chmod(0o755)
    assert private_folder(folder) == folder and not list(folder.iterdir()) and mode(folder) == 0o700


def test_a_folder_that_cannot_be_emptied_is_refused_each_time(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError

    folder.chmod(0o770)
    monkeypatch.setattr(os, "unlink", fail)
    for _ in range(2):
        with refused(f"others could write to {folder}, and it cannot be emptied now: remove it"):
            private_folder(folder)
    assert not mode(folder) & 0o022


def test_a_folder_that_another_process_is_emptying_is_refused_until_it_has_done_so(folder):
    import fcntl

    folder.chmod(0o770)
    other = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with refused("cannot be emptied now"):
            private_folder(folder)
        assert (folder / "ops" / "index.nbi").exists()
    finally:
        os.close(other)
    assert private_folder(folder) == folder and not list(folder.iterdir())


def test_a_folder_that_another_process_has_just_emptied_is_not_emptied_again(folder, monkeypatch):
    import fcntl

    folder.chmod(0o770)
    monkeypatch.setattr(fcntl, "flock", lambda *args: folder.chmod(0o700))  # it had the lock until now
    assert private_folder(folder) == folder and (folder / "ops" / "index.nbi").exists()


def test_npgpts_own_folder_above_is_closed_and_keeps_what_it_holds(folder, base, monkeypatch):
    monkeypatch.setattr(private, "_private_group", lambda gid: False)
    monkeypatch.setattr(private, "cache_folder", lambda: base)
    (base / "corpus.txt").touch()
    base.chmod(0o775)
    assert private_folder(folder) == folder
    assert mode(base) == 0o700 and (base / "corpus.txt").exists() and (folder / "ops" / "index.nbi").exists()


def start_at_once(n, function):
    """Call function(i) in n threads at the same moment; what it returned, None where it raised NotPrivate."""
    barrier, results = threading.Barrier(n), [NotImplemented] * n

    def start(i):
        barrier.wait()
        try:
            results[i] = function(i)
        except NotPrivate:
            results[i] = None

    threads = [threading.Thread(target=start, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_trainings_that_start_at_the_same_moment_get_the_same_new_folder(base):
    for turn in range(20):
        folder = base / f"{turn}" / "npgpt" / "kernels"
        assert start_at_once(8, lambda i, folder=folder: private_folder(folder)) == [folder] * 8


def test_of_those_that_start_at_the_same_moment_one_empties_and_none_loses_a_file(base):
    def begin(i):
        file = private_folder(folder) / f"compiled-{i}"
        file.touch()
        return file

    for turn in range(20):
        folder = base / f"{turn}"
        folder.mkdir()
        for i in range(50):
            (folder / f"planted-{i}").touch()
        folder.chmod(0o770)
        files = [file for file in start_at_once(8, begin) if file is not None]
        assert files and sorted(folder.iterdir()) == sorted(files)


# ---- links


def test_a_link_of_the_users_own_is_as_good_as_a_folder(folder, base):
    (base / "home").mkdir()
    (base / "home" / ".cache").symlink_to("../other")
    (base / "other").symlink_to(base)
    assert private_folder(base / "home" / ".cache" / "kernels") == folder
    assert private_folder(base / "home" / ".cache" / "home" / ".." / "kernels").samefile(folder)


def test_a_link_that_others_can_replace_is_refused(folder, base):
    shared = base / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(base)
    (base / "link").symlink_to(shared / "link")
    shared.chmod(0o777)
    for link in (shared / "link", base / "link"):  # the second leads over the first
        with refused(f"others can write to {shared}"):
            private_folder(link / "kernels")
    shared.chmod(0o1777)
    assert private_folder(base / "link" / "kernels") == folder


def test_a_link_of_another_user_is_refused(folder, base):
    (base / "link").symlink_to(base)
    give_away(base / "link")
    with refused(f"{base / 'link'} belongs to another user"):
        private_folder(base / "link" / "kernels")


def test_a_link_in_the_folders_own_place_is_refused_and_what_it_leads_to_left_alone(folder, base):
    folder.chmod(0o770)
    (base / "link").symlink_to(folder)
    with refused(f"{base / 'link'} is not a folder"):
        private_folder(base / "link")
    assert (folder / "ops" / "index.nbi").exists()


def test_a_link_that_leads_nowhere_is_an_error_of_the_system(base):
    (base / "nowhere").symlink_to(base / "missing")
    (base / "circle").symlink_to(base / "circle")
    for name in ("nowhere", "circle"):
        with pytest.raises(OSError):
            private_folder(base / name / "kernels")
    assert not (base / "missing").exists()


# ---- what becomes of the kernels

SCRIPT = """
import numpy as np
from npgpt.kernels import jit

@jit.kernel
def double(y, x):
    for i in range(len(x)):
        y[i] = 2 * x[i]

y = np.zeros(3)
double(y, np.arange(3.0))
print(y.tolist())
"""


class Hostile:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.makedirs, (str(self.marker), 0o777, True)


def sealed(raw):
    """What a file of the cache holds, with the hash at its end: anybody can make that."""
    return raw + hashlib.sha256(raw).digest()


def start(base, script=SCRIPT, **variables):
    """Compile a kernel in a new Python, or load it; what came on standard error."""
    (base / "script.py").write_text(script, encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "NPGPT_KERNELS": "numba", "NUMBA_CACHE_DIR": str(base / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error", base / "script.py"], capture_output=True, text=True,
        env={**os.environ, **environment, **variables},
    )  # fmt: skip
    factor = float(script[script.index("y[i] = ") + 7])
    assert (done.returncode, done.stdout) == (0, f"{[0.0, factor, 2 * factor]}\n"), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with a script, and with the cache that its first start left."""
    base = tmp_path_factory.mktemp("compiled").resolve()
    assert start(base) == ""
    return base


@pytest.mark.parametrize("bits", [0o700, 0o770, 0o777], ids=oct)
def test_a_hostile_index_is_loaded_from_a_private_folder_only(compiled, bits):
    (folder,) = (compiled / "cache").iterdir()
    (index,) = folder.rglob("*.nbc")
    marker = compiled / f"marker-{bits:o}"
    hostile = sealed(pickle.dumps(Hostile(marker)))
    index.write_bytes(hostile)
    folder.chmod(bits)
    try:
        said = start(compiled)
        if bits == 0o700:  # so it would run, if it were read
            assert marker.exists() and said == ""
        elif bits == 0o770:
            assert not marker.exists() and said == "" and mode(folder) == 0o700
            assert hostile not in [file.read_bytes() for file in folder.rglob("*.nbi")]
        else:
            assert not marker.exists() and index.read_bytes() == hostile
            assert said.count("\n") == 1 and f"everybody can write to {folder}: remove it" in said
            assert said.startswith("npgpt: the kernels compile anew in each process, because ")
            assert "set NUMBA_CACHE_DIR to a folder of your own" in said
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(jit.KERNELS == "numpy", reason="there are no kernels")
def test_numba_keeps_kernels_in_no_other_folder(base, monkeypatch):
    """It takes the cache folder that all programs share if it cannot write to ours, or if it is told to, as here."""
    import numba

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(base))
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserWideCacheLocator", raising=False)
    place = jit.kernel(mode).stats.cache_path
    ours = cache._kernel_folder(Path(__file__))
    assert place is None or Path(place).parent == ours  # the latter: an older Numba, which has no such variable


def made():
    """The folder for the kernels of this file, looked for anew."""
    cache._said.clear()
    return cache._kernel_folder.__wrapped__(Path(__file__))


def test_where_there_can_be_no_folder_nothing_is_said(base, monkeypatch, capsys):
    (base / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(base / "file"))
    assert made() is None and capsys.readouterr() == ("", "")


def test_a_folder_below_home_is_refused_with_a_line_and_not_used(base, monkeypatch, capsys):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(cache, "cache_folder", lambda: base / "npgpt")
    (folder,) = [made()]
    assert folder.parent == base / "npgpt" and mode(folder) == 0o700 and capsys.readouterr() == ("", "")
    base.chmod(0o777)
    assert made() is None
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"others can write to {base}: chmod go-w it" in err


# ---- what the folder is named after

numba_only = pytest.mark.skipif(jit.KERNELS == "numpy", reason="there are no kernels")
COUNTING = """
import numba.core.compiler
compile_extra, n = numba.core.compiler.compile_extra, []
numba.core.compiler.compile_extra = lambda *args, **options: n.append(0) or compile_extra(*args, **options)
import atexit, sys
atexit.register(lambda: print(len(n), file=sys.stderr))
"""


def compiled_by(base, script=SCRIPT, **variables):
    """How many functions a start has compiled, and what else came on standard error."""
    said = start(base, COUNTING + script, **variables).splitlines()
    return int(said[-1]), said[:-1]


@numba_only
def test_a_kernel_that_has_changed_or_settings_that_have_get_a_folder_of_their_own(base):
    """Numba's index knows nothing of its settings."""
    assert compiled_by(base) == (1, []) and compiled_by(base) == (0, [])
    for changed in ({"script": SCRIPT.replace("2 *", "3 *")}, {"NUMBA_OPT": "0"}):
        before = set((base / "cache").iterdir())
        assert compiled_by(base, **changed)[0] == 1 and compiled_by(base, **changed) == (0, [])
        assert len(set((base / "cache").iterdir()) - before) == 1
    assert compiled_by(base, NUMBA_NUM_THREADS="1") == (0, [])  # the first one is still there, and threads are nothing


LATER = """
import sys, numba
said = "all is there to compile" if "numba.np.npyimpl" in sys.modules else "no more than a load needs"
print(said, file=sys.stderr)

@jit.kernel(counts=True)
def add(y, x):
    z = np.ones((len(x), 1))  # memory of Numba's own
    y += z.reshape(len(x)) + x

add(y, np.ones(3))
numba.njit(lambda y, x: double(y, x))(y, y + 1)  # compiles, and calls what was loaded
assert y.tolist() == [6, 10, 14], y
"""


@numba_only
def test_a_process_that_only_loads_kernels_does_not_wait_for_what_compiling_needs_and_can_still_compile(base):
    n, said = compiled_by(base, SCRIPT + LATER)
    assert n >= 3 and said == ["all is there to compile"]
    assert compiled_by(base, SCRIPT + LATER) == (1, ["no more than a load needs"])


BITS = """
import hashlib, sys
import numpy as np
from npgpt import GPT, GPTConfig
from npgpt.config import Controls
from npgpt.generate.generation import Generation

rng = np.random.default_rng(0)
model = GPT(GPTConfig(vocab_size=40, block_size=128, n_layer=1, n_head=2, n_embd=90))
model.tokenizer = None
idx = rng.integers(0, 40, (2, 100))

def train():
    _, loss = model(idx, idx)
    loss.backward()
    return loss.data, *(parameter.grad for parameter in model.parameters())

def write(n):
    generation = Generation(model, idx[0, :n].tolist(), [rng], Controls(temperature=0), n + 9)
    return generation.decoder.read(idx[0, :n]), generation.decoder.read(idx[1, n : n + 1], position=n)

asked = {"train": train, "write": lambda: write(50), "write after little": lambda: write(20)}
for name in sorted(asked, reverse="reverse" in sys.argv):
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in asked[name]()))
    print(name, digest.hexdigest())
"""


@numba_only
def test_a_process_that_compiles_has_the_bits_of_one_that_loads_in_whatever_order(base):
    """Of a helper that several kernels have a copy of, each calls the one that the process has loaded first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(base / "cache")}

    def bits(*args):
        command = [sys.executable, "-c", BITS, *args]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return sorted(done.stdout.splitlines())

    compiled = bits()
    assert len(compiled) == 3 and bits() == compiled and bits("reverse") == compiled


@numba_only
@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_a_function_has_been_compiled_if_it_was_before(collects):
    import numba

    from npgpt.kernels.compiler import OfKernels

    before, compiles = gc.isenabled(), numba.njit(pipeline_class=OfKernels)
    (gc.enable if collects else gc.disable)()
    try:
        assert compiles(lambda x: x + 1)(1) == 2
        assert gc.isenabled() == collects
        with pytest.raises(numba.TypingError):
            compiles(lambda x: x.nothing)(1)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


@numba_only
@pytest.mark.parametrize("name", ["OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "CPU_NAME"])
def test_a_setting_of_numbas_changes_the_folders_name(monkeypatch, name):
    import numba

    before = cache._key(Path(__file__))
    monkeypatch.setattr(numba.config, name, 7)
    assert cache._key(Path(__file__)) != before


@numba_only
def test_a_folder_is_named_after_what_its_file_imports_and_after_nothing_else(base, monkeypatch):
    mlp, layernorm, muon, decode = files = "ops/mlp.py", "ops/layernorm.py", "muon.py", "generate/decode_kernel.py"

    def names():
        cache._read.cache_clear()
        return {name: cache._key(base / "npgpt" / name) for name in files}

    shutil.copytree(ROOT / "npgpt", base / "npgpt", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "ROOT", base)
    first = names()
    for file, touched in (
        ("ops/layernorm.py", {layernorm, decode}),
        ("ops/mlp.py", {mlp, decode}),
        ("kernels/packed.py", {mlp, muon, decode}),
        ("kernels/vectors.py", {mlp, muon, decode}),
        ("kernels/tiles.py", {mlp, muon, decode}),
        ("kernels/maths.py", {mlp, decode}),
        ("kernels/spin.py", {mlp, muon, decode}),
        ("kernels/jit.py", set(files)),
        ("kernels/compiler.py", set(files)),
        ("kernels/cache.py", set(files)),
        ("engine.py", set()),
    ):
        path = base / "npgpt" / file
        text = path.read_text(encoding="utf-8")
        path.write_text(text + "# changed\n", encoding="utf-8")
        assert {name for name, key in names().items() if key != first[name]} == touched, file
        path.write_text(text, encoding="utf-8")
    assert names() == first
    cache._read.cache_clear()


@numba_only
def test_a_kernel_uses_nothing_of_a_file_that_its_folder_is_not_named_after():
    """A helper or a number from elsewhere could change, and the old kernel would go on."""
    checked = 0
    for path in (ROOT / "npgpt").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = set(cache.kernel_sources(path))
        elsewhere = {
            alias.asname or alias.name
            for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("npgpt")
            for alias in node.names
            if ROOT.joinpath(*node.module.split(".")).with_suffix(".py") not in known
        }  # fmt: skip
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            decorators = {part.id for d in node.decorator_list for part in ast.walk(d) if isinstance(part, ast.Name)}
            if decorators & {"kernel", "helper", "inside_kernels", "intrinsic"}:
                used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                assert not used & elsewhere, f"{path.name}: {node.name}"
                checked += 1
    assert checked > 25


@numba_only
def test_kernels_of_several_dtypes_that_are_kept_at_the_same_time_do_not_take_each_others_place(base):
    """With an index, both would be number 1 for whoever begins before the other has written it."""
    cache = jit.kernel(mode)._cache
    if cache.cache_path is None:
        pytest.skip("Numba keeps nothing here")
    files = [type(cache._cache_file)(str(base), "name", None) for _ in range(2)]
    files[0]._load_index = files[1]._load_index = dict  # neither knows of the other
    for file, key in zip(files, ("float32", "float64"), strict=True):
        file.save((key,), f"code for {key}")
    for file in files:
        assert [file.load((key,)) for key in ("float32", "float64", "int8")] == [
            "code for float32", "code for float64", None
        ]  # fmt: skip


# ---- a cache that is damaged, or has no room


def damage(file, how):
    raw = file.read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "half":
        file.write_bytes(raw[: len(raw) // 2])
    else:
        file.write_bytes(raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:])


@numba_only
@pytest.mark.parametrize("how", ["empty", "half", "flipped"])
def test_a_damaged_file_of_the_cache_is_a_line_and_the_kernel_compiles_anew(compiled, how):
    (file,) = (compiled / "cache").rglob("*.nbc")
    damage(file, how)
    said = start(compiled)
    assert said.count("\n") == 1 and f"compiled kernels in {compiled / 'cache'} cannot be read: " in said
    assert said.startswith("npgpt: ") and said.endswith("; they compile anew\n")
    assert start(compiled) == ""  # it is whole again


FULL = """
import errno, os
replace = os.replace
def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")
os.replace = full
"""


@numba_only
def test_a_full_disk_for_the_cache_is_one_line_for_all_kernels(base):
    two = SCRIPT + SCRIPT.replace("double", "twice").replace("print(y.tolist())", "")
    said = start(base, FULL + two)
    words = f"the kernels cannot be kept in {base / 'cache'}: No space left on device; they compile anew each time"
    assert said == f"npgpt: {words}\n"


@numba_only
def test_a_disk_without_room_for_the_folder_is_a_line(base, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(base))
    monkeypatch.setattr(cache, "private_folder", full)
    assert made() is None
    assert f"the kernels cannot be kept in {base}: No space left on device" in capsys.readouterr().err


# ---- other places


def test_numbas_own_switch_for_no_kernels_is_npgpts(base):
    code = (
        "import sys; from npgpt import gradcheck; from npgpt.kernels import jit; assert jit.KERNELS == 'numpy'; "
        "sys.exit(gradcheck.main(['linear', 'layernorm']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}
    environment.pop("NPGPT_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "NumPy references" in done.stdout
