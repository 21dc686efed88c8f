"""`python -m megatron_moellava COMMAND`, the same as `moellava COMMAND`."""

import sys

from megatron_moellava.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
