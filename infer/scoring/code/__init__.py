"""Scores programs by running them with tests in a sandbox."""
