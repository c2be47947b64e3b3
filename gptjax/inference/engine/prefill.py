"""Chunked prefill: prompts are read in turns, some chunks a round (Agrawal et al. 2023, arXiv:2308.16369)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from gptjax.inference.engine import programs
from gptjax.inference.engine.device import Chunk, Device
from gptjax.inference.engine.pages import Pages
from gptjax.inference.engine.running import Call, Running


def prefill(device: Device, pages: Pages, texts: Sequence[Running]) -> list[Call]:
    """Read chunks of these prompts, a page of each in turn; of equal ones only the first is read, and its last page
    copied. Returns calls with log-probabilities to look at."""
    chunks, copies, calls = [], [], []
    turns, room = deque(texts), programs.READS * device.chunks
    while turns and room > 0:
        text = turns.popleft()
        if text.generation.request.prompt_logprobs:
            call, count = _score(device, pages.size, text)
            calls.append(call)
        else:
            copies += _find(pages, text)
            new = _next_chunks(device, pages, text, room)
            chunks, count = chunks + new, len(new)
        room -= count
        if text.reading:
            turns.append(text)
    device.read(chunks)
    if copies:
        device.copy(copies)
    return calls


def _score(device: Device, size: int, text: Running) -> tuple[Call, int]:
    """Read a page of a prompt for its log-probabilities. Its pages stay its own: another program wrote them. Returns
    the call and its number of chunks."""
    first, compare = text.read + 1, text.generation.request.alternatives > 0
    chunks = text.next_chunks(size, device.chunk, size)
    following = text.prompt[first : text.read + 1]
    return Call(device.score(chunks, following, compare), [(text, len(following))]), len(chunks)


def _find(pages: Pages, text: Running) -> list[tuple[int, int]]:
    """Pass over the pages of a prompt that another text has read by now. Its last one, if the prompt ends inside of it,
    is to be copied: that page and the text's own are returned."""
    size, copies = pages.size, []
    while text.reading and text.read % size == 0:
        number, end = text.read // size, min(text.read + size, len(text.prompt) - 1)
        chain, own = text.chains[number], text.pages[number]
        if end % size and (page := pages.known(chain)) is not None:
            copies.append((page, own))
            pages.hits += end - text.read
        elif end % size == 0 and (found := pages.find([chain])):
            pages.release(own)
            text.pages[number] = found[0]
        else:
            break
        text.read = end
        text.generation.reused = max(text.generation.reused, end)
    return copies


def _next_chunks(device: Device, pages: Pages, text: Running, most: int) -> list[Chunk]:
    """Chunks of a page of a prompt."""
    if not text.reading:
        return []
    number, chunks = text.read // pages.size, text.next_chunks(most, device.chunk, pages.size)
    if text.read % pages.size == 0 or not text.reading:
        # Whoever reads or copies it is later on the device, or in the same call.
        pages.share(text.chains[number], text.pages[number])
    return chunks
