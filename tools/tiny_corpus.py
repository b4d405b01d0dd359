"""Text for the bundled model: prose pages out of HTML documentation.

Owns: turning the HTML of three Debian packages into pages of clean prose. A page is a list of
sections; a section is a title, its paragraphs, and its definitions (a function, an option, a
glossary term, with its own paragraphs). Code blocks, tables and navigation are left out.

Everything here is a pure function of the package files: two runs give the same pages, in the same
order. Called by train_tiny.py and tiny_chat.py; knows nothing about tokens or models.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree, html

PYTHON, POSTGRES, SQLITE = "Python", "PostgreSQL", "SQLite"

# Folders below the unpacked packages. Python's package puts its pages under python3.11/.
SOURCE_DIRS = {
    PYTHON: "usr/share/doc/python3.11/html",
    POSTGRES: "usr/share/doc/postgresql-doc-15/html",
    SQLITE: "usr/share/doc/sqlite3",
}

# Indexes, change lists and licence texts: fragments, or words that are not the projects' own.
SKIPPED_PAGES = re.compile(
    r"genindex|search\.html|contents\.html|py-modindex|license\.html|copyright|legalnotice"
    r"|changelog|download|/syntax/|crossref|keyword_index|doclist|matrix|requirements|/release-"
    r"|bookindex|biblio|acknowledgements|hlr|releaselog|oldnews|chronology|cves|features\.html"
    r"|unicode|errcodes-appendix|sql-keywords|toc\.db|th3|books\.html|news\.html"
)

SKIPPED_TAGS = {
    "script", "style", "nav", "table", "pre", "svg", "button", "form", "footer", "head", "img",
    "object", "iframe", "noscript", "sup",
}  # fmt: skip
SKIPPED_CLASSES = re.compile(
    r"\b(nav(header|footer)|headerlink|related|sphinxsidebar|menu|mobile-nav|toc|fancy_toc|toctree"
    r"|contents|indexterm|versionadded|versionchanged|highlight|footnote|nosearch|listlink|imgblock"
    r"|imgcontainer|codeblock|versionmodified|clearer|availability|topic|synopsis|funcsynopsis"
    r"|cmdsynopsis|refsynopsisdiv|author)\b|toctree"
)
BLOCK_TAGS = {
    "p", "div", "section", "ul", "ol", "li", "dl", "dt", "dd", "blockquote", "body", "article",
    "h1", "h2", "h3", "h4", "h5", "h6", "hr", "center", "main", "html", "header", "aside",
}  # fmt: skip

PLAIN = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
        "\u2026": "...", "\u00a0": " ", "\u2212": "-", "\u2011": "-", "\u00ad": "", "\u200b": "",
        "\u00b6": "", "\u2192": "->", "\u2265": ">=", "\u2264": "<=",
    }
)  # fmt: skip


@dataclass(slots=True)
class Definition:
    """A documented name: `name` as one would ask for it, `signature` as the page prints it."""

    name: str
    signature: str
    kind: str
    paragraphs: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Section:
    """A heading with what stands under it. `blocks` holds strings and Definitions in page order."""

    title: str
    level: int
    blocks: list[str | Definition] = field(default_factory=list)

    def paragraphs(self) -> list[str]:
        return [block for block in self.blocks if isinstance(block, str)]

    def definitions(self) -> list[Definition]:
        return [block for block in self.blocks if isinstance(block, Definition)]


@dataclass(slots=True)
class Page:
    source: str
    path: str
    sections: list[Section] = field(default_factory=list)

    @property
    def title(self) -> str:
        return self.sections[0].title if self.sections else ""

    def text(self) -> str:
        """The page as plain text, headings marked with '#' as in Markdown."""
        parts = []
        for section in self.sections:
            if section.blocks:
                parts.append(f"{'#' * min(section.level, 4)} {section.title}")
            for block in section.blocks:
                if isinstance(block, str):
                    parts.append(block)
                else:
                    parts.append("\n".join([block.signature, *block.paragraphs]))
        return "\n\n".join(parts) + "\n"


def squeeze(text: str) -> str:
    """One line of text: typographic signs made plain, runs of space made one space."""
    text = re.sub(r"\s+", " ", text.translate(PLAIN)).strip()
    return re.sub(r"\s+([,.;:)])", r"\1", text)


def is_prose(text: str) -> bool:
    """True for a paragraph of at least one full sentence, mostly letters."""
    if len(text) < 30 or text.count(" ") < 4 or len(text) > 4000:
        return False
    if not (text[0].isupper() or text[0] in "\"'`(" or text.startswith("- ")):
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.82 * len(text) and text.rstrip("\"')`")[-1:] in ".!?:"


def clean_title(text: str) -> str:
    """A heading without its number: '11.2.1. B-Tree' becomes 'B-Tree'."""
    text = squeeze(text)
    text = re.sub(r"^(Chapter|Appendix|Part)\s+[\dA-Z]+\.\s*", "", text)
    return re.sub(r"^([A-Z]\.)?(\d+\.)+\d*\s*|^[A-Z]\.(\d+\.)+\s*", "", text).strip()


class PageReader:
    """Walks one HTML tree in order and gathers sections, paragraphs and definitions."""

    def __init__(self, source: str, path: str) -> None:
        self.page = Page(source, path)
        self.inline: list[str] = []
        self.in_item = False
        self.terms: list[tuple[str, str, str]] = []
        self.definition: Definition | None = None

    def read(self, root: etree._Element) -> Page:
        self.walk(root)
        self.flush()
        return self.page

    def flush(self) -> None:
        """End the running paragraph and keep it if it is prose."""
        text = squeeze("".join(self.inline))
        self.inline.clear()
        if self.in_item and text:
            text = "- " + text
            self.in_item = False
        if not self.page.sections or not is_prose(text):
            return
        if self.definition is not None:
            self.definition.paragraphs.append(text)
        else:
            self.page.sections[-1].blocks.append(text)

    def start_section(self, title: str, level: int) -> None:
        title = clean_title(title)
        if title and len(title) < 120:
            self.page.sections.append(Section(title, level))

    def walk(self, node: etree._Element) -> None:
        if not isinstance(node.tag, str):
            return
        tag = node.tag.rsplit("}", 1)[-1].lower()
        classes = node.get("class") or ""
        if "fancy_title" in classes:
            self.start_section("".join(node.itertext()), 1)
            return
        # A "nosearch" box of a SQLite page wraps its title, so it is entered but not read.
        if "nosearch" in classes.split():
            for child in node:
                self.walk(child)
            self.inline.clear()
            return
        if classes == "refnamediv":
            self.start_reference(node)
            return
        if tag in SKIPPED_TAGS or SKIPPED_CLASSES.search(classes):
            if tag in ("pre", "table") or "highlight" in classes:
                self.flush()
            return
        if re.fullmatch(r"h[1-6]", tag):
            self.flush()
            title = "".join(t for t in self.visible_text(node))
            self.start_section(title, int(tag[1]))
            return
        if tag == "dt":
            self.flush()
            self.start_term(node, classes)
            return
        if tag == "dd":
            self.walk_description(node)
            return
        block = tag in BLOCK_TAGS
        if block:
            self.flush()
        if tag == "li":
            self.in_item = True
        if tag == "br":
            self.inline.append(" ")
        self.inline.append(node.text or "")
        for child in node:
            self.walk(child)
            self.inline.append(child.tail or "")
        if block:
            self.flush()
        if tag == "li":
            self.in_item = False

    def visible_text(self, node: etree._Element) -> Iterator[str]:
        """The text of an inline element without permalinks and index anchors."""
        yield node.text or ""
        for child in node:
            skipped = not isinstance(child.tag, str) or SKIPPED_CLASSES.search(
                child.get("class") or ""
            )
            if not skipped:
                yield from self.visible_text(child)
            yield child.tail or ""

    def start_reference(self, node: etree._Element) -> None:
        """Open a PostgreSQL reference page: 'CREATE INDEX - define a new index'."""
        self.flush()
        name, _, purpose = squeeze("".join(node.xpath("p")[0].itertext())).partition(" - ")
        self.start_section(name, 1)
        if purpose and self.page.sections:
            self.page.sections[-1].blocks.append(f"{name} - {purpose}.")

    def start_term(self, node: etree._Element, classes: str) -> None:
        """Remember a `dt`: its name, its printed form and what kind of thing it is."""
        printed = squeeze("".join(self.visible_text(node)))
        names = [squeeze("".join(t.itertext())) for t in node.xpath("span[@class='term']")]
        if names:
            printed = ", ".join(names)
        name = names[0] if names else printed
        kind = "term"
        if "sig-object" in classes:
            name = node.get("id") or printed
            parent = (node.getparent().get("class") or "").split()
            kind = parent[1] if len(parent) > 1 else "object"
        elif (node.get("id") or "").startswith("GUC-") or "guc-" in (node.get("id") or ""):
            name = name.split(" ")[0]
            kind = "setting"
        if 1 < len(name) < 80:
            self.terms.append((name, printed[:160], kind))

    def walk_description(self, node: etree._Element) -> None:
        """Read a `dd`: its paragraphs belong to the terms just before it."""
        terms, self.terms = self.terms, []
        outer = self.definition
        self.flush()
        if terms and self.page.sections:
            name, printed, kind = terms[0]
            self.definition = Definition(name, printed, kind)
            self.page.sections[-1].blocks.append(self.definition)
        mine = self.definition
        self.inline.append(node.text or "")
        for child in node:
            self.walk(child)
            self.inline.append(child.tail or "")
        self.flush()
        if terms and mine is not None and not mine.paragraphs and self.page.sections:
            for section in reversed(self.page.sections):
                if any(block is mine for block in section.blocks):
                    section.blocks = [b for b in section.blocks if b is not mine]
                    break
        self.definition = outer


def drop_dangling(page: Page) -> None:
    """Cut the tail of a paragraph that announces a code block or table we left out."""

    def cut(text: str, following: str | Definition) -> str:
        announces = isinstance(following, Definition) or following.startswith("- ")
        if announces or not text.endswith(":"):
            return text
        end = max(text.rfind(". "), text.rfind("? "))
        return text[: end + 1] if end > 0 else ""

    for section in page.sections:
        kept: list[str | Definition] = []
        for block, following in zip(section.blocks, [*section.blocks[1:], ""], strict=False):
            if isinstance(block, str):
                text = cut(block, following)
                if text:
                    kept.append(text)
                continue
            pairs = zip(block.paragraphs, [*block.paragraphs[1:], ""], strict=False)
            block.paragraphs = [text for one, after in pairs if (text := cut(one, after))]
            if block.paragraphs:
                kept.append(block)
        section.blocks = kept


def drop_seen(page: Page, seen: set[bytes]) -> None:
    """Remove paragraphs that an earlier page already held."""

    def fresh(text: str) -> bool:
        key = hashlib.sha1(text.lower().encode()).digest()
        known = key in seen
        seen.add(key)
        return not known

    for section in page.sections:
        kept: list[str | Definition] = []
        for block in section.blocks:
            if isinstance(block, str):
                if fresh(block):
                    kept.append(block)
                continue
            block.paragraphs = [text for text in block.paragraphs if fresh(text)]
            if block.paragraphs:
                kept.append(block)
        section.blocks = kept
    page.sections = [s for i, s in enumerate(page.sections) if s.blocks or i == 0]


def read_pages(packages_dir: Path) -> list[Page]:
    """All usable pages of the three packages unpacked under `packages_dir`, paragraphs unique."""
    pages: list[Page] = []
    seen: set[bytes] = set()
    for source, folder in SOURCE_DIRS.items():
        root_dir = packages_dir / folder
        for path in sorted(root_dir.rglob("*.html")):
            relative = "/" + str(path.relative_to(root_dir))
            if SKIPPED_PAGES.search(relative):
                continue
            parser = html.HTMLParser(encoding="utf-8")
            root = html.fromstring(path.read_bytes(), parser=parser)
            body = root.xpath("//div[@role='main']") or root.xpath("//body") or [root]
            page = PageReader(source, relative).read(body[0])
            drop_dangling(page)
            drop_seen(page, seen)
            if len(page.text()) > 300:
                pages.append(page)
    return pages


def is_held_out(page: Page) -> bool:
    """About one page in a hundred, chosen by its path alone so that it never changes."""
    digest = hashlib.sha1(f"{page.source}{page.path}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 97 == 0
