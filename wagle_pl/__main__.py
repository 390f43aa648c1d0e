"""``python -m wagle_pl`` is ``wagle``."""

from wagle_pl import stopping

stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))  # before what takes long to import

from wagle_pl.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
