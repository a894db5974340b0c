"""Channel pruning of the exported graph."""
