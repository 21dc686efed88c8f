"""From images and a LLaVA JSON to packed, resumable batches. Imports neither the model nor Megatron-Core."""
