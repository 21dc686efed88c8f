"""Exit codes that more than one command knows; alone in its file, since a command needs them before it imports anything."""

INTERRUPTED = 85  # after a signal: a checkpoint is written, run the same command again
