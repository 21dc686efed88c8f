"""Many runs that belong together: the chain of stages, grids of it, and what their results say."""
