"""Measures what post-training recipes learn."""
