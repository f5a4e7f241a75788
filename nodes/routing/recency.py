"""Things in the order of their last use: what was not used for longest comes out first.

Each thing knows its neighbours, so that putting it last takes no look-up. `OrderedDict` takes one, by far the dearest part.
"""


class Link:
    """A thing that stands in at most one line."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.older: Link | None = None
        self.newer: Link | None = None


class Line:
    """From the one that was used first to the one that was used last."""

    __slots__ = ("count", "newest", "oldest")

    def __init__(self) -> None:
        self.count = 0
        self.oldest: Link | None = None
        self.newest: Link | None = None

    def add(self, link: Link) -> None:
        """It is used now, and stood in no line."""
        newest = self.newest
        link.older = newest
        if newest is None:
            self.oldest = link
        else:
            newest.newer = link
        self.newest = link
        self.count += 1

    def touch(self, link: Link) -> None:
        """It is used again."""
        if link.newer is not None:
            self.remove(link)
            self.add(link)

    def remove(self, link: Link) -> None:
        """It leaves this line, in which it stands."""
        older, newer = link.older, link.newer
        if older is None:
            self.oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self.newest = older
        else:
            newer.older = older
        link.older = link.newer = None
        self.count -= 1
