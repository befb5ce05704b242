"""Machinery of the attacks on transformers."""
