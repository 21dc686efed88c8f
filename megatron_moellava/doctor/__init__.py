"""`moellava doctor`: what this machine has, and what each of it means for a run."""
