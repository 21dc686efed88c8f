"""The vision-language model, built from megatron-core's modules."""

import megatron_moellava.platform  # noqa: F401  must come before megatron.core
