"""The documentation: it builds strictly, its links hold, and its generated parts are what the code says."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class _Page(HTMLParser):
    """Addresses that a page points to, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical", reason="the documentation's generator is missing: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # Copies, because the generator does not follow links.
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", folder)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "site"


def _broken(site: Path, pages: dict[Path, _Page]) -> list[str]:
    broken = []
    for path, page in pages.items():
        # The page for addresses that do not exist is served from any folder.
        for target in page.targets if path.name != "404.html" else ():
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            where = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not where.exists():
                broken.append(f"{path.relative_to(site)}: {target}")
            elif parts.fragment and where in pages and parts.fragment not in pages[where].anchors:
                broken.append(f"{path.relative_to(site)}: {target} (no such place on that page)")
    return broken


def test_no_link_of_the_site_is_broken(site):
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 10
    assert _broken(site.resolve(), pages) == []


def test_the_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?https?://(?!excise)""")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not [m[0] for m in loaded.finditer(text) if "rel=canonical" not in m[0]], path


def test_no_page_shows_the_marks_of_code(site):
    """Where a block of code is opened wrongly, its backticks stand on the page."""
    for path in site.rglob("*.html"):
        prose = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "``" not in prose, path


def test_every_page_stands_in_the_navigation():
    listed = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} == listed


def test_links_of_the_readme_and_of_the_pages_on_contributing_hold():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            assert urlsplit(target).scheme or (ROOT / target).exists(), f"{name}: {target}"


def test_generated_parts_of_the_pages_are_what_the_code_says():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
