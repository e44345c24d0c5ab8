"""Programs that run in the sandbox.

They import the standard library and each other only, because nothing else is there.
"""
