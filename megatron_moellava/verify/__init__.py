"""Compare this program with recorded outputs of the original MoE-LLaVA, number by number.

`command.py` runs the cases of a folder of recordings; each other file is one kind of case.
"""
