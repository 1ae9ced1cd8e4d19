"""Locks between processes, and between hosts where the system's locks may not reach."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import Timeout
from support import ROOT

from lora_tradeoffs import files
from lora_tradeoffs.files import locked, shared_mount

# a process of another host (which is known by its name alone) that holds a lock
HOLDER = f"""
import socket, sys, time
sys.path.insert(0, {str(ROOT)!r})
socket.gethostname = lambda: sys.argv[2]
from pathlib import Path
from lora_tradeoffs import files
files.shared_mount, files.LEASE = lambda folder: "nfs4", 1.0
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def on_a_network_mount(monkeypatch):
    monkeypatch.setattr(files, "shared_mount", lambda folder: "nfs4")
    monkeypatch.setattr(files, "LEASE", 1.0)


@pytest.fixture
def hold(tmp_path):
    """A function from a host's name to its process, which holds the lock of tmp_path / ".lock"."""
    processes = []

    def start(host):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock"), host]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **pipes))
        assert processes[-1].stdout.readline() == "held\n", processes[-1].stderr.read()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_of_another_host_holds_as_long_as_its_process_lives(
    on_a_network_mount, hold, tmp_path, capsys
):
    other = hold("node1")
    for _ in range(2):  # far longer than the lease
        with pytest.raises(Timeout), locked(tmp_path / ".lock", timeout=0):
            pass
        assert ".lock is held: waiting up to 1 s" in capsys.readouterr().out
    other.kill()
    with locked(tmp_path / ".lock", timeout=0):  # its time is up
        pass


def test_who_was_taken_for_dead_ends_before_it_writes(on_a_network_mount, hold, tmp_path):
    other = hold("node1")
    other.send_signal(signal.SIGSTOP)
    with locked(tmp_path / ".lock", timeout=2):
        other.send_signal(signal.SIGCONT)
        start = time.monotonic()
        assert other.wait(10) == 1
        assert time.monotonic() - start < 2
    assert ".lock.lease was lost to another host" in other.stderr.read()


def test_mounts_of_other_hosts_are_known_by_their_kind(tmp_path, monkeypatch):
    assert shared_mount(tmp_path) is None  # a disk of this machine

    def partitions(all=False):
        kinds = {"/": "ext4", "/home": "nfs4", "/home/me/scratch": "tmpfs", "/lustre": "lustre"}
        return [
            SimpleNamespace(mountpoint=mount, fstype=kind)
            for mount, kind in kinds.items()
            if all or kind == "ext4"
        ]

    monkeypatch.setattr(psutil, "disk_partitions", partitions)
    shared_mount.cache_clear()
    try:
        places = ("/data", "/home/me/models", "/home/me/scratch/x", "/homework", "/lustre/a")
        kinds = [shared_mount(Path(place)) for place in places]
        assert kinds == [None, "nfs4", None, None, "lustre"]
    finally:
        shared_mount.cache_clear()
