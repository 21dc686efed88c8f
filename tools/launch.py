"""torchrun for job schedulers.

The same as `moellava launch`; the parser is in megatron_moellava/commands/launch.py.
"""

import sys

from megatron_moellava.commands.launch import main

if __name__ == "__main__":
    sys.exit(main())
