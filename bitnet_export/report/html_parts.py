"""Small pieces of HTML that the sections of report.html are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def section(title: str, note: str, body: str) -> str:
    """A card. note: plain text below the title; body: HTML."""
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def tile(name: str, value: str, detail: str, bad: bool = False) -> str:
    """One headline number."""
    return (
        f'<div class="tile{" bad" if bad else ""}"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="detail">{escape(detail)}</div></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """head: titles; one in front with # is a column of numbers, with + of sentences, the first
    of names. rows: cells, as HTML.
    """
    kinds = [{"#": "num", "+": "wide"}.get(title[:1], "") for title in head]
    kinds[0] = kinds[0] or "name"
    titles = "".join(
        f'<th class="{kind}">{escape(title.lstrip("#+"))}</th>'
        for title, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{c}</td>' for c, k in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def breakable(name: str) -> str:
    """A dotted or underscored name that may break after each part."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def mark(passed: bool) -> str:
    """A verdict that does not rest on colour alone."""
    css, word = ("ok", "✓ pass") if passed else ("no", "✗ fail")
    return f'<span class="mark {css}">{word}</span>'


def folded(summary: str, body: str) -> str:
    """Something to open on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
