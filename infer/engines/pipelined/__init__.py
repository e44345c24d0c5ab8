"""Decodes on the ranks of a pipeline, where training left the weights."""
