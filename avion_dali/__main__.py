"""`python -m avion_dali COMMAND` and `torchrun -m avion_dali COMMAND`: the same as `avion-dali COMMAND`."""

# `python -m` searches the working directory first, where a folder of data may hold files with names of modules.
import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_IS_SAFE = getattr(sys.flags, "safe_path", False)  # Python 3.11
if not _IS_SAFE and os.path.realpath(sys.path[0] or ".") == os.path.realpath(".") != _ROOT:
    del sys.path[0]

from avion_dali.cli.main import console  # noqa: E402 - only now is it the installed one

if __name__ == "__main__":
    console()
