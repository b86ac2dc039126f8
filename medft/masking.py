"""Secrets in texts that medft writes or shows, recognized by how they look."""

import logging
import re
import sys

MASK = "***"

NAMES_SECRET = re.compile(r"(?i)token(?!iz)|secret|password|keys?(?![a-z0-9]|[_-][a-z0-9])")
"""Matches a name of a secret: hub_token, api_key; not tokenizer or key_findings."""

_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|\bgh[opsur]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}"  # GitHub
    r"|\bglpat-[\w-]{20,}"  # GitLab
    r"|\bsk-(?:(?:proj|svcacct|ant|or)-[\w-]{28,}|[A-Za-z0-9]{32,})"  # OpenAI and others
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|(?<=\b[Bb]earer )[A-Za-z0-9._~+/=-]{16,}"
)

_LOGIN = re.compile(r"(?<=://)(?:[^\s/:@'\"]*:[^\s/'\"]+|[^\s/:@'\"]{20,})(?=@)")
"""user:password of a URL, or a token in its place."""


def masked_text(text: str) -> str:
    """The text with tokens of known services, and logins in URLs, replaced by `***`."""
    return _LOGIN.sub(MASK, _TOKENS.sub(MASK, text))


def printable(text: str) -> str:
    """The text as one line: secrets masked, and what a terminal would obey escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in masked_text(text))


def log_handler() -> logging.Handler:
    """Writes log lines to standard error, secrets masked."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_MaskingFormatter("%(message)s"))
    return handler


class _MaskingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked_text(super().format(record))
