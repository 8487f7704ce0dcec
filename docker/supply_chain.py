"""What is installed, under which licences, and with which known weaknesses: python supply_chain.py PYTHON.

PYTHON: of the environment to look at. Run by the environment that has pip-audit and cyclonedx-bom (make supply-chain).
Exits with 1 where a licence is not among the allowed ones, or a weakness is known.
"""

import json
import subprocess
import sys
from pathlib import Path

SBOM = Path("build/sbom.json")
LOCK = Path("docker/requirements.lock")
# By the words that licences and classifiers use. All let the server be run and passed on; MPL and LGPL ask for their
# own sources alone.
ALLOWED = (
    "Apache",
    "MIT",
    "BSD",
    "0BSD",
    "ISC",
    "PSF",
    "Python Software Foundation",
    "Python-2.0",
    "CNRI",
    "Zlib",
    "ZPL",
)
ALLOWED += ("MPL", "Mozilla Public", "LGPL", "HPND", "Unlicense", "CC0", "Public Domain", "WTFPL")
READ_ELSEWHERE = {  # in the licence files of the packages whose metadata tell none
    "kubernetes-validate": "Apache-2.0",
    "promql-parser": "MIT",
    "transformers": "Apache-2.0",
}


def main(python: str) -> int:
    """Print a line per package that matters, and return the exit code."""
    SBOM.parent.mkdir(exist_ok=True)
    command = [_tool("cyclonedx-py"), "environment", python, "--output-file", str(SBOM)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    components = json.loads(SBOM.read_text())["components"]
    unknown = 0
    for each in sorted(components, key=lambda each: str(each["name"]).lower()):
        licence = READ_ELSEWHERE.get(each["name"]) or _licence(each)
        is_allowed = any(word.lower() in licence.lower() for word in ALLOWED)
        unknown += not is_allowed
        mark = "" if is_allowed else "  <- look at this"
        print(f"{each['name']} {each.get('version', '')}: {licence or 'no licence told'}{mark}")
    print(f"{len(components)} packages, {unknown} with a licence to look at; all of them in {SBOM}")
    return int(unknown > 0 or not _audit())


def _audit() -> bool:
    """Ask for known weaknesses of what the image installs. False where there are any."""
    command = [_tool("pip-audit"), "--requirement", str(LOCK), "--require-hashes", "--disable-pip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    unasked = done.stdout.count("could not be audited")
    if unasked or "Error" in done.stderr:
        print(f"known weaknesses: the database cannot be reached from here, or lacks {unasked} packages")
        return True
    print(done.stdout + done.stderr)
    return done.returncode == 0


def _licence(component: dict) -> str:
    """All that a package tells of its licence, in a line."""
    told = []
    for each in component.get("licenses", []):
        licence = each.get("license", {})
        told.append(each.get("expression") or licence.get("id") or licence.get("name") or "")
    return ", ".join(" ".join(text.split())[:80] for text in dict.fromkeys(told) if text)


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
