"""Megatron-style three-stage MoE-tuning of vision-language models (MoE-LLaVA, arXiv 2401.15947)."""

__version__ = "0.1.0"
