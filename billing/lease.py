"""The arithmetic of spend leases: what of a wallet or of a budget's window one process has, and how much more it takes.

Pure integers of nano, no clock and no I/O: when something is taken, and from where, is leases.py's and lease_store.py's.
"""

from dataclasses import dataclass

LEAST_TURNS = 4
"""A block buys at least so many holds as the last one: an account's second turn should not wait for PostgreSQL again."""

GROWTH_PERCENT = 110
"""A block that should be larger than this, of what it is, is filled up at once; peaks that creep start no refills."""

PEAK_KEPT_MS = 600_000
"""The peak of an account's spending falls linearly to nothing in this time, unless it is reached again."""


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A lease as PostgreSQL has it. `used`: settled in the memory of its process when that last took or returned."""

    granted_nano: int
    settled_nano: int  # posted
    returned_nano: int
    used_nano: int

    @property
    def left_nano(self) -> int:
        """What it adds to the leased amount of its wallet or window."""
        return self.granted_nano - self.settled_nano - self.returned_nano


_NONE = LeaseRow(0, 0, 0, 0)


class Pot:
    """What this process has of one wallet, or of one window of a budget: granted = free + held + settled + returned."""

    __slots__ = (
        "block_nano",
        "confirmed_nano",
        "free_nano",
        "granted_nano",
        "held_nano",
        "is_fresh",
        "is_small",
        "is_used_told",
        "low_nano",
        "recalled_s",
        "returned_nano",
        "small_until_s",
    )

    def __init__(self) -> None:
        self.granted_nano = 0
        self.free_nano = 0
        self.held_nano = 0
        self.returned_nano = 0  # not free any more, whether or not PostgreSQL knows it yet
        self.confirmed_nano = 0  # of what was returned: what PostgreSQL has
        self.is_used_told = True  # PostgreSQL knows of all that was settled
        self.block_nano = 0  # what it wants to have free
        self.low_nano = 0  # below this it is filled again
        self.is_small = False  # what no waiting turn needs goes back at once
        self.small_until_s = float(
            "-inf"
        )  # monotonic: it is small whatever there is, since somebody lacked it
        self.recalled_s = float(
            "-inf"
        )  # monotonic: when other processes were last asked for their remainders
        self.is_fresh = True  # PostgreSQL's row was not read yet

    def __repr__(self) -> str:
        return f"<Pot {self.free_nano} free, {self.held_nano} held, {self.settled_nano} settled>"

    @property
    def settled_nano(self) -> int:
        """Charged in this process, shipped or not."""
        return self.granted_nano - self.returned_nano - self.free_nano - self.held_nano

    @property
    def is_told(self) -> bool:
        """PostgreSQL knows all that was returned and used."""
        return self.is_used_told and self.returned_nano == self.confirmed_nano

    @property
    def is_empty(self) -> bool:
        """Nothing is free, held or untold: forgetting it loses nothing."""
        return not self.free_nano and not self.held_nano and self.is_told

    def hold(self, amount_nano: int) -> None:
        """Set aside; the caller looked whether it is free."""
        self.free_nano -= amount_nano
        self.held_nano += amount_nano

    def release(self, held_nano: int, charged_nano: int) -> None:
        """End a hold: `charged_nano` of it are settled, the rest is free again."""
        self.held_nano -= held_nano
        self.free_nano += held_nano - charged_nano
        if charged_nano:
            self.is_used_told = False

    def grant(self, amount_nano: int) -> None:
        """PostgreSQL gave so much more."""
        self.granted_nano += amount_nano
        self.free_nano += amount_nano

    def give_back(self, amount_nano: int) -> None:
        """From now on it is not free here; PostgreSQL is told the sum of all that was ever given back."""
        self.free_nano -= amount_nano
        self.returned_nano += amount_nano

    def sync(self, row: LeaseRow | None) -> None:
        """Take over what PostgreSQL has, under its lock: also what it granted in an answer that was lost.

        A fresh pot goes on where this process once dropped it: all that is not `used` or returned is free. Where PostgreSQL
        came back from before a grant (a backup, a replica that lagged), what is still free of that was never ours.
        """
        row = row or _NONE
        if self.is_fresh:
            self.granted_nano, self.returned_nano = row.granted_nano, row.returned_nano
            self.free_nano = row.granted_nano - row.returned_nano - row.used_nano
        else:
            self.grant(max(row.granted_nano - self.granted_nano, -self.free_nano))
        self.is_fresh = False
        self.told(row.returned_nano, row.used_nano)

    def told(self, returned_nano: int, used_nano: int) -> None:
        """PostgreSQL knows of so much that was returned and settled, in all."""
        self.confirmed_nano = returned_nano
        self.is_used_told = used_nano == self.settled_nano


def fit(amount_nano: int, least_nano: int | None, room_nano: int) -> int:
    """What a hold becomes where `room_nano` is available: itself, a smaller one that is useful, or 0.

    A smaller one takes half of the room (at least `least_nano`): the account's next turn finds something, too.
    """
    if amount_nano <= room_nano:
        return amount_nano
    if least_nano is None:
        return 0
    smaller = min(amount_nano, max(least_nano, room_nano // 2))
    return smaller if smaller <= room_nano else 0


def is_small(room_nano: int, hold_nano: int, live: int, small_holds: int) -> bool:
    """Whether a block would keep other processes' turns from a wallet: it buys fewer than `small_holds` holds for each."""
    return room_nano < small_holds * live * hold_nano


