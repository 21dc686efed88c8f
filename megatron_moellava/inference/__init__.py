"""Answers from a trained checkpoint, without DeepSpeed."""

import megatron_moellava.platform  # noqa: F401  must come before megatron.core
