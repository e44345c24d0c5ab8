"""Learns from sampled answers and frozen networks: samplers, rewards, journals, teachers."""
