"""Where an answer stops: stop strings, found in a text that grows."""


class StopStrings:
    """Holds back what may begin a stop string, and cuts the text at the first one that is whole.

    A stop string counts if it stands in the client's text, and also if it stands in the text with
    its special tokens shown, though the client's text leaves them out:

        seen   the answer<|im_end|>
        shown  ++++++++++----------     + goes to the client

    Both texts are kept only as far back as a stop string may begin.
    """

    def __init__(self, stops: tuple[str, ...], *, is_included: bool) -> None:
        self._stops = stops
        self._is_included = is_included
        self._held = ""  # of the client's text, what has not been taken
        self._seen = ""
        self._shown = ""

    def add(self, text: str) -> None:
        """The client's text goes on with `text`."""
        self._held += text
        if self._stops:
            self._seen += text
            self._shown += "+" * len(text)

    def add_hidden(self, text: str) -> None:
        """A special token is called `text`, which is no part of the client's text."""
        if self._stops:
            self._seen += text
            self._shown += "-" * len(text)

    def cut(self) -> str | None:
        """Take the text up to the first stop string; None if there is no stop string."""
        cuts = [
            (place, stop)
            for stop in self._stops
            for place in (self._held.find(stop), self._place_seen(stop))
            if place >= 0
        ]
        if not cuts:
            return None
        place, stop = min(cuts, key=lambda cut: (cut[0], len(cut[1])))
        return self._held[:place] + (stop if self._is_included else "")

    def take_safe(self) -> str:
        """Take the text that no stop string can begin in any more."""
        num_seen = max((_overlap(self._seen, stop) for stop in self._stops), default=0)
        first_seen = len(self._seen) - num_seen
        self._seen, self._shown = self._seen[first_seen:], self._shown[first_seen:]
        num_held = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - max(num_held, self._shown.count("+")))

    def take_all(self) -> str:
        """Take all the text; no stop string that begins in it counts."""
        self._seen = self._shown = ""
        return self._take(len(self._held))

    def _place_seen(self, stop: str) -> int:
        """Where `stop` begins in the held text by the text that is seen; -1 if it is not there."""
        place = self._seen.find(stop)
        return place if place < 0 else len(self._held) - self._shown.count("+", place)

    def _take(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
