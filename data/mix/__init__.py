"""Mixes sources by weight: manifest, order of the sequences, and the sequences of a prepared folder."""
