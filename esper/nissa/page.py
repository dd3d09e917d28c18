"""One HTML file that needs nothing else, now or in ten years: templates, style sheet, charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from esper.files import write_whole

DESK, PHONE = 860.0, 350.0


def write_page(template: str, context: Mapping[str, Any], target: Path) -> Path:
    """Fill a template of this room and write it to `target`, whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    html = environment.get_template(template).render(context)
    write_whole(target, html.encode())
    return target


def both(draw: Callable[[float], str]) -> Markup | None:
    """The chart for a desk and for a phone; the page shows one of them."""
    wide = draw(DESK)
    if not wide:
        return None
    # Everything that came from outside was escaped where the SVG was put together.
    return Markup(f'<div class="desk">{wide}</div><div class="phone">{draw(PHONE)}</div>')
