"""Any program on the pretended GPU: python -m tests.gpu.pretend [--engine] -m MODULE ARGUMENT... (or FILE ARGUMENT...)"""

import runpy
import sys

from tests.gpu.pretended import install


def main() -> None:
    arguments = sys.argv[1:]
    install(gpus=1)
    if arguments[0] == "--engine":
        from tests.gpu.engine import install_engine

        install_engine()
        arguments = arguments[1:]
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


main()
