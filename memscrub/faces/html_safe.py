"""Values inside a page that do nothing: JSON that cannot end its element, and the page's content security policy.

Knows HTML, nothing of reports.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from markupsafe import Markup

# Inside <script> only `<` matters, but none of these is needed; U+2028 and U+2029 end lines in older engines.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&'\u2028\u2029"}


def script_json(value: Any) -> Markup:
    """A value as compact JSON for `<script type="application/json">`."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.translate(_ESCAPES))


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which only this style and this script count, and nothing is ever fetched."""
    rules = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
