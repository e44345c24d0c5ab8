"""What a training loop does now and then: validation, evaluation, pictures, samples and checkpoints."""
