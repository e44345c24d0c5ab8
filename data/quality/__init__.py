"""Decides which documents of a corpus are dropped. Imports no torch."""