def block_nano(peak_nano_s: int, block_s: float, hold_nano: int) -> int:
    """What a process wants to have free of a large wallet."""
    return max(peak_nano_s * round(block_s * 1000) // 1000, LEAST_TURNS * hold_nano)


def grant_nano(need_nano: int, pot: Pot, available_nano: int, live: int, *, small: bool) -> int:
    """How much more to take for waiting turns that need `need_nano` in all, and which fit free and available together.

    A small wallet gives what they need and no more. Of a large one a block is left over after them, as long as that is a
    fair part: half of what is available, divided by the processes.
    """
    short_nano = need_nano - pot.free_nano
    if small:
        return max(0, short_nano)
    fair_nano = max(0, available_nano) // (2 * live)
    return max(0, short_nano, min(short_nano + pot.block_nano, fair_nano))


def surplus_nano(need_nano: int, pot: Pot, available_nano: int, *, small: bool) -> int:
    """How much to give back: of a small wallet all that no waiting turn needs; of a large one what is beyond two blocks.

    A limit that was lowered below what is spent and leased (`available_nano` below zero) gets back what is free.
    """
    spare_nano = max(0, pot.free_nano - need_nano)
    if small:
        return spare_nano
    beyond_nano = spare_nano - pot.block_nano if spare_nano > 2 * pot.block_nano else 0
    return max(beyond_nano, min(spare_nano, -available_nano))


def peak_after(peak_nano_s: int, spent_nano: int, elapsed_ms: int, round_ms: int) -> int:
    """The peak of nano a second, `elapsed_ms` after it was last measured and with `spent_nano` spent in the last `round_ms`.

    Nothing was spent before that round: an account that begins anew after a pause is as fast as it is now.
    """
    faded = peak_nano_s - peak_nano_s * min(elapsed_ms, PEAK_KEPT_MS) // PEAK_KEPT_MS
    return max(faded, spent_nano * 1000 // max(1, round_ms))


def low_after(pot: Pot, wanted_nano: int) -> int:
    """Below what a pot is to be filled again, now that its account's speed asks for a block of `wanted_nano`.

    A pot that was filled for a slower one would else run down to half of that first. Where a fair part is less than a block,
    this starts one refill, which notes the new block.
    """
    if pot.is_small or not pot.block_nano or wanted_nano * 100 <= pot.block_nano * GROWTH_PERCENT:
        return pot.low_nano
    return max(pot.low_nano, wanted_nano // 2)
