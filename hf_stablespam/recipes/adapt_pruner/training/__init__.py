"""Pruning between the steps of a Trainer: in stages, or inside of one run."""
