"""Attention and linear layers as shifts and additions."""
