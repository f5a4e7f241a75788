"""How long a message is, told from its size alone: where one length is known, the rest of its head need not be read."""


def length_of_rest(size: int) -> int:
    """The number that takes `size` bytes together with its own decimal digits; -1 where there is none."""
    digits, bound = 1, 10
    while size - digits >= bound:
        digits, bound = digits + 1, bound * 10
    number = size - digits
    return number if number >= bound // 10 or number == 0 else -1


def body_bytes(data: bytes, before: bytes, after: bytes) -> int:
    """Length of the body, where `data` is one whole message whose head is these two around that length; else -1."""
    length = length_of_rest(len(data) - len(before) - len(after))
    return length if length >= 0 and data.startswith(b"%b%d%b" % (before, length, after)) else -1
