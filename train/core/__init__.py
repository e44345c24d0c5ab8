"""A training step: world, replica, learner, guard."""
