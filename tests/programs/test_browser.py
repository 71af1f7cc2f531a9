"""The voting page in a real Chromium, headless: what a person does, and what they should not."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from tests.programs.test_voting import contest

from burnish.arena import server
from burnish.arena.ballots import Ballots, read_votes

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)


class Arena:
    """A voting page on loopback, and the votes that count."""

    def __init__(self, folder: Path, task: str = "t2i") -> None:
        own = contest(folder, count=6, task=task)
        self.path = folder / "votes.sqlite"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
            port = probe.getsockname()[1]
        app = server.app(own, Ballots(self.path, own, gold=0.0))
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def winners(self) -> list[str]:
        return [vote.winner for vote in read_votes(self.path)[0]]

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    found = Arena(tmp_path)
    yield found
    found.close()


class Person:
    """Somebody with a browser of their own."""

    def __init__(self, url: str, size: tuple[int, int] = (1200, 900)) -> None:
        options = ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        self.browser = Chrome(options, ChromeService(DRIVER or ""))
        self.browser.set_window_size(*size)
        self.url = url
        self.open()

    def open(self) -> None:
        self.browser.get(self.url)
        self.wait(self.is_ready)

    def is_ready(self) -> bool:
        """Both pictures are there, or there are none."""
        body = self.browser.find_element(By.TAG_NAME, "body")
        return body.get_attribute("data-ready") == "yes" or "seen every pair" in body.text

    def wait(self, until: Callable[[], Any]) -> None:
        WebDriverWait(self.browser, 20, ignored_exceptions=[Exception]).until(lambda _: until())

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    @property
    def token(self) -> str:
        return str(self.one('[name="token"]').get_attribute("value"))

    def then_another_pair(self, act: Callable[[], Any]) -> None:
        """Do something that leads to another pair."""
        before = self.token
        act()
        self.wait(lambda: self.token != before and self.is_ready())

    def press(self, key: str) -> None:
        self.one("body").send_keys(key)


@pytest.fixture
def people() -> Iterator[Callable[..., Person]]:
    """People come with a call and go at the end."""
    came: list[Person] = []

    def come(url: str, **options: Any) -> Person:
        came.append(Person(url, **options))
        return came[-1]

    yield come
    for person in came:
        person.browser.quit()


People = Callable[..., Person]


def test_votes_by_mouse_and_by_keyboard_alone(arena: Arena, people: People) -> None:
    me = people(arena.url)
    me.then_another_pair(lambda: me.one('[value="a"]').click())
    for key in "1234":
        me.then_another_pair(lambda key=key: me.press(key))
    # A person without a mouse can also walk to the button.
    me.one("body").send_keys(Keys.TAB * 2)
    focused = me.browser.switch_to.active_element
    assert focused.get_attribute("value") == "b"
    me.then_another_pair(lambda: focused.send_keys(Keys.ENTER))
    assert arena.winners() == ["a", "a", "b", "tie", "both_bad", "b"]
    assert "6 votes of yours" in me.one("footer").text


def test_undo_by_key_shows_the_pair_again(arena: Arena, people: People) -> None:
    me = people(arena.url)
    first = me.token
    me.then_another_pair(lambda: me.press("3"))
    me.then_another_pair(lambda: me.press("u"))
    assert me.token == first and arena.winners() == []
    me.then_another_pair(lambda: me.press("2"))
    assert arena.winners() == ["b"]


def test_a_reload_and_the_way_back_count_nothing_twice(arena: Arena, people: People) -> None:
    me = people(arena.url)
    first = me.token
    me.browser.refresh()
    me.wait(me.is_ready)
    assert me.token == first
    me.then_another_pair(lambda: me.press("1"))
    me.browser.refresh()
    me.wait(me.is_ready)
    assert arena.winners() == ["a"]
    # The page of the first pair, again, with the same answer: it is counted already.
    me.browser.back()
    me.wait(me.is_ready)
    if me.token == first:
        me.then_another_pair(lambda: me.press("1"))
    assert arena.winners() == ["a"]


def test_a_form_that_is_sent_twice_counts_once(arena: Arena, people: People) -> None:
    me = people(arena.url)
    me.then_another_pair(
        lambda: me.browser.execute_script(
            "const b = document.querySelector('[value=\"b\"]'); b.click(); b.click();"
        )
    )
    # And where nothing holds the second one back.
    cookies = {cookie["name"]: cookie["value"] for cookie in me.browser.get_cookies()}
    form = {"token": me.token, "winner": "tie"}
    for _ in range(3):
        assert httpx.post(f"{arena.url}/vote", data=form, cookies=cookies).status_code == 303
    assert arena.winners() == ["b", "tie"]


def test_a_stale_page_and_a_forged_token_are_told_and_count_nothing(
    arena: Arena, people: People
) -> None:
    me = people(arena.url)
    stale = me.token
    me.then_another_pair(lambda: me.press("1"))

    def send(token: str, winner: str) -> str:
        me.browser.execute_script(
            "document.querySelector('[name=token]').value = arguments[0];"
            "document.querySelector(`[value='${arguments[1]}']`).click();",
            token, winner,
        )  # fmt: skip
        me.wait(lambda: me.one("[role=alert]").is_displayed())
        return me.one("[role=alert]").text

    assert "voted on this pair already" in send(stale, "b")
    name, _, signature = me.token.partition(".")
    forged = f"{name}.{signature[::-1]}"
    assert "not for you" in send(forged, "b")
    assert arena.winners() == ["a"]


def test_a_token_of_somebody_else_is_no_vote(arena: Arena, people: People) -> None:
    """Two people at once, each with a pair of their own."""
    me, you = people(arena.url), people(arena.url)
    assert me.token != you.token
    theirs = you.token
    me.browser.execute_script(
        "document.querySelector('[name=token]').value = arguments[0];", theirs
    )
    me.press("1")
    me.wait(lambda: "not for you" in me.one("[role=alert]").text)
    threads = [
        threading.Thread(
            target=lambda p=p, k=k: [p.then_another_pair(lambda: p.press(k)) for _ in range(3)]
        )
        for p, k in ((me, "1"), (you, "2"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(arena.winners()) == ["a"] * 3 + ["b"] * 3
    assert len({vote.voter for vote in read_votes(arena.path)[0]}) == 2


def test_zoom_and_flicker_by_key(arena: Arena, people: People) -> None:
    me = people(arena.url)
    width = me.one("#pair img").size["width"]
    me.press("z")
    # Twice, but for the bar to scroll with.
    assert me.one("#pair img").size["width"] == pytest.approx(2 * width, abs=40)
    me.press("z")
    me.press("f")
    pair = me.one("#pair")
    left, right = pair.find_elements(By.TAG_NAME, "figure")
    assert left.location == right.location
    seen = set()
    end = time.monotonic() + 5
    # Both in one look: between two of them the pictures may change.
    both = """return [...arguments].map(
        figure => figure.checkVisibility({visibilityProperty: true, opacityProperty: true}))"""
    while len(seen) < 2 and time.monotonic() < end:
        seen.add(tuple(pair.parent.execute_script(both, left, right)))
        time.sleep(0.1)
    assert seen == {(True, False), (False, True)}
    assert me.one("#flicker").get_attribute("aria-pressed") == "true"


def test_a_phone_shows_both_pictures_and_all_answers(arena: Arena, people: People) -> None:
    me = people(arena.url, size=(500, 800))
    inside = me.browser.execute_script("return [innerWidth, innerHeight]")
    for element in me.browser.find_elements(By.CSS_SELECTOR, "#pair img, .answers button"):
        box = element.rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= inside[0]
        assert box["y"] + box["height"] <= inside[1]
    assert me.browser.execute_script("return document.documentElement.scrollWidth") <= inside[0]
    buttons = me.browser.find_elements(By.CSS_SELECTOR, ".answers button")
    assert min(button.size["height"] for button in buttons) >= 44


def test_an_edit_is_shown_with_its_source_and_instruction(tmp_path: Path, people: People) -> None:
    arena = Arena(tmp_path, task="edit")
    try:
        me = people(arena.url)
        assert me.one(".source img").get_property("naturalWidth") == 64
        assert me.one("#prompt").text
        me.then_another_pair(lambda: me.press("4"))
        assert arena.winners() == ["both_bad"]
    finally:
        arena.close()


def test_nothing_on_the_page_names_a_model_or_breaks_its_policy(
    arena: Arena, people: People
) -> None:
    me = people(arena.url)
    source = me.browser.page_source
    links = me.browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    for name in ("aardvark", "buffalo", "cormorant"):
        assert name not in source and not any(name in link for link in links)
    assert all(link.startswith(arena.url) for link in links)
    logged = [entry for entry in me.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in logged if "favicon" not in entry["message"]] == []
