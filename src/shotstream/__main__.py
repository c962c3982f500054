"""python -m shotstream: the same as the command `shotstream`."""

from shotstream.cli import main

if __name__ == "__main__":
    main()
