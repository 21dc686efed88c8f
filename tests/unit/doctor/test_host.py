"""What is said of memory, shared memory, names, locks and folders, good ones and bad ones."""

import errno
import fcntl
import os

import pytest

from megatron_moellava.doctor import host

GIB = 1 << 30


def test_a_machine_is_described_without_a_problem():
    found = {finding.name: finding for finding in host.machine()}
    assert {"system", "cores", "memory", "/dev/shm", "open files", "host name"} <= found.keys()
    assert found["cores"].found.startswith(str(len(os.sched_getaffinity(0))))
    assert all(finding.level != "problem" for finding in found.values())


def test_a_control_group_that_holds_to_less_is_noted():
    assert host.memory(64 * GIB, 32 * GIB, None).level == "ok"
    assert host.memory(64 * GIB, 32 * GIB, 2**63).level == "ok"  # what control groups without a limit have
    held = host.memory(64 * GIB, 32 * GIB, 8 * GIB)
    assert held.level == "note" and "beyond 8.0 GiB" in held.meaning


def test_shared_memory_that_misses_is_a_problem(tmp_path):
    missing = host.shared_memory(tmp_path / "shm")
    assert missing.level == "problem" and "data.num_workers=0" in missing.meaning


def test_a_name_without_an_address_says_what_helps():
    assert host.name_of_host("localhost").found == "localhost, 127.0.0.1"
    lost = host.name_of_host("no-such-host.invalid")
    assert lost.level == "note" and "GLOO_SOCKET_IFNAME" in lost.meaning


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_above(tmp_path):
    found = {finding.name: finding for finding in host.folder(tmp_path / "runs" / "new")}
    assert found["space"].found.endswith(f"at {tmp_path}")
    assert found["locks"].found == "work" and found["writing"].found.endswith("MB/s")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_folder_that_takes_no_file_is_a_problem():
    found = {finding.name: finding for finding in host.folder(host.Path("/proc"))}
    assert found["writing"].level == "problem" and "choose another checkpoint.save" in found["writing"].meaning


@pytest.mark.parametrize("code", host.NO_LOCKS)
def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (tmp_path / "file").open("w") as file:
        assert host.locks(file.fileno()).level == "note"


def test_another_fault_of_a_lock_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    found = {finding.name: finding for finding in host.folder(tmp_path)}
    assert found["writing"].level == "problem" and "Input/output error" in found["writing"].found
