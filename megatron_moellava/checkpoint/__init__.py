"""The folder of a run and what vouches for it: names, description, digests. Plain files, no model."""
