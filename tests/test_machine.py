"""What this computer has, as the system tells it."""

from pathlib import Path

import numpy as np
import pytest

from npgpt import machine

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")


@needs_proc
def test_what_the_process_has_grows_with_what_it_takes():
    before = machine.in_use()
    taken = np.ones(100_000_000, np.uint8)  # more than what malloc may keep of freed memory
    assert 95e6 < machine.in_use() - before < 110e6
    del taken


@needs_proc
def test_there_is_memory():
    assert machine.in_use() < machine.available() < 1e15


def test_a_limit_of_the_container_counts(monkeypatch):
    monkeypatch.setattr(machine, "_machine", lambda: 1000)
    monkeypatch.setattr(machine, "_container", lambda: iter([700, 900]))
    assert machine.available() == 700
    monkeypatch.setattr(machine, "_container", lambda: iter([]))
    assert machine.available() == 1000
    monkeypatch.setattr(machine, "_machine", lambda: None)
    assert machine.available() is None


def test_cores_is_a_positive_number():
    assert 1 <= machine.cores() <= machine.processors()


# --------------------------------------------------------------------------------------------------------------------
# What Linux tells of cores and containers, in made-up files


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """linux(processors, {path: text or bytes, ...}): a computer with these files of /proc and /sys, and no others."""

    def made_up(processors, files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(machine, "_processor_ids", lambda: set(processors))
        monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
        monkeypatch.setattr(machine, "SYS", tmp_path / "sys")
        machine.quota.cache_clear()

    yield made_up
    machine.quota.cache_clear()


def container(groups, files):
    """What a process finds that is in these control groups: files are relative to /sys/fs/cgroup."""
    return {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}


def v1(folder, quota, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


V1 = "9:memory:{0}\n8:cpuset:/\n4:cpu,cpuacct:{0}\n1:name=systemd:{0}\n0::/system.slice\n"

QUOTAS = {
    "version 2": (2, "0::/\n", {"cpu.max": "200000 100000\n"}),
    "version 2, another period": (3, "0::/\n", {"cpu.max": "30000 10000\n"}),
    "version 2, a group": (2, "0::/kubepods/pod\n", {"kubepods/pod/cpu.max": "200000 100000\n"}),
    "version 2, the group above has less": (
        2, "0::/a/b/c\n", {"a/b/c/cpu.max": "500000 100000", "a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}
    ),
    "version 2, the group above has more": (
        2, "0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "500000 100000\n"}
    ),
    "version 2, the group beside does not count": (64, "0::/a/b\n", {"a/c/cpu.max": "200000 100000\n"}),
    "version 2, seen from within a container": (2, "0::/docker/ab12\n", {"cpu.max": "200000 100000\n"}),
    "version 2, seen from within a namespace": (2, "0::/../../ab12\n", {"cpu.max": "200000 100000\n"}),
    "version 2, no limit": (64, "0::/a\n", {"a/cpu.max": "max 100000\n"}),
    "version 1": (2, V1.format("/"), v1("cpu,cpuacct", 200_000)),
    "version 1, a group": (2, V1.format("/docker/ab12"), v1("cpu,cpuacct/docker/ab12", 200_000)),
    "version 1, by one name": (3, V1.format("/docker/ab12"), v1("cpu/docker/ab12", 150_000, 50_000)),
    "version 1, alone": (2, "2:cpuacct:/\n1:cpu:/a\n0::/\n", v1("cpu/a", 200_000)),
    "version 1, the group above has less": (
        2, V1.format("/a/b"), {**v1("cpu/a/b", 500_000), **v1("cpu/a", 200_000), **v1("cpu", -1)}
    ),
    "version 1, the group above has more": (2, V1.format("/a/b"), {**v1("cpu/a/b", 200_000), **v1("cpu/a", 500_000)}),
    "version 1, seen from within a container": (2, V1.format("/docker/ab12"), v1("cpu,cpuacct", 200_000)),
    "version 1, no limit": (64, V1.format("/"), v1("cpu,cpuacct", -1)),
    "version 1, no period": (64, V1.format("/"), {"cpu/cpu.cfs_quota_us": "200000\n"}),
    "version 1, another controller": (64, "8:cpuset:/\n9:memory:/\n", {**v1("cpuset", 200_000), **v1("cpu", 200_000)}),
    "one and a half": (2, "0::/\n", {"cpu.max": "150000 100000\n"}),
    "a half": (1, "0::/\n", {"cpu.max": "50000 100000\n"}),
    "more than there are": (64, "0::/\n", {"cpu.max": "9900000 100000\n"}),
    "nothing there": (64, "0::/a\n", {}),
    "not a control group": (2, "nonsense\n:\n\n0::/\n", {"cpu.max": "200000 100000\n"}),
    "not UTF-8": (2, b"0::/\xff\xfe\n", {"cpu.max": "200000 100000\n"}),
}  # fmt: skip
QUOTAS |= {
    f"a file that says {content!r}": (64, "0::/\n", {"cpu.max": content})
    for content in ("", "many 100000", "200000", "200000 0", "0 100000", "-1 100000", "2 3 4", b"\xff\xfe")
}


@pytest.mark.parametrize("expected, groups, files", QUOTAS.values(), ids=QUOTAS)
def test_the_quota_of_a_container_limits_cores_and_processors(linux, expected, groups, files):
    linux(range(64), container(groups, files))
    assert machine.cores() == machine.processors() == expected


def test_a_machine_without_control_groups_has_no_quota(linux):
    linux(range(64), {})
    assert machine.cores() == machine.processors() == 64


def test_what_may_not_be_read_is_no_limit(linux, monkeypatch):
    linux(range(64), container("0::/a\n", {"a/cpu.max": "200000 100000\n"}))

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        assert machine.processors() == 64
        machine.quota.cache_clear()
        patch.setattr(Path, "read_bytes", denied)
        assert machine.processors() == 64
    machine.quota.cache_clear()
    assert machine.processors() == 2


def siblings(*lists, name="thread_siblings_list"):
    """The files of processors 0, 1, ... that say which ones share a core with them."""
    return {f"sys/devices/system/cpu/cpu{i}/topology/{name}": text for i, text in enumerate(lists)}


@pytest.mark.parametrize(
    "processors, files, cores",
    [
        ((0, 1), siblings("0-1\n", "0-1\n"), {0}),
        ((0, 1, 2, 3), siblings("0,2\n", "1,3\n", "0,2\n", "1,3\n"), {0, 1}),
        ((0, 1, 2, 3), siblings("0-1\n", "0-1\n", "2-3\n", "2-3\n", name="core_cpus_list"), {0, 2}),
        ((2, 3), siblings("0,2\n", "1,3\n", "0,2\n", "1,3\n"), {0, 1}),  # one thread of each core
        ((1, 3), siblings("0,2\n", "1,3\n", "0,2\n", "1,3\n"), {1}),  # both threads of one
        ((0, 1, 8), siblings(*["0-1,8\n"] * 9), {0}),
        ((0, 1), siblings("0\n", "1\n"), {0, 1}),
        ((0, 1), {}, {0, 1}),  # nobody says
        ((0, 1, 2), siblings("", "nonsense", b"\xff"), {0, 1, 2}),
    ],
)
def test_hyperthreads_of_a_core_count_once(linux, processors, files, cores):
    linux(processors, files)
    assert machine.core_ids() == cores
    assert (machine.cores(), machine.processors()) == (len(cores), len(processors))


def test_the_smaller_one_counts_of_cores_and_quota(linux):
    files = siblings("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")
    for quota, cores, processors in ((1, 1, 1), (3, 3, 3), (6, 4, 6), (9, 4, 8)):
        linux(range(8), {**files, **container("0::/\n", {"cpu.max": f"{quota}00000 100000\n"})})
        assert (machine.cores(), machine.processors()) == (cores, processors)


@pytest.mark.parametrize(
    "groups, root, names",
    [
        ("0::/a/b\n", ".", ("memory.max", "memory.current")),
        (V1.format("/a/b"), "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_the_memory_of_a_container_is_what_its_groups_leave(linux, groups, root, names):
    linux(range(2), {"proc/meminfo": "MemAvailable: 100 kB\n"})
    assert machine.available() == 102_400
    for group, limit, available in (
        ("a", "max\n", 102_400),
        ("a", "9000\n", 8000),
        ("a/b", "5000\n", 4000),
        ("a/b", "max\n", 8000),
        (".", "3000\n", 2000),
        ("a/c", "1000\n", 2000),  # not one of its groups
    ):
        files = {f"{root}/{group}/{name}": text for name, text in zip(names, (limit, "1000\n"), strict=True)}
        linux(range(2), container(groups, files))
        assert machine.available() == available
