"""Make rows of preferences of a checkpoint's own answers.

The same as `moellava make-preferences`; the parser is in megatron_moellava/commands/make_preferences.py.
"""

import sys

from megatron_moellava.commands.make_preferences import main

if __name__ == "__main__":
    sys.exit(main())
