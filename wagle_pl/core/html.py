"""Templates of HTML pages, which need neither scripts nor network."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from wagle_pl.core.text import count, short_number


def templates(*packages: str) -> Environment:
    """Templates of the folders ``templates`` of packages, and those that all pages share."""
    loaders = [PackageLoader(package) for package in (*packages, "wagle_pl.core")]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "digits": repr, "short_number": short_number}
    return environment
