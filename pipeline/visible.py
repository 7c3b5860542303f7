"""Text of others as it can be shown: control characters become symbols that can be seen.

A terminal obeys the escape sequences in what it prints, and a page should hold none.
"""

UNSHOWABLE = "\N{REPLACEMENT CHARACTER}"
SYMBOLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
"""Unicode has a picture of each: ␛ for escape, ␀ for NUL."""
SYMBOLS[0x7F] = "\N{SYMBOL FOR DELETE}"
# Eight-bit controls, among them a terminal's; half characters, which no encoding has; and marks
# that turn the direction of all that follows.
for first, end in ((0x80, 0xA0), (0xD800, 0xE000), (0x202A, 0x202F), (0x2066, 0x206A)):
    SYMBOLS |= dict.fromkeys(range(first, end), UNSHOWABLE)


def visible(text: str) -> str:
    """Return a text with its control characters as symbols; line ends and tabs stay."""
    return text.replace("\r\n", "\n").translate(SYMBOLS)
