"""Words that this project does not use, and the field's words instead: a part of `make check`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WORDS = {
    r"(?<!max_waiting_)(?<!MAX_WAITING_)pictur": "image",
    r"in[ _]hand\b": "in flight, pending",
    r"(?<![a-z])at[ _]work\b": "in flight, running",
    r"foret[eo]l": "predict",
    r"prospect|outlook": "forecast, estimate, completion estimator",
    r"(?<!\w)(?:in|of|its|their|whose|own) company\b|company_|_company": "co-batched requests",
    r"row[ _]independen": "batch invariance",
    r"alone_s\b|_alone_s": "serial_s",
    r"\bdoors?\b(?! of)|_door|door_": "listen socket, API",
    r"\bdesks?\b|_desk|[a-z]Desk": "request tracker",
    r"\blen[dt]\b|\blend(?:s|er|ers|ing)\b|_lent|(?<![a-z])lent_|_lender|\blend_": "copy, factory",
    r"\bshel(?:f|ves)\b|_shelf|shelf_|Shelf": "adapter cache",
    r"leaf_?kind|coalesc": "argument, stacking",
    r"\bmemos?\b|_memo\b|narrowing": "output cache, guidance interval",
    r"remembering|host_numbers|clockwork": "memoized schedulers, pinned noise, track timings",
    r"self_check|size_rules|guided_steps": "sharing check, shape rules, guidance cost",
    r"\bdecodings\b": "VAE batching, decoding",
}
SUFFIXES = {".py", ".md", ".yml", ".yaml", ".html", ".js", ".toml", ".sh"}
# Artwork, trained files, and what was released under the old words.
EXEMPT = ("service/stepserve/models/", "CHANGELOG.md", "tools/check_words.py")


def complaints(name: str, text: str) -> list[str]:
    """What is wrong in the file of that name, a line each."""
    return [
        f"{name}:{number}: {found[0]!r}: use {instead}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in WORDS.items()
        if (found := re.search(pattern, line, re.IGNORECASE))
    ]


def main() -> int:
    """Look at every file that git knows; 1 if any has a word of the list."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.splitlines() if not name.startswith(EXEMPT)]
    paths = [path for path in map(Path, names) if path.suffix in SUFFIXES and path.exists()]
    found = [line for path in paths for line in complaints(str(path), path.read_text())]
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
