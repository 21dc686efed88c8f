"""Where the tokens of a data set go in a MoE checkpoint.

The same as `moellava analyze`; the parser is in megatron_moellava/commands/analyze.py.
"""

import sys

from megatron_moellava.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())
