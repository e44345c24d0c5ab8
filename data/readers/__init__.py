"""Finds the files of a corpus and reads their rows."""
