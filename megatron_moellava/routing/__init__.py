"""What the routers do: one observer for training, analysis and serving, and what its numbers mean."""

import megatron_moellava.platform  # noqa: F401  must come before megatron.core
