"""Tests of train/tasks."""
