"""Starting processes on this machine with torch's own launcher, the one behind `torchrun`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moesaic.dist.process import Process
from moesaic.errors import TrainingError

# A process that only lost another one waits so long before it says so: the launcher ends it first, and what is shown is
# the cause.
_PATIENCE_SECONDS = 3.0


class WorkerFailed(TrainingError):
    """A process that was started here failed.

    Args:
        message: what is known, or None if the process has said it.
        exit_code: to end with.
    """

    def __init__(self, message: str | None, exit_code: int) -> None:
        self.message, self.exit_code = message, exit_code
        super().__init__(message or f"exit code {exit_code}")


def launch(processes: int, arguments: Sequence[str], *, grace_seconds: float, quiet: bool = True) -> int:
    """Run `python -m moesaic ARGUMENTS` in several processes that are connected as under `torchrun`.

    They see the same standard streams, and end with this one. SIGINT and SIGTERM are passed on; a second signal ends
    them at once.

    Args:
        processes: how many.
        arguments: of the command line.
        grace_seconds: how long they may take to end after a signal before they are killed.
        quiet: hide what torch's launcher says by itself.

    Returns:
        0, or 128 + the signal that was passed on.

    Raises:
        WorkerFailed: if a process fails; the others are then ended.
    """
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(round(grace_seconds))
    if quiet:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        silenced = logging.getLogger("torch.distributed.elastic")
        silenced.addHandler(logging.NullHandler())
        silenced.propagate = False
    with tempfile.TemporaryDirectory(prefix="moesaic-launch-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "moesaic", *arguments)
        except SignalException as stop:
            return 128 + stop.sigval
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            raise _explained(rank, failure) from failed
    return 0


def _explained(rank: int, failure: ProcessFailure) -> WorkerFailed:
    if failure.exitcode >= 0:
        return WorkerFailed(None, failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    cause = "; the system does that where memory runs out" if name == "SIGKILL" else ""
    return WorkerFailed(
        f"rank {rank} (process {failure.pid}) was ended by {name}{cause}. Run the same command to go on from the last "
        "checkpoint",
        128 - failure.exitcode,
    )


def record_failure(error: Exception) -> None:
    """Leave the error where the launcher of this process looks for it, for its own report."""
    get_error_handler().record_exception(error)


def seconds_to_wait(process: Process, *, lost_peer: bool) -> float:
    """How long to hold an error back, so that of several processes one shows it: the first of each host, the cause first.

    The launcher ends the others once one has ended.
    """
    return _PATIENCE_SECONDS * (lost_peer + (not process.is_first_on_host))
