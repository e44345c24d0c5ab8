"""Tests. The modules in this folder serve the tests of every package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
