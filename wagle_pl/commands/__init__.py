"""The commands beside ``fit`` and ``test``: one module a command, thin functions that parse and compute nothing.

A module's ``COMMANDS`` maps a verb to a function; its signature and docstring make the options and their help.
"""
