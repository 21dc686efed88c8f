"""Write WebDataset shards, or describe a data set.

The same as `moellava prepare-data`; the parser is in megatron_moellava/commands/prepare_data.py.
"""

import sys

from megatron_moellava.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
