"""``python -m wagle_pl`` is ``wagle``."""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the current folder: a file there must not be taken for a library; main() adds it at the end
    from wagle_pl.cli import main

    main()
