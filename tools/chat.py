"""Talk with a checkpoint in the terminal.

The same as `moellava chat`; the parser is in megatron_moellava/commands/chat.py.
"""

import sys

from megatron_moellava.commands.chat import main

if __name__ == "__main__":
    sys.exit(main())
