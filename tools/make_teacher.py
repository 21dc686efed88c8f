"""Write a teacher's logits for a distillation.

The same as `moellava make-teacher`; the parser is in megatron_moellava/commands/make_teacher.py.
"""

import sys

from megatron_moellava.commands.make_teacher import main

if __name__ == "__main__":
    sys.exit(main())
