"""The benchmarks that the quickstart makes itself."""
