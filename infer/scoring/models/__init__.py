"""Scores answers by models: votes of a judge, and reward models. No torch here."""
