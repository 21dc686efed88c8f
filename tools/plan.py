"""Plan a run: layouts that fit, their memory, time and cost.

The same as `moellava plan`; the parser is in megatron_moellava/commands/plan.py.
"""

import sys

from megatron_moellava.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
