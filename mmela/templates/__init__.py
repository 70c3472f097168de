"""Pages as templates, each a file of this folder."""

from typing import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str, **filters: Callable) -> Template:
    """Load a template.

    Args:
        name (str): Its file; ``.html`` has all values escaped but those that
            are marked as safe.
        **filters (Callable): Filters that it uses.

    Returns:
        Template: What ``render`` fills in; it refuses to leave a name open.
    """
    environment = Environment(
        loader=PackageLoader('mmela', 'templates'),
        autoescape=name.endswith('.html'),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)
