"""torchrun for job schedulers: the same options, but signals reach the workers and the exit code is theirs.

Plain torchrun answers SIGTERM by killing its workers after 30 seconds, whether or not their checkpoint is written, does
not pass SIGUSR1 on, and turns every exit code of a worker into 1. A scheduler needs the opposite: the signal must arrive
in the training, and its answer (85: checkpoint written, requeue me; 2: the run as asked for cannot work) must come out.

  moellava launch --nproc-per-node 8 train --stage 2 ...
  moellava launch --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host:29500 train --stage 2 ...

What follows the options is a command of this program, or a script as torchrun takes it. All options: torchrun --help
"""

import os
import signal
import sys

from megatron_moellava.commands.program import COMMANDS, as_called
from megatron_moellava.exit_codes import INTERRUPTED


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
    """Run a job under torchrun and return the exit code of the worker that failed first (0: none did).

    `arguments` are torchrun's; the program may be a command of moellava.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = run.parse_args(arguments)
    if options.training_script in COMMANDS and not os.path.exists(options.training_script):
        options.training_script_args.insert(0, options.training_script)
        options.training_script, options.module = "megatron_moellava", True
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


def main(arguments: list[str] | None = None) -> int:
    """Forward signals to the workers, run the job and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words in ([], ["-h"], ["--help"]):
        print(as_called(__doc__), end="")
        return 0
    # Before torch is imported, which takes seconds in which a signal would otherwise end the job without a word.
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _forward)
    return launch(words)
