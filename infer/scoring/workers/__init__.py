"""Runs scorers in processes and threads that cannot stop a run."""
