"""Convert, upcycle, export, compare and inspect checkpoints.

The same as `moellava convert`; the parser is in megatron_moellava/commands/convert.py.
"""

import sys

from megatron_moellava.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
