"""Shapes, parameters and FLOPs of a run, for conversion, planner, pipeline split and training log alike."""
