"""Run a grid of trainings over several seeds.

The same as `moellava ablate`; the parser is in megatron_moellava/commands/ablate.py.
"""

import sys

from megatron_moellava.commands.ablate import main

if __name__ == "__main__":
    sys.exit(main())
