"""Real models to measure in: shapes by name, checkpoints by path, and any subject put into their linear layers."""
