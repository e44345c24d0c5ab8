"""Checkpoints of torch's DCP, read as data: nothing that a file names is imported, called or executed."""
