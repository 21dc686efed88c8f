"""Train one stage of MoE-tuning.

The same as `moellava train`; the parser is in megatron_moellava/commands/train.py.
"""

import sys

from megatron_moellava.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
