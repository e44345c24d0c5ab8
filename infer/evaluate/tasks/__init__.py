"""Evaluation tasks. Each module registers one."""
