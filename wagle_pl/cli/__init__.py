"""The ``wagle`` command."""
