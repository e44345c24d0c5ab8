"""Defines the tasks that a run can train: a frozen configuration and a class each, registered by name."""
