"""Arithmetic on memory: what a model takes and what fits. No torch, nothing is allocated."""
