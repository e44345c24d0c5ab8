"""Evaluation of trained weights: tasks, requests, samples and results."""
