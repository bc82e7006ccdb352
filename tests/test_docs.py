"""The docs site: its navigation, its pictures, its links, and what the generator makes of it."""

import inspect
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from helpers import ROOT

SOURCE = ROOT / "docs-src"
DOCS = SOURCE / "docs"
SHOWN = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
DRAWS = re.compile(
    r"python (docs-src/figures/\w+\.py|(?:cifar10|imagenet)/eval\.py|-m early_exit\.compare"
    r"|benchmarks/serving\.py)"
)


def pages_of(nav: object) -> Iterator[str]:
    """The pages of a `nav` of mkdocs.yml."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(item)


FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks, which hold comments that look like headings."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that the site and a code-hosting site both make."""
    hosted, built = set(), set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        hosted.add(words.replace(" ", "-"))
        built.add(re.sub(r"[-\s]+", "-", words))
    return hosted & built


def dead_anchors(page: Path) -> list[str]:
    """Links of a page to anchors that the target does not have."""
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", prose(page))
    return [
        f"{target}#{anchor}"
        for target, anchor in links
        if "://" not in target and anchor not in anchors(page.parent / target if target else page)
    ]


def sections(page: Path) -> list[str]:
    """A page cut before each heading; comments in fenced blocks are not headings."""
    indented = FENCED.sub(lambda block: re.sub("^#", " #", block[0], flags=re.M), page.read_text())
    return re.split(r"^(?=#+ )", indented, flags=re.MULTILINE)


def undrawn(page: Path) -> list[str]:
    """Pictures whose section has no command that draws pictures."""
    return [
        picture
        for section in sections(page)
        if not DRAWS.search(section)
        for picture in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", section)
    ]


class Page(HTMLParser):
    """What a built page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.styling = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.styling = tag == "style"
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and "canonical" not in given.get("rel", ""):
            self.loads.append(given.get("href", ""))
        for name in ("src", "data", "poster", "srcset") if tag != "a" else ():
            if name in given:
                self.loads += [part.split()[0] for part in given[name].split(",") if part.strip()]
        self.loads += addresses(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.styling:
            self.loads += addresses(data)


def addresses(css: str) -> list[str]:
    """What a style sheet loads."""
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", css)
    return [one or other for one, other in found]


def is_elsewhere(address: str) -> bool:
    """Whether an address is on the network."""
    return bool(urlsplit(address).netloc)


def dead_links(site: Path) -> list[str]:
    """Links of a site's pages, and files they load, that do not exist within it."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.netloc or parts.scheme:
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")) if parts.path else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            anchor = unquote(parts.fragment)
            if not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].ids
            ):
                dead.append(f"{path.relative_to(site)}: {address}")
    return dead


