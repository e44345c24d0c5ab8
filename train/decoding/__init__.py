"""Decodes with the weights where training left them."""
