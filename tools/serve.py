"""Serve a checkpoint: web page and OpenAI-compatible API.

The same as `moellava serve`; the parser is in megatron_moellava/commands/serve.py.
"""

import sys

from megatron_moellava.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