def loaded_from_elsewhere(site: Path) -> list[str]:
    """Scripts, styles, fonts and pictures that a site's pages and style sheets load from the
    network."""
    loads = {path: Page(path).loads for path in site.rglob("*.html")}
    loads |= {path: addresses(path.read_text()) for path in site.rglob("*.css")}
    return [
        f"{path.relative_to(site)}: {address}"
        for path, some in loads.items()
        for address in some
        if is_elsewhere(address)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built by the command that README shows, from a copy."""
    root = tmp_path_factory.mktemp("docs")
    unbuilt = shutil.ignore_patterns("site", ".cache", "__pycache__")
    for folder in ("docs-src", "early_exit"):
        shutil.copytree(ROOT / folder, root / folder, ignore=unbuilt)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "docs-src/mkdocs.yml"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (root / "docs-src/site").resolve()


def test_the_navigation_holds_every_page_once():
    listed = list(pages_of(yaml.safe_load((SOURCE / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_module_of_the_library_is_on_an_api_page():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    paths = [path.relative_to(ROOT) for path in (ROOT / "early_exit").rglob("[!_]*.py")]
    missing = [
        str(path)
        for path in paths
        if f"`{path}`" not in pages
        and not re.search(
            rf"^::: {re.escape('.'.join(path.with_suffix('').parts))}$", pages, re.MULTILINE
        )
    ]
    assert len(paths) > 60 and missing == []


def test_every_module_on_an_api_page_exists():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE):
        pkgutil.resolve_name(name)
    for path in re.findall(r"`(early_exit/\S+\.py)`", pages):
        assert (ROOT / path).is_file(), path


def test_every_picture_is_shown():
    shown = {
        (page.parent / target).resolve()
        for page in SHOWN
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text())
    }
    assert {path for path in (DOCS / "imgs").iterdir() if path.resolve() not in shown} == set()


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_picture_is_shown_with_the_command_that_draws_it(page):
    assert undrawn(page) == []


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_anchors_exist(page):
    assert dead_anchors(page) == []


def test_a_dead_anchor_and_a_picture_without_a_command_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# Other\n\n## One, two\n\n```\n# Three\n```\n")
    page.write_text(
        "# Page\n\n[a](other.md#one-two) [b](other.md#three) [c](#page) [d](#none)\n\n"
        "![drawn](a.png)\n\n```\n# the picture\npython docs-src/figures/oracle.py runs/x\n```\n\n"
        "## Next\n\n![undrawn](b.png) by `python cifar10/trainer.py`\n"
    )
    assert dead_anchors(page) == ["other.md#three", "#none"]
    (tmp_path / "drawn.md").write_text("# A\n\n![x](a.png) by `python imagenet/eval.py runs/x`\n")
    assert (undrawn(page), undrawn(tmp_path / "drawn.md")) == (["b.png"], [])


@pytest.mark.slow
def test_the_built_site_has_no_dead_link(site):
    assert len(list(site.rglob("*.html"))) > len(list(DOCS.rglob("*.md")))  # and one for errors
    assert dead_links(site) == []


@pytest.mark.slow
def test_the_built_site_loads_nothing_from_the_network(site):
    assert loaded_from_elsewhere(site) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ('<a href="nowhere.html">', True),
        ('<a href="sub/page.html#nothing">', True),
        ('<a href="#nothing">', True),
        ('<img src="nowhere.png">', True),
        ('<a href="sub/page.html#there">', False),
        ('<a href="/sub/page.html">', False),
        ('<a href="https://example.org/nowhere.html">', False),
    ],
)
def test_a_dead_link_of_a_site_is_found(tmp_path, planted, found):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/page.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "index.html").write_text(planted)
    assert bool(dead_links(tmp_path)) == found


@pytest.mark.parametrize(
    ("name", "planted", "found"),
    [
        ("a.html", '<script src="https://example.org/a.js"></script>', True),
        ("a.html", '<link rel="stylesheet" href="//example.org/a.css">', True),
        ("a.html", '<img srcset="a.png 1x, https://example.org/b.png 2x">', True),
        ("a.html", '<style>body { background: url("http://example.org/a.png") }</style>', True),
        ("a.css", '@import "https://example.org/a.css";', True),
        ("a.css", "@font-face { src: url(https://example.org/a.woff2) }", True),
        ("a.html", '<a href="https://example.org/a.html">', False),
        ("a.html", '<img src="a.png">', False),
        ("a.css", "div { background: url(data:image/svg+xml;charset=utf-8,x) }", False),
    ],
)
def test_files_from_the_network_are_found(tmp_path, name, planted, found):
    (tmp_path / name).write_text(planted)
    assert bool(loaded_from_elsewhere(tmp_path)) == found


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("network", "model.network.MultiExitNetwork"),
        ("network", "model.network.MultiExitNetwork.forward"),
        ("policy", "inference.policy.Policy"),
        ("policy", "inference.infer.infer"),
        ("training", "config.OptimConfig"),
    ],
)
def test_docstrings_are_on_the_api_pages(site, page, name):
    built = (site / f"api/{page}.html").read_text()
    _, heading, after = built.partition(f'id="early_exit.{name}" class="doc doc-heading"')
    text, _, _ = after.partition('class="doc doc-heading"')
    assert heading
    docstring = inspect.getdoc(pkgutil.resolve_name(f"early_exit.{name}"))
    # the first words, up to what the page sets in another font
    plain = re.match(r"[\w ,]+", docstring)[0]
    assert len(plain) > 10 and plain in " ".join(text.split())


@pytest.mark.parametrize(
    ("page", "name", "argument"),
    [
        ("network", "model.network.MultiExitNetwork.forward", "images"),
        ("policy", "inference.policy.Policy", "temperatures"),
    ],
)
def test_arguments_are_a_list_on_the_api_pages(site, page, name, argument):
    built = (site / f"api/{page}.html").read_text()
    _, _, after = built.partition(f'id="early_exit.{name}" class="doc doc-heading"')
    text, _, _ = after.partition('class="doc doc-heading"')
    assert re.search(rf"<li>\s*(<p>)?<code>{argument}</code>: ", text)


@pytest.mark.parametrize(
    ("docstring", "shown"),
    [
        ("Which rows exit.", "Which rows exit."),
        ("a: one; b: two,\n    in two lines.", "- `a`: one\n- `b`: two, in two lines."),
        ("a: one. Returns c: three.", "- `a`: one.\n\nReturns c: three."),
        ("joint: all at once; a: one", "joint: all at once; a: one"),
    ],
)
def test_explained_arguments_become_a_list(docstring, shown):
    explained = runpy.run_path(str(SOURCE / "docstrings.py"))["explained"]
    assert explained(docstring, {"a", "b"}) == shown
