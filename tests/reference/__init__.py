"""Slow, readable versions of what the package computes."""
