"""Rejection sampling: reads problems, keeps samples with their scores, and selects among them."""
