"""Look at this machine: what it has, and whether runs work here.

The same as `moellava doctor`; the parser is in megatron_moellava/commands/doctor.py.
"""

import sys

from megatron_moellava.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
