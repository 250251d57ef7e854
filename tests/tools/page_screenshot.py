"""Chats on a server's page in a browser without a screen, and keeps the last sight of it; prints what went wrong in it.

pip install PyQt6-WebEngine      # into an environment of its own: it brings a Chromium of 550 MB
scripts/serve.py --draft dflash &
python tests/tools/page_screenshot.py http://127.0.0.1:8000 page.png "def fib(n):" "class Stack:"
"""

import json
import os
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
# It runs as root in containers, where Chromium's own sandbox does not start.
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

SETTINGS = {"max_tokens": 100}
POLL_MS, MOST_POLLS, PAINT_MS = 100, 300, 500


class Console(QWebEnginePage):
    """Faults of the script, and what the page's policy has kept out."""

    def javaScriptConsoleMessage(self, level, message, line, source):
        print(f"console: {message} ({source}:{line})", file=sys.stderr)


class Browser:
    def __init__(self) -> None:
        self._view = QWebEngineView()
        self._view.setPage(Console(self._view))
        self._view.resize(900, 760)
        self._view.show()

    def open(self, url: str) -> None:
        loop = QEventLoop()
        self._view.loadFinished.connect(loop.quit)
        self._view.load(QUrl(url))
        loop.exec()

    def run(self, script: str):
        loop, results = QEventLoop(), []
        self._view.page().runJavaScript(script, lambda result: (results.append(result), loop.quit()))
        loop.exec()
        return results[0]

    def wait_for(self, condition: str) -> None:
        for _ in range(MOST_POLLS):
            if self.run(condition):
                return
            self.pause(POLL_MS)
        raise SystemExit(f"waited in vain for {condition}")

    def pause(self, milliseconds: int) -> None:
        loop = QEventLoop()
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def save(self, path: str) -> None:
        self.pause(PAINT_MS)
        if not self._view.grab().save(path):
            raise SystemExit(f"{path} cannot be written")


def main(url: str, path: str, *messages: str) -> None:
    app = QApplication(sys.argv[:1])
    browser = Browser()
    browser.open(url)
    browser.wait_for("document.title !== 'Chat'")
    for name, value in SETTINGS.items():
        browser.run(f"find('{name}').value = {value}")
    for message in messages:
        browser.run(f"input.value = {json.dumps(message)}; find('form').requestSubmit()")
        browser.wait_for("running === null")
    browser.save(path)
    for figures in browser.run("[...document.querySelectorAll('.figures, .fault')].map((one) => one.textContent)"):
        print(figures)
    del browser, app


if __name__ == "__main__":
    main(*sys.argv[1:])
