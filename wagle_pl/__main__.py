"""``python -m wagle_pl`` is ``wagle``."""

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[
        0
    ]  # the current folder: a file there must not be taken for a library; main() adds it at the end

from wagle_pl.core import stopping

stopping.install(
    dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once)
)  # before what takes long to import

from wagle_pl.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
