"""Engines that continue prompts with a model's weights."""
