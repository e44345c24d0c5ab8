"""Programs that are run by hand: benchmarks, a first day on a GPU, faults, arithmetic of post-training, needles."""
