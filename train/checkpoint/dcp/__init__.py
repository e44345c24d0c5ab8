"""Reads checkpoints of torch's DCP as data.

It never imports, calls or executes anything that a file names.
"""
