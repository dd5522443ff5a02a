"""A real Slurm of this machine's own: munged, slurmctld and several slurmd as one user, all state in one folder, GPUs that are no GPUs."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# More jobs than the tests of one Slurm submit.
JOBS_OF_A_CLUSTER = 200

_MUNGE_FILES = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
_CONF = """\
ClusterName=opdtest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={control_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=300
FirstJobId={first_job}
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=16 RealMemory=20000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllowAccounts=others MaxTime=INFINITE State=UP
SlurmdTimeout={slurmd_timeout}
EnforcePartLimits=ALL
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running Slurm; `environment` makes its commands talk to it."""

    folder: Path
    environment: dict[str, str]
    # Locked as long as this Slurm's job numbers are its own.
    job_numbers: TextIO

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command."""
        return subprocess.run(command, cwd=cwd, env={**self.environment, **variables}, capture_output=True, text=True, timeout=timeout)

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> int:
        """Return the number of the job that `sbatch ARGUMENTS` made."""
        submitted = self.run("sbatch", *arguments, cwd=cwd, **variables)
        assert submitted.returncode == 0, submitted.stderr
        found = re.search(r"Submitted batch job (\d+)", submitted.stdout)
        assert found, submitted.stdout
        return int(found[1])

    def show(self, job: int) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job)).stdout))

    def wait(self, job: int, *states: str, timeout: float = 600) -> dict[str, str]:
        """Return a job's facts once it is in one of these states; AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (facts := self.show(job)).get("JobState") in states:
                return facts
            time.sleep(0.3)
        raise AssertionError(f"job {job} is not {' or '.join(states)}: {self.show(job)}")

    def stop(self) -> None:
        """End every daemon."""
        for file in [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"]:
            if file.is_file() and (pid := file.read_text().strip()):
                try:
                    os.kill(int(pid), signal.SIGTERM)
                except ProcessLookupError:
                    continue
        self.job_numbers.close()


def missing_programs() -> list[str]:
    """Return what must be installed first."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def start_cluster(folder: Path, num_nodes: int = 2, *, slurmd_timeout: int = 300) -> Cluster:
    """Start a Slurm of `num_nodes` nodes with 16 CPUs and 8 GPUs each, all on this machine. A node is lost that is silent for `slurmd_timeout` seconds."""
    host = socket.gethostname().split(".")[0]
    first_job, job_numbers = _reserve_job_numbers()
    ports = _free_ports(num_nodes + 1)
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    folder.chmod(0o755)
    options = [f"--{option}={folder}/{name}" for option, name in _MUNGE_FILES.items()]
    subprocess.run(["munged", "--force", f"--key-file={key}", *options], check=True, timeout=30)
    nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=host,
            folder=folder,
            control_port=ports[0],
            nodes=f"n[1-{num_nodes}]",
            ports=",".join(map(str, ports[1:])),
            slurmd_timeout=slurmd_timeout,
            first_job=first_job,
        )
    )
    fakes = folder / "gpus"
    fakes.mkdir()
    for number in range(8):
        (fakes / f"gpu{number}").touch()
    (folder / "gres.conf").write_text("AutoDetect=off\n" + f"NodeName=n[1-{num_nodes}] Name=gpu File={fakes}/gpu[0-7]\n")
    cluster = Cluster(folder=folder, environment={**_clean_environment(), "SLURM_CONF": str(conf)}, job_numbers=job_numbers)
    subprocess.run(["slurmctld", "-c", "-f", str(conf)], check=True, timeout=30, env=cluster.environment)
    for node in nodes:
        (folder / f"spool.{node}").mkdir()
        subprocess.run(["slurmd", "-N", node, "-f", str(conf)], check=True, timeout=30, env=cluster.environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split() == ["idle"] * num_nodes:
            return cluster
        time.sleep(0.2)
    cluster.stop()
    raise AssertionError(f"no Slurm in a minute: {cluster.run('sinfo', '-N').stdout}\n{(folder / 'slurmctld.log').read_text()[-3000:]}")


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "OPD_"))}


def _reserve_job_numbers() -> tuple[int, TextIO]:
    """Return the first number of a block that no other Slurm of this machine counts in, and its locked file: ports of jobs are made of their numbers."""
    folder = Path(tempfile.gettempdir()) / "opd-slurm-job-numbers"
    folder.mkdir(exist_ok=True)
    for first in range(1000, 10000, JOBS_OF_A_CLUSTER):
        file = (folder / str(first)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            return first, file
    raise AssertionError(f"every block of job numbers is taken: {folder}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
