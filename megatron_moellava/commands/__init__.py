"""The command line: one module per command, with its parser and its `main(arguments) -> exit code`.

`moellava NAME`, `python -m megatron_moellava NAME` and a file of `tools/` run the same function. Importing a command
imports neither torch nor transformers nor megatron.core, so that --help answers at once and a signal finds its handler.
"""
