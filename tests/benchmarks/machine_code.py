"""Machine code for tests, printed as cuobjdump prints it."""

import re


def listing(*lines: str, name: str = "kernel") -> str:
    """A function of these instructions, 16 bytes each; "BRA ->3" jumps to line 3."""
    printed = [re.sub(r"->(\d+)", lambda match: hex(16 * int(match[1])), line) for line in lines]
    head = f"\tcode for sm_90a\n\t\tFunction : {name}\n"
    return head + "".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */\n" for i, line in enumerate(printed))
