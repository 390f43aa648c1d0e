"""``python -m wagle_pl`` is ``wagle``."""

from wagle_pl.cli import main

if __name__ == "__main__":
    main()
