"""Teachers of distillation: stored scores, or a second network in the pipeline."""
