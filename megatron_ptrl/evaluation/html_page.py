"""HTML pages that need nothing but themselves: no script, no font, no picture from elsewhere."""

import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; }
body { font-family: sans-serif; line-height: 1.7; max-width: 72em; margin: 2em auto; padding: 0 1em; }
.text { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.text { border: 1px solid #8888; padding: 1em; }
.note { color: #808080; }
"""


def write_page(path: Path, title: str, style: str, parts: Sequence[str]) -> Path:
    """Write a page of `parts`, which are HTML already, under the heading `title`; returns `path`.

    style: CSS of its own, behind that of all pages
    """
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    page = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    # A token may be half of a surrogate pair, which UTF-8 cannot hold.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def visible(text: str, line_end: str = "") -> str:
    """Escaped; control characters get their picture, and line breaks are kept behind `line_end`."""
    shown = "".join(
        line_end + "\n" if c == "\n" else chr(0x2400 + ord(c)) if c < " " and c != "\t" else c for c in text
    )
    return html.escape(shown)
