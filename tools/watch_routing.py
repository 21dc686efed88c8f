"""Watch the routers of a run while it trains.

The same as `moellava watch`; the parser is in megatron_moellava/commands/watch.py.
"""

import sys

from megatron_moellava.commands.watch import main

if __name__ == "__main__":
    sys.exit(main())
