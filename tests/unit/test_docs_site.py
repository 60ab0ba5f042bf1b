"""The documentation is built as a site that needs no other host, and lists what it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DECISIONS = REPOSITORY / "docs" / "decisions"
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_FETCHED = {"canonical", "next", "prev"}
"""Relations of `link` elements that a browser does not follow by itself."""


class Assets(HTMLParser):
    """Collects the addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(FETCHED.get(tag, ""))
        if address and given.get("rel") not in NOT_FETCHED:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_built(site: Path):
    pages = [p for p in (REPOSITORY / "docs").rglob("*.md") if p.name != "index.md"]
    for page in pages:
        built = site / page.relative_to(REPOSITORY / "docs").with_suffix("") / "index.html"
        assert built.is_file(), page


def test_pages_fetch_nothing_from_other_hosts(site: Path):
    found = 0
    for page in site.rglob("*.html"):
        assets = Assets()
        assets.feed(page.read_text(encoding="utf-8"))
        foreign = [a for a in assets.addresses if re.match(r"(\w+:)?//", a)]
        assert not foreign, f"{page}: {foreign}"
        found += len(assets.addresses)
    assert found

    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(\w+:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_beside_the_site_lead_somewhere(name: str):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_of_decisions_lists_each():
    index = (DECISIONS / "index.md").read_text(encoding="utf-8")
    records = sorted(p for p in DECISIONS.glob("*.md") if p.name != "index.md")
    assert [p.name for p in records] == re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", index)

    for number, record in enumerate(records, 1):
        text = record.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix(f"# {number:04}: ")
        assert f"| {number:04} | [{title}]({record.name}) |" in index, record
        sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert sections == ["Context", "Options and numbers", "Decision"], record
