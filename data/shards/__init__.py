"""Builds folders of shards: units of work, worker processes, and the report. Imports no torch."""
