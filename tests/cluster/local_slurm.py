"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmds, each node with eight pretended GPUs.

Needs root and Debian's or Ubuntu's packages `slurm-wlm munge` (`python tests/cluster/local_slurm.py --install`).
Everything lives in one folder and in processes started here; /etc/hosts gets the two node names while it runs.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES = ("n1", "n2")
PATIENCE = float(os.environ.get("PATIENCE", "1"))  # a factor on every time limit, for a machine busy with other work
HOSTS_LINE = "127.0.0.1 n1 n2 # local SLURM of a test\n"
REQUIRED = ("munged", "slurmctld", "slurmd", "sbatch")

# Two partitions so that a job in `high` preempts one in `low`; short timeouts so that a dead node is noticed at once.
CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=6
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout=8
SlurmctldTimeout=20
KillWait=10
MessageTimeout=20
SchedulerParameters=sched_interval=2,bf_interval=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=512000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=512000 Gres=gpu:8
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=2 State=UP
"""


def install() -> None:
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "slurm-wlm", "munge"], check=True)


def missing() -> list[str]:
    return [program for program in REQUIRED if not shutil.which(program)]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


class LocalSlurm:
    """Start with `start()`, end with `stop()`; `run` gives any SLURM command its configuration."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        (self.root / "state").mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        (self.root / "slurm.conf").write_text(CONF.format(root=self.root, host=host, ports=_free_ports(3)))
        for index in range(8):
            os.mknod(self.root / f"nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.root}/nvidia[0-7]\n")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        hosts = Path("/etc/hosts")
        hosts.write_text(hosts.read_text() + HOSTS_LINE)
        files = [
            f"--{name}={self.root}/munge.{name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")
        ]
        files[1] = f"--key-file={key}"
        self._daemon("munged", ["munged", "--foreground", "--force", *files])
        self._daemon("slurmctld", ["slurmctld", "-D", "-i", "-f", self.environment["SLURM_CONF"]])
        for node in NODES:
            self.start_node(node)
        self.wait_until(lambda: self.node_states() == {"idle"}, 30, "both nodes idle")

    def start_node(self, node: str) -> None:
        # Each node has its own share of this machine's cores, as if it were a machine of its own.
        cores = sorted(os.sched_getaffinity(0))
        share = cores[NODES.index(node) :: len(NODES)] or cores
        pinned = ["taskset", "--cpu-list", ",".join(map(str, share))]
        self._daemon(node, [*pinned, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"]])

    def _daemon(self, name: str, command: list[str]) -> None:
        with open(self.root / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def fail_node(self, node: str) -> None:
        """As if the power went: the node's daemon and every process of its jobs die without a word."""
        self.daemons.pop(node).kill()
        marker = f"SLURMD_NODENAME={node}".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = environ.read_bytes().split(b"\0")
            except OSError:
                continue
            if marker in variables and f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in variables:
                os.kill(int(environ.parent.name), signal.SIGKILL)

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        time.sleep(2)  # a slurmd that still has a job would wait for it
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
        hosts = Path("/etc/hosts")
        hosts.write_text(hosts.read_text().replace(HOSTS_LINE, ""))

    def run(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        options.setdefault("env", self.environment)
        result = subprocess.run(command, capture_output=True, text=True, timeout=120 * PATIENCE, **options)
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)} -> {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def node_states(self) -> set[str]:
        return set(self.run("sinfo", "--noheader", "--format=%T", check=False).stdout.replace("*", "").split())

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_job(self, job_id: str, seconds: float) -> dict[str, str]:
        """Until the job has ended for good (a requeued one has not)."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        self.wait_until(lambda: self.job(job_id)["JobState"] in ended, seconds, f"end of job {job_id}")
        return self.job(job_id)

    def wait_until(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds * PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--all", check=False).stdout
                raise AssertionError(f"{what}: not within {seconds} s\n{queue}")
            time.sleep(0.5)


if __name__ == "__main__" and "--install" in sys.argv:
    install()
