"""Learns from sampled answers and frozen networks: samplers, engines, rewards, journals, references, teachers."""
