"""python -m shmsock: the command `shmsock`."""

from shmsock.cli import main

if __name__ == "__main__":
    main()
