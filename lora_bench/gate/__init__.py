"""Comparing a run with an earlier one."""
