"""Samples answers with the weights that are trained, and packs them into a step's batch."""
