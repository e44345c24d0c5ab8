"""Defines the tasks that a run can train.

Each is a frozen configuration and a class, registered by name.
"""
