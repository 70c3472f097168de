"""Templates of pages, one file each in this folder."""

from typing import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str, **filters: Callable) -> Template:
    """Load a template.

    Args:
        name (str): Its file. In ``.html``, all values are escaped unless they are
            marked as safe.
        **filters (Callable): Filters that it uses.

    Returns:
        Template: The template. Rendering it with an undefined name is an error.
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
