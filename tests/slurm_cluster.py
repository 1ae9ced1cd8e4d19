"""A SLURM of the tests' own: one node, this machine, with its files in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from getpass import getuser
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing_programs() -> list[str]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Started by `start`, which sets SLURM_CONF for the clients; ended by `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        controller, daemon = free_ports(2)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getuser(),
            controller=controller,
            daemon=daemon,
            folder=folder,
            cpus=os.cpu_count(),
        )
        (folder / "slurm.conf").write_text(text)

    def start(self) -> None:
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        for name in ("slurmctld", "slurmd"):
            program = shutil.which(name, path=path)
            with (self.folder / f"{name}.out").open("w") as output:
                daemon = subprocess.Popen([program, "-D"], stdout=output, stderr=output)
            self.daemons.append(daemon)
        deadline = time.monotonic() + 60
        while "idle" not in self.ask("sinfo", "--noheader", "--format=%t"):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def jobs(self) -> list[str]:
        """Numbers of the jobs that wait or run."""
        return self.ask("squeue", "--noheader", "--format=%i").split()

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.[lo][ou][gt]"))

    def stop(self) -> None:
        if numbers := self.jobs():
            self.ask("scancel", *numbers)
            deadline = time.monotonic() + 40
            while self.jobs() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self.daemons):
            with suppress(ProcessLookupError):
                daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF", None)
