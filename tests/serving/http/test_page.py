"""The page at /: it is there for everybody, needs nothing from elsewhere, and lets nothing else run."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from mimo_jax.serving.http.app import AppOptions, create_app

REFERENCES = {"href", "src", "srcset", "action", "formaction", "data", "poster", "background", "ping", "manifest"}


class Page(HTMLParser):
    """What a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.attributes: set[str] = set()
        self.ids: set[str] = set()
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.attributes |= {name for name, _ in attrs}
        self.ids |= {value for name, value in attrs if name == "id"}
        self.references += [value for name, value in attrs if name in REFERENCES]

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inline:
            self.inline[self._open].append(data)


@pytest.fixture(scope="module")
def reply(service):
    """Of a server whose other routes want a key."""
    return TestClient(create_app(service, AppOptions(keys={"ann": "secret"}))).get("/")


@pytest.fixture(scope="module")
def page(reply):
    return Page(reply.text)


def test_everybody_gets_it(reply):
    """The key is typed into it, so it needs none; and it is never an old one."""
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_its_policy_lets_its_own_script_run_and_no_other(reply, page):
    """As a browser does it: by the hash of what is between the tags."""
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    for tag, texts in page.inline.items():
        (text,) = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} <= policy.keys()
    assert {*policy.values()} == {"'none'"}


def test_it_is_one_file(reply, page):
    """Nothing is fetched but from the server it came from; nothing inline escapes the policy's hashes."""
    assert page.references == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", reply.text)
    assert not {name for name in page.attributes if name == "style" or name.startswith("on")}


def test_what_the_model_writes_is_never_markup(page):
    """No way from text to elements; and no place where a key would outlive the page."""
    (script,) = page.inline["script"]
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(|setHTML"
    assert not re.search(ways, script)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", script)


def test_the_script_finds_what_it_looks_for(page):
    (script,) = page.inline["script"]
    assert {*re.findall(r'find\("(\w+)"\)', script)} <= page.ids


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(page, tmp_path):
    (script,) = page.inline["script"]
    (tmp_path / "page.js").write_text(script)
    done = subprocess.run(["node", "--check", "page.js"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
