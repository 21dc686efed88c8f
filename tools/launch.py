"""torchrun for job schedulers: the same options, but signals reach the workers and the exit code is theirs.

Plain torchrun answers SIGTERM by killing its workers after 30 seconds, whether or not their checkpoint is written, does
not pass SIGUSR1 on, and turns every exit code of a worker into 1. A scheduler needs the opposite: the signal must arrive
in tools/train.py, and its answer (85: checkpoint written, requeue me; 2: the run as asked for cannot work) must come out.

    python tools/launch.py --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host:29500 \\
        tools/train.py --stage 2 ...
"""

import os
import signal
import sys

from megatron_moellava.config import INTERRUPTED  # tools/train.py's answer to a signal: not a failure


def _forward(signum: int, _frame) -> None:
    """Hand the signal to this node's workers; they write a checkpoint and exit, and torchrun ends by itself.

    Without workers yet (torch is being imported, or another node is late) there is nothing to save.
    """
    import psutil

    workers = psutil.Process().children()
    if not workers:
        os._exit(INTERRUPTED)
    for worker in workers:
        worker.send_signal(signum)


def exit_code(worker_exitcode: int) -> int:
    """The shell's convention for a worker killed by a signal (-9 -> 137), any other code as it is."""
    return 128 - worker_exitcode if worker_exitcode < 0 else worker_exitcode


def launch(arguments: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(arguments)
    options.signals_to_handle = "SIGINT"  # torch >= 2.9 reads the option, older ones the variable
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"
    try:
        run.run(options)
    except ChildFailedError as error:
        code = exit_code(error.get_first_failure()[1].exitcode)
        if code != INTERRUPTED:
            print(error, file=sys.stderr)
        return code
    return 0


def main() -> int:
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__, "\nAll options: torchrun --help", sep="")
        return 0
    # Before torch is imported, which takes seconds in which a signal would otherwise end the job without a word.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _forward)
    return launch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
