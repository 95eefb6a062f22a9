"""`python -m memscrub`: the command line; knows nothing else."""

from memscrub.cli.app import main

if __name__ == "__main__":
    main()
