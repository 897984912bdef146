"""What mkdocs lacks: README and CHANGELOG as pages, and links from pages to other files of the repository.

A page links to such a file by its relative path, which works where the repository is read. For the site the file is
copied beside the pages and the link is bent to the copy, so that the strict build finds a link to nothing.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
NEEDS = re.compile(r"<!-- (needs: .*?) -->\n")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add README, CHANGELOG and whatever file of the repository a page links to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    linked = {name for file in files.documentation_pages() for name in _outside(file)}
    for name in sorted(linked - set(PAGES)):
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the copies, and above a block what it needs."""
    folder = posixpath.dirname(page.file.src_uri) or "."

    def bent(link: re.Match[str]) -> str:
        name = _in_repository(link["path"], page.file)
        return posixpath.relpath(PAGES.get(name, name.removeprefix("docs/")), folder)

    return NEEDS.sub(r"*\1*\n\n", LINK.sub(bent, markdown))


def _outside(file: File) -> set[str]:
    """Paths of the repository, but those of docs/ itself, that the page links to."""
    names = {_in_repository(link["path"], file) for link in LINK.finditer(file.content_string)}
    return {name for name in names if not name.startswith("docs/")}


def _in_repository(link: str, file: File) -> str:
    """The path from the root of the repository that a page's link leads to."""
    of_docs = file.src_uri not in PAGES.values()
    here = posixpath.join("docs", posixpath.dirname(file.src_uri)) if of_docs else ""
    return posixpath.normpath(posixpath.join(here, link))
