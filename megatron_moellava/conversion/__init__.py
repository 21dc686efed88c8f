"""Checkpoints in and out: plain tensors, row ranges and files; no process group and no model.

`mapping` sits at the bottom of the import order (backbones and towers hold tables of its objects) and must stay free of
torch, and so must this file.
"""
