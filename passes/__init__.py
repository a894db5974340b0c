"""The rewrites: one pass per file."""
