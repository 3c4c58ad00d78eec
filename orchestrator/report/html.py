"""HTML elements. Text is escaped by default: only an `Html` is inserted unchanged."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

EMPTY = ("", "-")
"""Values of a cell without content."""


class Html(str):
    """Markup that is safe to insert into a page."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return `value` as page text: an `Html` unchanged, anything else escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(html.escape(between).join(text(part) for part in parts))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """`tag("p", "a < b", css="note")` -> `<p class="note">a &lt; b</p>`."""
    written = "".join(
        f' {"class" if key == "css" else key}="{html.escape(value, quote=True)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{join(content)}</{name}>")


def table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = (), marked: Sequence[int] = ()
) -> Html:
    """Return a table in a box that scrolls sideways if it is wider than the page. Columns without any content are left out.

    Args:
        headers: One per column.
        rows: Cells, as many as headers.
        numeric: Indices of the columns that are set to the right.
        marked: Indices of the highlighted rows.
    """
    rows = list(rows)
    # A column that no row fills says nothing.
    kept = [index for index in range(len(headers)) if not rows or any(str(row[index]) not in EMPTY for row in rows)]
    right = {place for place, index in enumerate(kept) if index in set(numeric)}
    headers, rows = [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]
    head = join(tag("th", cell, css="number" if index in right else "", scope="col") for index, cell in enumerate(headers))
    body = join(
        tag(
            "tr",
            *(tag("td", cell, css="number" if index in right else "") for index, cell in enumerate(row)),
            css="marked" if number in marked else "",
        )
        for number, row in enumerate(rows)
    )
    filled = tag("table", tag("thead", tag("tr", head)), tag("tbody", body))
    # Empty class attributes would only make a large table larger.
    return _scrolling(Html(filled.replace(' class=""', "")))


def _scrolling(content: Html) -> Html:
    """Return a scrollable box that the keyboard can scroll too."""
    return tag("div", content, css="scroll", tabindex="0")


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Return name and value pairs, one per line."""
    return tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in pairs))


def details(summary: object, content: object) -> Html:
    return tag("details", tag("summary", summary), content)


def picture(svg: str, caption: object, data: Html) -> Html:
    """Return an inline picture, its caption, and its figures as a table."""
    return tag("figure", _scrolling(Html(svg)), tag("figcaption", caption), details("The same as a table", data))


def section(title: str, content: Html) -> Html:
    return tag("section", tag("h2", title), content, id=_anchor(title))


def link(title: str) -> Html:
    """Return a link to the section with that title."""
    return tag("a", title, href=f"#{_anchor(title)}")


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def paragraph(written: object) -> Html:
    return tag("p", written)


def bullets(items: Iterable[object], *, ordered: bool = False) -> Html:
    return tag("ol" if ordered else "ul", *(tag("li", item) for item in items))
