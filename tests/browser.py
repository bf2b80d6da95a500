"""Look at a page in a browser: `python tests/browser.py PAGE.html PICTURE.png [WIDTH HEIGHT]`.

Prints as JSON what a person would stumble over: what it asked the network for, what its console
said, links to nowhere, pictures without a size, and text that sticks out of the window.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineUrlRequestInfo,
    QWebEngineUrlRequestInterceptor,
)
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

LOOK = """(() => {
  const all = [...document.querySelectorAll('body *')];
  const shown = all.filter(e => e.getClientRects().length && getComputedStyle(e).visibility === 'visible');
  const anchors = [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute('href').slice(1));
  const inner = e => { for (let p = e.parentElement; p; p = p.parentElement)
      if (/auto|scroll|hidden/.test(getComputedStyle(p).overflowX)) return true; return false; };
  return {
    title: document.title,
    text: document.body.innerText,
    width: document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    out: shown.filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !inner(e))
              .map(e => e.tagName + ': ' + e.textContent.slice(0, 60)),
    nowhere: anchors.filter(id => id && !document.getElementById(id)),
    flat: shown.filter(e => /^(img|svg)$/i.test(e.tagName))
               .filter(e => !(e.getBoundingClientRect().width > 20 && e.getBoundingClientRect().height > 20)).length,
    pictures: shown.filter(e => /^(img|svg)$/i.test(e.tagName)).length,
    small: shown.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
                .filter(e => parseFloat(getComputedStyle(e).fontSize) < 9).length,
  };
})()"""  # noqa: E501 not Python


class Requests(QWebEngineUrlRequestInterceptor):
    """Remembers what a page asks for beside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def interceptRequest(self, info: QWebEngineUrlRequestInfo) -> None:
        self.seen.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Remembers what the console said."""

    def __init__(self, profile: QWebEngineProfile) -> None:
        super().__init__(profile)
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, *message: Any) -> None:  # noqa: ANN401 Qt's
        self.said.append(str(message[1]))


def main(page_file: Path, picture: Path, width: int = 1000, height: int = 1400) -> None:
    app = QApplication(sys.argv[:1])
    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    view, page = QWebEngineView(), Page(profile)
    view.setPage(page)
    view.resize(width, height)
    url = QUrl.fromLocalFile(str(page_file.resolve()))

    def tell(found: dict[str, Any]) -> None:
        asked = [seen for seen in requests.seen if seen != url.toString()]
        view.grab().save(str(picture))
        sys.stdout.write(json.dumps({**found, "asked": asked, "said": page.said}))
        app.quit()

    def look(_: bool) -> None:
        QTimer.singleShot(500, lambda: page.runJavaScript(LOOK, tell))

    page.loadFinished.connect(look)
    QTimer.singleShot(60_000, lambda: app.exit(1))
    view.load(url)
    view.show()
    code = app.exec()
    view.setPage(None)
    sys.stdout.flush()
    os._exit(code)  # Qt's engine does not always end by itself


if __name__ == "__main__":
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
