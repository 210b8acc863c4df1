"""What the pages share: text made safe for HTML, figures in words, pictures inlined, the style sheet.

Pages are one file each, without a script or the network. What models said is untrusted text and escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image


def escaped(value: object) -> str:
    """Escaped; what cannot be printed, and what could turn the direction of the line around, becomes a mark."""
    return html.escape("".join(c if c.isprintable() else "�" for c in str(value)))


def said(words: str) -> str:
    """A text in quotation marks, escaped."""
    return f"“{escaped(words)}”" if words.strip() else "<em>nothing</em>"


def percent(value: float) -> str:
    """0.4321 as 43.2%."""
    return f"{100 * value:.1f}%"


def bounds_of(bounds: Iterable[float] | None) -> str:
    """An interval of fractions in per cent."""
    return "–".join(f"{100 * b:.1f}" for b in bounds) if bounds else ""


def picture_uri(image: Image.Image, kind: str = "PNG", side: int = 0) -> str:
    """A data URI of a picture, made smaller so that no side is longer than `side` pixels (0: as it is)."""
    if side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names its rows; cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #595959; --line: #d9d9d9; --right: #00507d; --wrong: #8f3a00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1040px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h1, h2, h3, h4, th { overflow-wrap: normal; }
h4 small { font-weight: normal; color: var(--soft); margin-left: .4rem; }
p { margin: .5rem 0; max-width: 44rem; }
.note, figcaption, .none { color: var(--soft); font-size: .875rem; }
.note { max-width: 48rem; }
.words { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
.words > div { flex: 1 1 28rem; max-width: 44rem; }
.sample { margin: .5rem 0; width: 216px; }
.sample .scene { width: 216px; height: 216px; margin-bottom: .4rem; }
figure { margin: 1rem 0; }
figure img:not(.scene), .panels img { display: block; width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center; }
figure.beside img { width: 360px; max-width: 100%; }
.beside figcaption { flex: 1 1 16rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 1rem; }
.panels img { max-width: 420px; }
table { border-collapse: collapse; width: 100%; max-width: 52rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  line-height: 1.35; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { font-size: .875rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
td:nth-child(3):not(:last-child) { font-weight: 700; }
td small, tbody th small { display: block; font-size: .78rem; font-weight: normal; color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.card { display: flex; gap: .9rem; padding: .75rem; border: 1px solid var(--line); border-left: 5px solid var(--right);
  border-radius: 4px; background: #fbfbfb; margin-bottom: .75rem; }
.card.wrong { border-left: 5px double var(--wrong); background: #fff9f4; }
.card > div { flex: 1; min-width: 0; }
.scene { width: 144px; height: 144px; flex: none; image-rendering: pixelated; border-radius: 2px; }
.card .badge { font-weight: 700; font-size: .9rem; color: var(--right); }
.card.wrong .badge { color: var(--wrong); }
.card p { margin: 0 0 .35rem; line-height: 1.4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .75rem; margin: 0; font-size: .9rem;
  line-height: 1.4; }
dt { color: var(--soft); }
dd { margin: 0; }
.made { gap: .3rem 1.25rem; }
@media (max-width: 719px) {
  main { padding: 1rem .75rem 2rem; }
  h1 { font-size: 1.35rem; }
  .pair { grid-template-columns: 1fr; gap: 0; }
  table { font-size: .875rem; }
  th, td { padding: .35rem .25rem; }
  thead th, td small, tbody th small { font-size: .72rem; }
  .card .scene { width: 108px; height: 108px; }
  .made { grid-template-columns: 1fr; gap: 0; }
  .made dd { margin-bottom: .5rem; }
}
"""
