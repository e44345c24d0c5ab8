"""A page that shows sampled answers, their tokens and their rewards."""
