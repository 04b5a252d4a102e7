from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from ernie45.memory.machine import HostMemory, has_cuda_driver, host_bytes

MIB = 2**20
V1_NO_LIMIT = 2**63 - 4096
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
# A space is written as \040, and a name need not be UTF-8.
OTHER_MOUNTS = """\
23 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
24 23 0:5 / /mnt/a\\040caf\udce9 rw - tmpfs tmpfs rw
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
"""


def lay_out(root: Path, *, own: str, mounts: str) -> None:
    """A /proc that says which cgroup the process is in and where cgroups are mounted."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    (root / "proc/self/mountinfo").write_bytes((OTHER_MOUNTS + mounts).encode(errors="surrogateescape"))


def add_v2(folder: Path, *, limit: object, used: object, cache: int = 0, high: object = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 99\nfile 99\ninactive_anon 99\nactive_anon 99\ninactive_file {cache}\nactive_file {cache}\n"
        "workingset_refault_file 99\n"
    )


def add_v1(folder: Path, *, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache 99\ninactive_file 99\nactive_file 99\ntotal_cache 99\ntotal_inactive_file {cache}\n"
        f"total_active_file {cache}\ntotal_unevictable 99\n"
    )


def check_machine_only(root: Path) -> None:
    memory = host_bytes(root)
    assert memory.limited_by == "machine"
    assert memory.limit_bytes is None
    assert memory.total_bytes == psutil.virtual_memory().total
    assert memory.available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def check_cgroup(root: Path, *, available: int, limit: int) -> None:
    memory = host_bytes(root)
    assert (memory.available_bytes, memory.limited_by, memory.limit_bytes) == (available, "cgroup", limit)
    assert memory.total_bytes == psutil.virtual_memory().total


def test_without_proc_only_the_machine_counts(tmp_path: Path) -> None:
    check_machine_only(tmp_path)


def test_this_process_has_memory_left() -> None:
    memory = host_bytes()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_v2_leaves_the_limit_less_what_is_used_without_page_cache(tmp_path: Path) -> None:
    lay_out(tmp_path, own="0::/user.slice/job.scope\n", mounts=V2_MOUNT)
    add_v2(tmp_path / "sys/fs/cgroup/user.slice/job.scope", limit=64 * MIB, used=40 * MIB, cache=10 * MIB)
    check_cgroup(tmp_path, available=44 * MIB, limit=64 * MIB)


def test_v2_counts_the_limit_above_which_it_slows_down(tmp_path: Path) -> None:
    lay_out(tmp_path, own="0::/job\n", mounts=V2_MOUNT)
    add_v2(tmp_path / "sys/fs/cgroup/job", limit=64 * MIB, high=48 * MIB, used=8 * MIB)
    check_cgroup(tmp_path, available=40 * MIB, limit=48 * MIB)


def test_v1_leaves_the_limit_less_what_is_used_without_page_cache(tmp_path: Path) -> None:
    lay_out(tmp_path, own="9:name=systemd:/\n4:memory:/jobs/a:b\n1:cpu,cpuacct:/jobs\n0::/\n", mounts=V1_MOUNT)
    top = tmp_path / "sys/fs/cgroup/memory"
    add_v1(top, limit=V1_NO_LIMIT, used=900 * MIB)
    add_v1(top / "jobs", limit=V1_NO_LIMIT, used=500 * MIB)
    add_v1(top / "jobs/a:b", limit=64 * MIB, used=40 * MIB, cache=10 * MIB)
    check_cgroup(tmp_path, available=44 * MIB, limit=64 * MIB)


@pytest.mark.parametrize(
    ("outer", "inner", "available", "limit"),
    [((64, 60), (48, 1), 4, 64), ((64, 10), (16, 9), 7, 16), ((64, 70), ("max", 9), 0, 64), (("max", 9), (8, 2), 6, 8)],
)
def test_the_cgroup_with_the_least_room_counts(
    tmp_path: Path, outer: tuple[object, int], inner: tuple[object, int], available: int, limit: int
) -> None:
    lay_out(tmp_path, own="0::/outer/inner\n", mounts=V2_MOUNT)
    for name, (most, used) in {"outer": outer, "outer/inner": inner}.items():
        most = most * MIB if isinstance(most, int) else most
        add_v2(tmp_path / "sys/fs/cgroup" / name, limit=most, used=used * MIB)
    check_cgroup(tmp_path, available=available * MIB, limit=limit * MIB)


def test_v1_counts_beside_v2(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    lay_out(
        tmp_path, own="4:memory,hugetlb:/job\n0::/job\n", mounts=V1_MOUNT.replace("memory\n", "memory,x\n") + unified
    )
    add_v1(tmp_path / "sys/fs/cgroup/memory/job", limit=64 * MIB, used=4 * MIB)
    (tmp_path / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    check_cgroup(tmp_path, available=60 * MIB, limit=64 * MIB)


def test_no_limit_is_none(tmp_path: Path) -> None:
    lay_out(tmp_path, own="4:memory:/job\n0::/job\n", mounts=V1_MOUNT + V2_MOUNT)
    add_v1(tmp_path / "sys/fs/cgroup/memory/job", limit=V1_NO_LIMIT, used=4 * MIB)
    add_v2(tmp_path / "sys/fs/cgroup/job", limit="max", used=4 * MIB)
    check_machine_only(tmp_path)


def test_a_limit_above_what_the_machine_has_left_is_named_but_does_not_count(tmp_path: Path) -> None:
    lay_out(tmp_path, own="0::/job\n", mounts=V2_MOUNT)
    add_v2(tmp_path / "sys/fs/cgroup/job", limit=2**60, used=0)
    memory = host_bytes(tmp_path)
    assert (memory.limited_by, memory.limit_bytes) == ("machine", 2**60)
    assert memory.available_bytes <= memory.total_bytes


@pytest.mark.parametrize(
    ("own", "mount_root"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/4f1a", "/docker/4f1a"),  # the host's paths, of which the mount shows one
        ("/docker/4f1a", "/"),  # the host's path beside a mount of the container's own
        ("/", "/docker/4f1a"),
        ("/../sibling", "/"),
        ("/", "/../.."),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_root_of_the_mount_counts(tmp_path: Path, own: str, mount_root: str, version: int) -> None:
    hierarchy, mount, add = ("4:memory:", V1_MOUNT, add_v1) if version == 1 else ("0::", V2_MOUNT, add_v2)
    mount_point = mount.split()[4]
    lay_out(
        tmp_path, own=f"{hierarchy}{own}\n", mounts=mount.replace(f" / {mount_point}", f" {mount_root} {mount_point}")
    )
    add(tmp_path / mount_point.lstrip("/"), limit=64 * MIB, used=4 * MIB)
    add(tmp_path / "sys/fs/sibling", limit=MIB, used=0)
    check_cgroup(tmp_path, available=60 * MIB, limit=64 * MIB)


def test_below_a_container_the_path_is_relative_to_the_root_of_the_mount(tmp_path: Path) -> None:
    lay_out(tmp_path, own="0::/docker/4f1a/job\n", mounts=V2_MOUNT.replace(" / /sys", " /docker/4f1a /sys"))
    add_v2(tmp_path / "sys/fs/cgroup/job", limit=32 * MIB, used=4 * MIB)
    add_v2(tmp_path / "sys/fs/cgroup", limit=64 * MIB, used=8 * MIB)
    check_cgroup(tmp_path, available=28 * MIB, limit=32 * MIB)


@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
@pytest.mark.parametrize("text", ["", "-1", "many", "1e9", "9" * 5000, "\udcff\0"])
def test_a_level_with_a_malformed_figure_sets_no_limit(tmp_path: Path, name: str, text: str) -> None:
    lay_out(tmp_path, own="0::/outer/inner\n", mounts=V2_MOUNT)
    inner = tmp_path / "sys/fs/cgroup/outer/inner"
    add_v2(inner, limit=16 * MIB, used=4 * MIB)
    (inner / name).write_bytes(text.encode(errors="surrogateescape"))
    check_machine_only(tmp_path)
    add_v2(inner.parent, limit=64 * MIB, used=4 * MIB)
    check_cgroup(tmp_path, available=60 * MIB, limit=64 * MIB)


def test_without_statistics_there_is_no_page_cache_to_count(tmp_path: Path) -> None:
    lay_out(tmp_path, own="0::/job\n", mounts=V2_MOUNT)
    add_v2(tmp_path / "sys/fs/cgroup/job", limit=64 * MIB, used=4 * MIB, cache=MIB)
    (tmp_path / "sys/fs/cgroup/job/memory.stat").unlink()
    check_cgroup(tmp_path, available=60 * MIB, limit=64 * MIB)


@pytest.mark.parametrize(
    "text", ["", "nonsense\n", "0:/\n:::\n", "0::relative\n", "0::/\0\n4:memory:/\0\n", "0::/caf\udce9\n"]
)
def test_a_malformed_proc_sets_no_limit(tmp_path: Path, text: str) -> None:
    lay_out(tmp_path, own="0::/job\n", mounts=V2_MOUNT + V1_MOUNT)
    add_v2(tmp_path / "sys/fs/cgroup/job", limit=64 * MIB, used=4 * MIB)
    (tmp_path / "proc/self/cgroup").write_bytes(text.encode(errors="surrogateescape"))
    check_machine_only(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_bytes(text.encode(errors="surrogateescape"))
    check_machine_only(tmp_path)


def test_the_most_that_could_be_had_is_what_the_machine_or_the_cgroup_has() -> None:
    free: dict[str, Any] = {"available_bytes": 5, "limited_by": "machine"}
    assert HostMemory(total_bytes=100, limit_bytes=None, **free).most_bytes == 100
    assert HostMemory(total_bytes=100, limit_bytes=30, **free).most_bytes == 30
    assert HostMemory(total_bytes=100, limit_bytes=200, **free).most_bytes == 100


@pytest.mark.parametrize("sign", ["proc/driver/nvidia/version", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1"])
def test_a_driver_is_known_by_its_files(tmp_path: Path, sign: str) -> None:
    assert not has_cuda_driver(tmp_path)
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    assert has_cuda_driver(tmp_path)


def test_torch_stays_out() -> None:
    program = (
        "import sys; from ernie45.memory.machine import *; host_bytes(); has_cuda_driver(); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
