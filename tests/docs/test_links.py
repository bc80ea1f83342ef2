"""Links between pages lead somewhere, and files that are named exist."""

import re

import pytest

from tests.docs.pages import FENCE, PAGES, ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Files of the repository, named in running text or code; * may stand for several.
NAMED = re.compile(r"`((?:bitnet_export|tests|tools|plugins|docs)/[\w./*-]+\.(?:py|md|cu|h|cpp))`")


def anchors(page):
    """What GitHub makes of the page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def every(pattern):
    for page in PAGES:
        for match in pattern.finditer(page.read_text(encoding="utf-8")):
            yield pytest.param(page, match[1], id=f"{page.relative_to(ROOT)} {match[1]}")


@pytest.mark.parametrize(("page", "link"), every(LINK))
def test_a_link_leads_somewhere(page, link):
    if re.match(r"[a-z]+:", link):
        return  # outside
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


@pytest.mark.parametrize(("page", "name"), every(NAMED))
def test_a_file_that_is_named_exists(page, name):
    assert list(ROOT.glob(name))
