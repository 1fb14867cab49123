"""Pieces of a page: tables, chapters, and the whole. What a caller hands over is text, unless its type says HTML."""

from collections.abc import Sequence
from typing import NamedTuple

from recap_ds.report.page_style import style_sheet
from recap_ds.report.svg import escape

# A page that loads nothing and runs nothing; films are inside of it, or links.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; img-src data:"


class Html(str):
    """Text that is HTML already; all other text is escaped on its way into a page."""

    __slots__ = ()


class Cell(NamedTuple):
    text: str
    best: bool = False


class Chapter(NamedTuple):
    title: str
    body: str  # HTML


def markup(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def breakable(key: str) -> Html:
    """A setting's name, which may go on in a new line after a dot or an underscore."""
    return Html(escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> Html:
    """The first column names the row; columns of numbers stand to the right. '' where there are no rows."""
    if not rows:
        return Html("")
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    figures = [column > 0 and all(_is_number(row[column].text) for row in cells) for column in range(len(header))]
    head = "".join(
        f'<th scope="col"{_class(figure, False)}>{markup(name)}</th>'
        for name, figure in zip(header, figures, strict=True)
    )
    body = "".join(f"<tr>{_row(row, figures)}</tr>" for row in cells)
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Sequence[Cell], figures: Sequence[bool]) -> str:
    cells = [
        f"<td{_class(figure, cell.best)}>{markup(cell.text)}</td>" for cell, figure in zip(row, figures, strict=True)
    ]
    return "".join([f'<th scope="row">{markup(row[0].text)}</th>', *cells[1:]])


def _class(figure: bool, best: bool) -> str:
    names = [name for name, given in (("figure", figure), ("text", not figure), ("best", best)) if given]
    return f' class="{" ".join(names)}"'


def _is_number(text: str) -> bool:
    return text in ("-", "") or text.lstrip("+-[")[:1].isdigit()


def grid(charts: Sequence[str]) -> Html:
    return Html(f'<div class="grid">{"".join(charts)}</div>' if charts else "")


def paragraph(text: str) -> Html:
    return Html(f"<p>{markup(text)}</p>")


def folded(summary: str, body: str) -> Html:
    return Html(f"<details><summary>{escape(summary)}</summary>{body}</details>")


def whole_page(title: str, subtitle: str, chapters: Sequence[Chapter]) -> str:
    present = [(f"part{number}", chapter) for number, chapter in enumerate(chapters) if chapter.body]
    links = "".join(f'<li><a href="#{name}">{escape(chapter.title)}</a></li>' for name, chapter in present)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(chapter.title)}</h2>{chapter.body}</section>'
        for name, chapter in present
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="referrer" content="no-referrer"><title>{escape(title)}</title>'
        f"<style>{style_sheet()}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(subtitle)}</p><nav aria-label="Parts of this page"><ul>{links}</ul></nav></header>'
        f"\n<main>{body}</main></body></html>\n"
    )
