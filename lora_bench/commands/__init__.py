"""The verbs of the command line, each with its options."""
