"""One standard term for each thing, in code, help, messages and documents."""

import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent

WORDS = {
    r"\bgo(es|ing)? on\b": "resume, continue",
    r"\banew\b": "again, from scratch",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bbad_?share\b": "max_corrupt_fraction",
    r"\b([Pp]er ?cent|%) right\b": "accuracy",
    r"\bhits\b": "correct",
    r"\bfloors?\b(?!\()": "baseline",
    r"\buntrained\b|\bnew weights\b": "randomly initialized",
    r"\bembedded[ -](set|digits|scenes)\b|embedded:(?=\w)": "bundled",
    r"\bsteered\b": "adaptive",
    r"\b(Machine|Workplace)\b": "RuntimeConfig",
    r"\bFinetune\b|\bTuning\b": "FineTune",
    r"\b(plain_failures|entropy_gap|whole_batch|circumstances)\b": "a standard term",
    r"\bforetells?\b": "predict",
    r"\binstruments?\b": "diagnostics",
    r"\bhouse\b|\brooms\b": "package, module",
    r"\bmutants?\b|\bdeliberate breaks?\b": "mutation",
    r"\bby heart\b|_by_heart\b": "overfit",
    r"\b(can't|cannot) tell\b": "inconclusive",
    r"(?<!there )\bis no (device|number|folder|file|half-life|method)\b": "is not a valid ...",
    r"what \w+( \w+)? is told": "configuration, options",
    r"\b(theirs|said|told)\b": "student, teacher, reference, output, messages",
    r"[Cc]entre|[Cc]olour|[Nn]eighbour|[Ll]abelled|\b[Gg]rey": "American spelling",
    r"[Bb]ehaviour|[Ff]avour|[Ll]icence|[Cc]atalogue|[Jj]udgement": "American spelling",
    r"(standard|normal|optim|minim|maxim|regular|initial|organ)is(e|ed|es|ing|ation)\b": "American spelling",
    r"\bimages a second\b|\bsteps a run\b": "images/s, steps per run",
}
"A pattern that nobody should have to look up, and the term to use."

IDENTIFIERS = {
    "found": "result, output, detections, loaded",
    "says": "message",
    "asked": "requested, calls",
    "made": "result, decoded",
    "own": "options, values, annotations",
    "mine": "student, recipe, actual",
    "straight": "uninterrupted, direct",
}
"Identifiers that do not tell what they hold, and examples of names that do. Comments may use these words."

HISTORY = {"LOG.md", "CHANGELOG.md", "LICENSE", "tests/test_words.py"}
"Files that name what was, or this."


def files() -> list[str]:
    """The texts of the repository that people read."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    kinds = (".py", ".md", ".toml", ".j2", ".sh", ".cff", ".yaml")
    return [
        name for name in listed if name.endswith(kinds) and name not in HISTORY and (ROOT / name).exists()
    ]


def test_standard_terms_are_used():
    wrong = []
    for name in files():
        text = (ROOT / name).read_text(encoding="utf-8")
        for pattern, term in WORDS.items():
            for match in re.finditer(pattern, text):
                line = 1 + text.count("\n", 0, match.start())
                wrong.append(f"{name}:{line}: {match[0]!r}: {term}")
    assert not wrong, "\n".join(wrong)


def test_identifiers_tell_what_they_hold():
    vague = []
    for name in files():
        if name.endswith(".py"):
            with (ROOT / name).open("rb") as file:
                vague += [
                    f"{name}:{token.start[0]}: {token.string}: {IDENTIFIERS[token.string]}"
                    for token in tokenize.tokenize(file.readline)
                    if token.type == tokenize.NAME and token.string in IDENTIFIERS
                ]
    assert not vague, "\n".join(vague)


def test_the_patterns_find_what_they_should():
    for text in (
        "the run goes on",
        "an untrained encoder",
        "colour",
        "can't tell",
        "normalised",
        "embedded:digits",
    ):
        assert any(re.search(pattern, text) for pattern in WORDS), text
    for text in (
        "torch.floor(x)",
        "patches are embedded",
        "raises",
        "the chosen color",
        "rooms of the model"[6:],
    ):
        assert not any(re.search(pattern, text) for pattern in WORDS), text
