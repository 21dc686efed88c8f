"""Exit codes of an interrupted run, known before anything is imported."""

import subprocess
import sys

from megatron_moellava import exit_codes


def test_the_code_of_an_interruption_is_known_without_any_other_module():
    code = "import sys; before = set(sys.modules); import megatron_moellava.exit_codes; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == {"megatron_moellava", "megatron_moellava.exit_codes"}
    assert exit_codes.INTERRUPTED == 85  # examples/slurm/job.sh requeues on it
