"""Submit a training to SLURM, with one process per GPU; it continues after preemption and time limits.

avion-dali slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 -- pretrain --config pretrain_own ...
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from avion_dali.child_process import safe_environment
from avion_dali.cli.arguments import parse_options
from avion_dali.contracts import UserError

SIGNAL_AHEAD_S = 120
SAVE_LIMIT_S = 100.0
"""Longest time in seconds to save after SLURM's warning; less than `SIGNAL_AHEAD_S`."""
_POLL_S = 0.2
SUBMITTED = ("pretrain", "finetune", "evaluate", "features")


@dataclass(frozen=True)
class SlurmOptions:
    """Configuration of a SLURM job.

    Args:
        nodes: number of machines.
        gpus_per_node: GPUs per machine, each with one process; 0 runs one process per machine on its CPU.
        cpus_per_process: cores per process, for a trainer and its decode workers.
        memory_gb: memory per machine in GB; 0 uses the cluster's default.
        time: time limit of the job, as D-HH:MM:SS or HH:MM:SS; when it is reached, the job is requeued.
        stretches: how often the time limit may be reached before the job ends.
        partition: partition of the cluster; empty for the default.
        account: account to charge; empty for the user's default.
        name: name of the job.
        log_dir: folder for the job's console output; all machines must share it.
        cluster: `slurm`, or `local` to run the same steps in processes on this machine.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_process: int = 12
    memory_gb: int = 0
    time: str = "24:00:00"
    stretches: int = 20
    partition: str = ""
    account: str = ""
    name: str = "avion_dali"
    log_dir: str = "runs/slurm"
    cluster: str = "slurm"


@dataclass(frozen=True)
class RankPlace:
    """The place of a task in a job.

    Args:
        rank: rank over all machines.
        local_rank: rank on its machine.
        world_size: number of tasks of the job.
        nodes: number of machines of the job.
        first_host: the machine of rank 0.
        job_id: number of the job; a requeued job keeps it.
    """

    rank: int
    local_rank: int
    world_size: int
    nodes: int
    first_host: str
    job_id: str

    def environment(self) -> dict[str, str]:
        """Return the environment variables that torchrun would set, from which a trainer reads its rank."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size // self.nodes),
            "MASTER_ADDR": self.first_host,
            # The same on all machines, and different for another job on the same machine.
            "MASTER_PORT": str(20_000 + int(re.sub(r"\D", "", self.job_id) or 0) % 20_000),
        }


class RankTask:
    """Runs one rank's trainer in a child process, and makes it save when SLURM announces the end of the job.

    submitit pickles it, calls it once per rank, and calls `checkpoint` on rank 0 when SLURM's signal arrives.

    Args:
        command: module and arguments, as after `python -m`.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self._trainer: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Train until the end.

        Raises:
            RuntimeError: when the trainer failed; its console output states the reason.
        """
        import submitit

        job = submitit.JobEnvironment()
        place = RankPlace(
            rank=job.global_rank,
            local_rank=job.local_rank,
            world_size=job.num_tasks,
            nodes=job.num_nodes,
            first_host=job.hostnames[0],
            job_id=job.raw_job_id,
        )
        status = self.run(os.environ | place.environment())
        if status != 0:
            raise RuntimeError(f"rank {place.rank} ended with status {status}: {' '.join(self.command)}")

    def run(self, environment: dict[str, str]) -> int:
        """Start the trainer and wait until it ends.

        Args:
            environment: its environment variables.

        Returns:
            Its exit status.
        """
        variables = safe_environment(environment)
        self._trainer = subprocess.Popen([sys.executable, "-m", *self.command], env=variables)
        # Not `wait`: it holds a lock that the signal handler below, in the same thread, would need.
        while self._trainer.poll() is None:
            time.sleep(_POLL_S)
        return self._trainer.returncode

    def checkpoint(self) -> Any:
        """Make all ranks save and stop, and return the same task for the next start of the job.

        Returns:
            The submission to requeue.
        """
        import submitit

        self.save_and_stop()
        return submitit.helpers.DelayedSubmission(RankTask(self.command))

    def save_and_stop(self) -> None:
        """Signal this rank's trainer, which notifies the other ranks, and wait until it has saved."""
        trainer, deadline = self._trainer, time.monotonic() + SAVE_LIMIT_S
        if trainer is None:
            return
        if trainer.poll() is None:
            trainer.send_signal(signal.SIGUSR2)
        while trainer.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def minutes(text: str) -> int:
    """Convert a time limit to minutes.

    Args:
        text: `HH:MM:SS` or `D-HH:MM:SS`.

    Raises:
        UserError: when it is neither.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not found:
        raise UserError(f"time = {text} is not allowed; write HH:MM:SS or D-HH:MM:SS")
    days, hours, mins, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + mins + (seconds > 0)


def parameters(options: SlurmOptions) -> dict[str, Any]:
    """Return the parameters for submitit's executor.

    Args:
        options: configuration of the job.

    Raises:
        UserError: when the time limit cannot be parsed.
    """
    values: dict[str, Any] = {
        "name": options.name,
        "nodes": options.nodes,
        "tasks_per_node": max(options.gpus_per_node, 1),
        "cpus_per_task": options.cpus_per_process,
        "timeout_min": minutes(options.time),
    }
    if options.gpus_per_node:
        values["gpus_per_node"] = options.gpus_per_node
    if options.memory_gb:
        values["mem_gb"] = options.memory_gb
    for name in ("partition", "account"):
        if getattr(options, name):
            values[f"slurm_{name}"] = getattr(options, name)
    if options.cluster == "slurm":
        values["slurm_signal_delay_s"] = SIGNAL_AHEAD_S
        # submitit starts `python -m` where the job was submitted, which may be a folder of data.
        values["slurm_setup"] = ["export PYTHONSAFEPATH=1"]
    return values


def main(argv: list[str] | None = None) -> int:
    """Submit the job, and print its number and the file of its output.

    Args:
        argv: arguments; None uses the arguments of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    divider = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:divider], arguments[divider + 1 :]
    options = parse_options(SlurmOptions, own, prog="avion-dali slurm", description=__doc__ or "")
    if not command:
        raise UserError("there is no command to run: end the line with `-- pretrain --config ...`")
    if command[0] not in SUBMITTED:
        allowed = ", ".join(SUBMITTED)
        raise UserError(f"`{command[0]}` is not a command for SLURM; write one of {allowed} after `--`")
    try:
        import submitit
    except ImportError:
        raise UserError('submitit is not installed; pip install "avion_dali[slurm]"') from None
    more = {"slurm_max_num_timeout": options.stretches} if options.cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder=options.log_dir, cluster=options.cluster, **more)
    executor.update_parameters(**parameters(options))
    job = executor.submit(RankTask(["avion_dali", *command]))
    print(f"job {job.job_id}: console output in {job.paths.stdout} and other files in its folder")
    return 0
