"""Layers with 4-bit operands: linear layers, mixtures' experts, and LoRA that is merged before rounding."""
