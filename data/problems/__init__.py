"""Reads problems: prompts with what a right answer must satisfy. No torch here."""
