"""A report as one HTML page that fetches nothing: for people who decide, engineers or not, on screen and on paper.

    Path("report.html").write_text(render(report), encoding="utf-8")

Knows the report and, for the strips of single tokens, what its caller hands over; measures nothing, decides nothing.
Whatever comes from a list or a path is escaped, or JSON that the page's script shows as text.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from memscrub.faces.escaping import printable
from memscrub.faces.html_pictures import HEIGHT, LEFT, ROW, TOP, WIDTH, edit_map, plane
from memscrub.faces.html_rows import row_data, strip_data
from memscrub.faces.html_safe import content_policy, script_json
from memscrub.faces.html_tokens import TokenView
from memscrub.faces.html_view import TITLES, class_rows, lead, limit_rows, moment, number
from memscrub.reports.report import CheckpointRecord, Report
from memscrub.reports.sentences import class_sentences, depth_sentences

_SCRIPTS = ("html_strips.js", "html_table.js", "html_page.js")


def render(report: Report, *, texts: Mapping[str, TokenView] | None = None) -> str:
    """The page.

    `texts` are strips of tokens by text id, for as many texts as are to have one; the page shows tokens where a strip
    carries them, and says so. Equal arguments give equal pages.
    """
    shown = printable(report)
    views = {printable(id): view for id, view in (texts or {}).items()}
    style, script = _asset("html_page.css"), "\n".join(map(_asset, _SCRIPTS))
    limits, classes = limit_rows(shown), class_rows(shown)
    page = _environment().get_template("html_page.html.j2")
    return page.render(
        report=shown,
        title=TITLES.get(shown.kind, shown.kind.capitalize()),
        created=moment(shown.created),
        lead=lead(shown, limits),
        limits=limits,
        classes=classes,
        plane=plane(classes, shown.locality),
        frame={"left": LEFT, "top": TOP, "width": WIDTH, "height": HEIGHT, "row": ROW},
        map=edit_map(shown.edit),
        sentences=(*class_sentences(shown), *depth_sentences(shown)),
        commands=_commands(shown),
        digests=_digests(shown.output or shown.input),
        policy=content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        rows=script_json(row_data(shown)),
        strips=script_json(strip_data(views, shown)),
        strip_count=len(views),
        revealed=any(view.tokens is not None for view in views.values()),
    ) + "\n"  # fmt: skip


def _asset(name: str) -> str:
    """One of the page's own files, line ends as the browser will count them."""
    return files("memscrub.faces").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


@cache
def _environment() -> Environment:
    """Where the template is found and compiled, once for all pages of a run."""
    environment = Environment(
        loader=PackageLoader("memscrub.faces", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment


def _commands(report: Report) -> list[dict[str, Any]]:
    """What a reader can run to check the page's claims, with the report's own paths."""
    policy = shlex.quote(report.policy.file or "POLICY.toml")
    source = shlex.quote(report.input.path)
    if report.output is None:
        again = f"memscrub scan {source} --policy {policy}"
        return [{"about": "Measure the same checkpoint again under the same policy.", "command": again}]
    out = shlex.quote(report.output.path)
    return [
        {
            "about": "Check the signature, the digest of every file and that no file was added; offline, in seconds.",
            "command": f"memscrub verify {out} --key PUBLIC-KEY.pem",
        },
        {
            "about": "Check the signature, then hold the written checkpoint against the policy.",
            "command": f"memscrub gate {out} --policy {policy} --key PUBLIC-KEY.pem",
        },
        {
            "about": "Measure the original again: what did it give away?",
            "command": f"memscrub scan {source} --policy {policy}",
        },
    ]


def _digests(checkpoint: CheckpointRecord) -> str:
    """The checkpoint's files as `sha256sum --check` wants them."""
    return "\n".join(f"{digest}  {name}" for name, digest in sorted(checkpoint.files.items()))
