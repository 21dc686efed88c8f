"""Benchmarks as data, their scorers, and the runner that puts questions to a generation engine."""
