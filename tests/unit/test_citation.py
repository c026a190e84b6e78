"""How to cite, and what the first page says."""

import re

import yaml
from helpers import ROOT

import diffusion


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == diffusion.__version__
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what its schema requires
    assert all({"type", "title", "authors"} <= reference.keys() for reference in cited["references"])


def test_the_six_lines_on_zero_are_the_same_on_both_pages():
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/zero-init.md")]
    first, second = (re.findall(r"^[1-6]\. .*?(?=^[1-6]\. |^$)", page, re.DOTALL | re.MULTILINE) for page in pages)
    assert len(first) == 6
    assert first == second[:6]
