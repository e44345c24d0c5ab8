"""Generates arithmetic problems with checkable answers, offline and from a seed."""
