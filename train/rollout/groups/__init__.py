"""Draws prompts, compares the answers of each group by their rewards, and keeps them in a journal."""
