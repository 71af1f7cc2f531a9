"""Many people vote at once while the server is killed and started again: none lost, none doubled.

    python benchmarks/voting.py --voters 50 --votes 100

Every voter is a client of its own over real HTTP, repeats what was not answered, and sends every
vote twice. The server is killed at a third of the votes and at two thirds.
"""

import argparse
import asyncio
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import torch

from burnish import images
from burnish.arena.ballots import read_votes
from burnish.arena.contest import Contest
from burnish.config import located
from burnish.prompts import read_prompts

NAMES = ("one", "two", "three", "four")
ANSWERS = ("a", "b", "tie", "both_bad")
_TOKEN = re.compile(r'name="token" value="([^"]+)"')


def contest(folder: Path) -> Contest:
    """Plain pictures of four models for the held-out prompts."""
    prompts = [
        prompt
        for prompt in read_prompts(located("embedded:prompts/held-out.jsonl"))
        if prompt.task == "t2i"
    ]
    pictures: dict[str, dict[str, Path]] = {}
    for level, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for prompt in prompts:
            path = folder / name / f"{prompt.id}.png"
            if not path.is_file():
                picture = images.to_pil(torch.full((3, 64, 64), 0.2 * (level + 1)))
                path.write_bytes(images.encode_png(picture))
            pictures.setdefault(name, {})[prompt.id] = path
    return Contest(prompts=tuple(prompts), pictures=pictures)


def serve(folder: Path, port: int) -> None:
    """The page, for people who vote faster than people do."""
    import uvicorn

    from burnish.arena import server
    from burnish.arena.ballots import Ballots

    server.MAX_RATE = 10**9
    own = contest(folder)
    app = server.app(own, Ballots(folder / "votes.sqlite", own, gold=0.0))
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


class Crowd:
    """Everybody who votes."""

    def __init__(self, url: str, votes: int) -> None:
        self.url, self.votes = url, votes
        self.done: Counter[int] = Counter()
        self.waited: list[float] = []

    async def person(self, number: int) -> None:
        """One voter, from the first vote to the last."""
        async with httpx.AsyncClient(base_url=self.url, follow_redirects=True) as client:
            page = await self._asked(client, "GET", "/", {})
            for _ in range(self.votes):
                token = _TOKEN.search(page.text)
                assert token, page.text[:500]
                form = {"token": token[1], "winner": ANSWERS[number % 4]}
                begun = time.monotonic()
                page = await self._asked(client, "POST", "/vote", form)
                self.waited.append(time.monotonic() - begun)
                assert page.status_code == 200, page.text[:500]
                # Again, as an impatient browser would.
                page = await self._asked(client, "POST", "/vote", form)
                self.done[number] += 1

    async def _asked(
        self, client: httpx.AsyncClient, method: str, path: str, form: dict[str, str]
    ) -> httpx.Response:
        for _ in range(3000):
            try:
                return await client.request(method, path, data=form or None, timeout=60)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        raise TimeoutError(f"no answer from {self.url}")


async def run(voters: int, votes: int, folder: Path) -> None:
    """Let everybody vote, and count."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, __file__, "--serve", str(folder), str(port)])

    process, total = begin(), voters * votes
    crowd = Crowd(f"http://127.0.0.1:{port}", votes)
    begun = time.monotonic()
    people = [asyncio.create_task(crowd.person(number)) for number in range(voters)]
    for share in (total // 3, 2 * total // 3):
        while crowd.done.total() < share and not all(task.done() for task in people):
            await asyncio.sleep(0.05)
        process.kill()
        process.wait()
        print(f"killed after {crowd.done.total()} votes, started again", flush=True)
        process = begin()
    await asyncio.gather(*people)
    seconds = time.monotonic() - begun
    process.kill()
    process.wait()
    found, _ = read_votes(folder / "votes.sqlite")
    by_voter = Counter(vote.voter for vote in found)
    doubled = len(found) - len({(vote.voter, vote.battle) for vote in found})
    pairs = Counter((v.voter, v.prompt, frozenset((v.a, v.b))) for v in found)
    wrong = sum(1 for name in by_voter if len({v.winner for v in found if v.voter == name}) > 1)
    print(f"{total} votes sent by {voters} voters, each twice, in {seconds:.0f} s")
    print(f"{len(found)} counted, {total - len(found)} lost, {doubled} doubled, {wrong} changed")
    print(f"votes of a voter: {min(by_voter.values())} to {max(by_voter.values())}")
    print(f"pairs that somebody saw twice: {sum(count - 1 for count in pairs.values())}")
    waits = 1000 * np.quantile(crowd.waited, [0.5, 0.99])
    print(f"answered in {waits[0]:.0f} ms (median), {waits[1]:.0f} ms (99 of 100)")


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--serve"]:
        return serve(Path(sys.argv[2]), int(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voters", type=int, default=50)
    parser.add_argument("--votes", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(options.voters, options.votes, Path(folder)))


if __name__ == "__main__":
    main()
