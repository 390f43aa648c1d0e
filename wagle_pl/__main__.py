"""``python -m wagle_pl`` is ``wagle``."""

import sys

# the current folder: a file there must not be taken for a library; see CurrentFolder
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

from wagle_pl.core import stopping

# before what takes long to import
stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))

from wagle_pl.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()
