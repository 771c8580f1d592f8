"""Prints an apt source for bookworm-backports: the machine's own bookworm source with another suite.

Usage: backports_source.py /etc/apt
Reads both formats, one-line `sources.list` and deb822 `.sources`; takes the first that serves `bookworm` `main`.
"""

import pathlib
import sys

SUITE = "bookworm"


def deb822_stanzas(text):
    """Yields the stanzas of a `.sources` file as dicts with lower-case keys; continuation lines are joined."""
    stanza, key = {}, None
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, key = {}, None
        elif line[0].isspace() and key:
            stanza[key] += "\n" + line.rstrip()
        else:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            stanza[key] = value.strip()


def from_deb822(text):
    for stanza in deb822_stanzas(text):
        enabled = stanza.get("enabled", "yes").lower() not in ("no", "false", "0")
        if enabled and "deb" in stanza.get("types", "").split() and SUITE in stanza.get("suites", "").split() \
                and "main" in stanza.get("components", "").split():
            return stanza["uris"].split()[0], stanza.get("signed-by")
    return None


def from_one_line(text):
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line.startswith("deb "):
            continue
        line, signed_by = line[4:].strip(), None
        if line.startswith("["):
            options, _, line = line[1:].partition("]")
            signed_by = dict(o.split("=", 1) for o in options.split() if "=" in o).get("signed-by")
        uri, suite, *components = line.split()
        if suite == SUITE and "main" in components:
            return uri, signed_by
    return None


def main():
    apt = pathlib.Path(sys.argv[1])
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        found = from_deb822(file.read_text()) if file.suffix == ".sources" else from_one_line(file.read_text())
        if found:
            uri, signed_by = found
            print(f"Types: deb\nURIs: {uri}\nSuites: {SUITE}-backports\nComponents: main")
            if signed_by:
                print(f"Signed-By: {signed_by}")
            return
    sys.exit(f"no apt source for {SUITE} main found under {apt}")


main()
