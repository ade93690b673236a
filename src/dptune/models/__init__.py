"""Frozen backbones and the adapters trained on them."""
