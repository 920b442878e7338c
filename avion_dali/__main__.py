"""`python -m avion_dali COMMAND` and `torchrun -m avion_dali COMMAND`: the same as `avion-dali COMMAND`."""

from avion_dali.cli.main import console

if __name__ == "__main__":
    console()
