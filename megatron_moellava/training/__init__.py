"""Training: stages, optimizer, checkpoints, metrics and the loop."""

import megatron_moellava.platform  # noqa: F401  must come before megatron.core
