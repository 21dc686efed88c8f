"""Ask a checkpoint the paper's benchmarks.

The same as `moellava evaluate`; the parser is in megatron_moellava/commands/evaluate.py.
"""

import sys

from megatron_moellava.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
