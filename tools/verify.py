"""Compare this program with recordings of the original.

The same as `moellava verify`; the parser is in megatron_moellava/commands/verify.py.
"""

import sys

from megatron_moellava.commands.verify import main

if __name__ == "__main__":
    sys.exit(main())
