"""Policies: what is accepted, what is refused with which sentence; and the documentation is up to date."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memscrub.errors import ExitCode, PolicyError
from memscrub.policy.document import Policy, load_policy, parse_policy
from memscrub.policy.init_files import STARTERS, policies_folder, write_starter
from memscrub.policy.reference import updated
from memscrub.policy.toml_lines import line_of

REPOSITORY = Path(__file__).resolve().parent.parent

GOOD = """\
schema = 1
name = "release-gate"
[protected]
files = ["protected.jsonl"]
[class.copyright]
max_verbatim_tokens = 16
max_near_verbatim = 0.60
max_sampling_probability = 1e-4
[class.pii]
secret = true
max_sampling_probability = 1e-6
[locality]
retain = ["retain.txt"]
max_kl = 0.01
[fix]
mode = "next-best"
"""


def refusal(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text.encode("utf-8"))
    assert caught.value.exit_code is ExitCode.USAGE
    return str(caught.value)


def test_the_contract_of_the_issue_is_read() -> None:
    policy = parse_policy(GOOD.encode(), Path("some/where/p.toml"))
    assert policy.name == "release-gate"
    assert policy.protected.files == ("protected.jsonl",)
    assert list(policy.classes) == ["copyright", "pii"]
    assert policy.classes["copyright"].max_verbatim_tokens == 16
    assert policy.classes["copyright"].max_near_verbatim == 0.6
    assert policy.classes["copyright"].max_sampling_probability == 1e-4
    assert policy.classes["pii"].secret
    assert policy.locality.retain == ("retain.txt",)
    assert policy.base == Path("some/where")
    assert policy.resolve("x.txt") == Path("some/where/x.txt")
    assert policy.resolve("/tmp/x.txt") == Path("/tmp/x.txt")
    assert policy.retain_paths == (Path("some/where/retain.txt"),)
    assert policy.digest == hashlib.sha256(GOOD.encode()).hexdigest()


def test_defaults_are_the_documented_ones() -> None:
    policy = parse_policy(b'schema=1\nname="n"\nprotected.files=["p.txt"]\nclass.a.secret=true\n')
    probe, locality, fix = policy.probe, policy.locality, policy.fix
    assert (probe.prefix_tokens, probe.suffix_tokens, probe.min_prefix_tokens) == (50, 50, 1)
    assert (probe.near_verbatim_prefix, probe.near_verbatim_tokens, probe.offsets) == (32, 48, (0, 8, 16))
    assert probe.batch_tokens == 8192
    assert (locality.max_kl, locality.max_perplexity_ratio, locality.min_agreement) == (0.01, 1.01, 0.95)
    assert (locality.retain, locality.statistics, locality.neighbours) == ((), (), ())
    assert locality.max_tokens == 200_000
    assert (fix.mode, fix.solver, fix.fallback, fix.sites) == (
        "next-best",
        "joint",
        "attention",
        "mlp+attention+queries",
    )
    assert (fix.margin, fix.rounds, fix.layers) == (0.3, 20, "auto")
    assert (policy.report.key, policy.sign.key) == (None, None)
    assert (policy.classes["a"].top_k, policy.classes["a"].temperature) == (40, 1.0)


def test_a_policy_cannot_be_changed() -> None:
    policy = parse_policy(GOOD.encode())
    with pytest.raises(ValidationError):
        policy.name = "other"
    with pytest.raises(ValidationError):
        policy.fix.margin = 0.0


def test_whole_numbers_serve_as_numbers() -> None:
    policy = parse_policy(GOOD.replace("max_kl = 0.01", "max_kl = 1").encode())
    assert policy.locality.max_kl == 1.0


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated() -> None:
    data = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert parse_policy(data).name == "release-gate"


def test_layers_are_a_word_or_sorted_numbers() -> None:
    policy = parse_policy(GOOD.replace("[fix]", "[fix]\nlayers = [3, 1]").encode())
    assert policy.fix.layers == policy.fix.named_layers == (1, 3)
    for word in ("auto", "all"):
        policy = parse_policy(GOOD.replace("[fix]", f'[fix]\nlayers = "{word}"').encode())
        assert policy.fix.layers == word and policy.fix.named_layers is None


BAD = {
    "unknown key": (
        ("max_near_verbatim", "max_neer_verbatim"),
        "policy.toml:7: unknown key 'max_neer_verbatim' in [class.copyright]; did you mean 'max_near_verbatim'?",
    ),
    "unknown section": (
        ("[locality]", "[localty]"),
        "policy.toml:12: unknown key or section 'localty'; did you mean 'locality'?",
    ),
    "misspelt required key is one problem": (
        ("files =", "fils ="),
        "policy.toml:4: unknown key 'fils' in [protected]; did you mean 'files'?",
    ),
    "key of another section": (
        ("[fix]", "[fix]\nmax_kl = 0.1"),
        "policy.toml:16: unknown key 'max_kl' in [fix]; it belongs in [locality].",
    ),
    "top-level key after a section": (
        ("[fix]", '[fix]\nname = "x"'),
        "policy.toml:16: unknown key 'name' in [fix]; it belongs at the top of the file, before the first [section].",
    ),
    "key without a class": (
        ("[class.copyright]", "[class]"),
        "policy.toml:6: 'max_verbatim_tokens' stands in [class] itself; put it below a class,"
        " for example [class.pii]. (2 more problems in this file.)",
    ),
    "true is no number": (
        ("tokens = 16", "tokens = true"),
        "policy.toml:6: max_verbatim_tokens in [class.copyright] must be a whole number, not true;"
        " write max_verbatim_tokens = 16.",
    ),
    "a text is no number": (
        ("tokens = 16", 'tokens = "PROTECTED"'),
        "policy.toml:6: max_verbatim_tokens in [class.copyright] must be a whole number, not a text;"
        " write max_verbatim_tokens = 16.",
    ),
    "a number is no switch": (
        ("secret = true", "secret = 1"),
        "policy.toml:10: secret in [class.pii] must be true or false, not 1; write secret = false.",
    ),
    "below the range": (
        ("tokens = 16", "tokens = 0"),
        "policy.toml:6: max_verbatim_tokens in [class.copyright] must be at least 1, not 0;"
        " write max_verbatim_tokens = 16.",
    ),
    "above the range": (
        ("= 0.60", "= 60"),
        "policy.toml:7: max_near_verbatim in [class.copyright] must be at most 1, not 60;"
        " write max_near_verbatim = 0.6.",
    ),
    "not a finite number": (
        ("max_kl = 0.01", "max_kl = nan"),
        "policy.toml:14: max_kl in [locality] must be a finite number, not nan; write max_kl = 0.01.",
    ),
    "a choice misspelt": (
        ('"next-best"', '"next-bst"'),
        'policy.toml:16: mode in [fix] must be "next-best", "eos", "redact", "suppress" or "ensemble";'
        " did you mean 'next-best'?",
    ),
    "a text where a list belongs": (
        ('["protected.jsonl"]', '"protected.jsonl"'),
        'policy.toml:4: files in [protected] must be a list, not a text; write files = ["protected.jsonl"].',
    ),
    "an item of the wrong type, in a list over several lines": (
        ('["protected.jsonl"]', '[\n"a",\n3]'),
        'policy.toml:4: files in [protected] must be a list of texts, not 3; write files = ["protected.jsonl"].',
    ),
    "an empty list": (
        ('["protected.jsonl"]', "[]"),
        'policy.toml:4: files in [protected] is empty or has an unusable value; write files = ["protected.jsonl"].',
    ),
    "layers of the wrong kind": (
        ("[fix]", "[fix]\nlayers = [true]"),
        'policy.toml:16: layers in [fix] must be "auto", "all" or a list of layer numbers from 0;'
        " for example layers = [2, 3, 4].",
    ),
    "sampling limit without its window": (
        ("max_verbatim_tokens = 16\n", ""),
        "policy.toml:5: [class.copyright] sets max_sampling_probability without the length of the window"
        " it is about; add for example max_verbatim_tokens = 16, or secret = true.",
    ),
    "class without a limit": (
        ("secret = true\nmax_sampling_probability = 1e-6\n", ""),
        "policy.toml:9: [class.pii] sets no limit; add for example max_verbatim_tokens = 16, or secret = true.",
    ),
    "class name": (
        ("[class.pii]", '[class."p i i"]'),
        "policy.toml:9: [class.p i i] is not a usable class name; use letters, digits, '.', '_' and '-',"
        " for example [class.pii].",
    ),
    "missing name": (
        ('name = "release-gate"\n', ""),
        "policy.toml:1: 'name' is missing; add name = \"release-gate\".",
    ),
    "missing schema": (("schema = 1\n", ""), "policy.toml:1: 'schema' is missing; add schema = 1."),
    "another schema": (
        ("schema = 1", "\nschema = 2"),
        "policy.toml:2: this version of memscrub knows only schema 1; write schema = 1 or install a newer memscrub.",
    ),
    "missing section": (
        ('[protected]\nfiles = ["protected.jsonl"]\n', ""),
        "policy.toml:1: [protected] is missing; add a section [protected].",
    ),
    "list of sections": (
        ("[fix]", "[[fix]]"),
        "policy.toml:15: [fix] must be a section, not a list; write a section [fix].",
    ),
    "a text without quotes": (
        ('"next-best"', "next-best"),
        "policy.toml:16: not valid TOML at column 8 (Invalid value);"
        " check quotes, brackets and = signs (a text needs quotes).",
    ),
    "an unfinished value": (
        ('mode = "next-best"\n', 'mode = """next'),
        "policy.toml:16: ",
    ),
    "deep lists": (("schema = 1", "x = " + "[" * 5000), "policy.toml:1: not valid TOML"),
    "huge numbers": (("schema = 1", "x = " + "1" * 5000), "policy.toml:1: not valid TOML"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_policy_is_refused_with_line_and_suggestion(kind: str) -> None:
    (old, new), sentence = BAD[kind]
    message = refusal(GOOD.replace(old, new, 1))
    assert message.startswith(sentence)
    assert message == sentence or kind in ("an unfinished value", "deep lists", "huge numbers")
    assert "\n" not in message
    assert "PROTECTED" not in message


def test_no_class_is_refused_with_an_example() -> None:
    for rest in ("", "[class]\n"):
        message = refusal('schema=1\nname="n"\n[protected]\nfiles=["p.txt"]\n' + rest)
        assert "there is no [class.NAME] section; add one, for example [class.pii]" in message


def test_the_problem_that_comes_first_in_the_file_is_told_and_the_others_counted() -> None:
    message = refusal(GOOD.replace("[fix]", "[fix]\nmargin = 0").replace("0.60", "0").replace("0.01", '"x"'))
    assert message.startswith("policy.toml:7: max_near_verbatim")
    assert message.endswith("(2 more problems in this file.)")


def test_an_empty_policy_is_refused() -> None:
    for text in ("", "\n\n", "# only a comment\n"):
        assert refusal(text) == "policy.toml:1: the policy is empty; `memscrub init` writes one to start from."


def test_bad_utf8_is_refused_with_its_line() -> None:
    with pytest.raises(PolicyError, match=r"^policy\.toml:2: not valid UTF-8; save the policy as UTF-8 text\.$"):
        parse_policy(GOOD.encode().replace(b"gate", b"\xff"))


def test_a_missing_policy_a_directory_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="there is no such policy file; `memscrub init` writes"):
        load_policy(tmp_path / "none.toml")
    with pytest.raises(PolicyError, match="this is a directory; name the policy file in it"):
        load_policy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 17))
    with pytest.raises(PolicyError, match="larger than 64 KiB, so not a policy"):
        load_policy(tmp_path / "model.safetensors")
    with pytest.raises(PolicyError, match="not a usable file name"):
        load_policy("a\0b")


def test_a_file_that_is_named_must_exist_and_the_message_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    (tmp_path / "protectd.jsonl").write_text("x")
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    expected = "files in [protected] names 'protected.jsonl', which does not exist; did you mean 'protectd.jsonl'?"
    assert str(caught.value) == f"{path}:4: {expected}"
    (tmp_path / "protectd.jsonl").rename(tmp_path / "protected.jsonl")
    (tmp_path / "retain.txt").mkdir()
    with pytest.raises(PolicyError, match=r":13: retain in \[locality\] names 'retain.txt', which is a directory"):
        load_policy(path)
    (tmp_path / "retain.txt").rmdir()
    (tmp_path / "retain.txt").write_text("y")
    assert load_policy(str(path)).path == path


def test_the_signing_key_need_not_be_there_to_scan_or_gate(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x")
    path = tmp_path / "policy.toml"
    path.write_text('schema=1\nname="n"\nprotected.files=["p.txt"]\nclass.a.max_verbatim_tokens=8\nsign.key="k.pem"\n')
    assert load_policy(path).sign.key == "k.pem"


def test_fix_is_told_where_retain_text_belongs() -> None:
    policy = parse_policy(GOOD.replace('retain = ["retain.txt"]\n', "").encode())
    with pytest.raises(PolicyError, match=r"\[locality\] names no retain text.*add retain ="):
        _ = policy.retain_paths


@pytest.mark.parametrize("name", STARTERS)
def test_every_shipped_policy_loads_with_the_starter_files(name: str, tmp_path: Path) -> None:
    assert load_policy(write_starter(tmp_path, name)[0]).name == name


def test_the_demo_policy_is_valid() -> None:
    path = policies_folder() / "demo.toml"
    assert parse_policy(path.read_bytes(), path).name == "demo"


def test_no_policy_is_shipped_without_a_test() -> None:
    assert {path.stem for path in policies_folder().glob("*.toml")} == {*STARTERS, "demo"}


def test_the_reference_in_the_documentation_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "policy.md").read_text(encoding="utf-8")
    assert updated(page) == page, "run: python -m memscrub.policy.reference docs/policy.md"


def test_every_setting_has_a_description() -> None:
    page = (REPOSITORY / "docs" / "policy.md").read_text(encoding="utf-8")
    assert "| |" not in page and "|  |" not in page
    for section in Policy.model_fields.values():
        for field in getattr(section.annotation, "model_fields", {}).values():
            assert field.description


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("a",), 2),
        (("b", "c"), 5),
        (("b", "d"), 9),
        (("b", "d", 1), 9),
        (("b", "missing"), 4),
        (("e", "f", "g"), 16),
        (("h",), 1),
        ((), 1),
    ],
)
def test_the_line_of_a_key_is_where_its_statement_begins(keys: tuple[str | int, ...], line: int) -> None:
    text = '# x\na = 1\n\n[b]\nc = """\n[e]\na = 2\n"""\nd = [\n  1, # one\n  2,\n]\n\n# f\n[e]\nf.g = {x = 1}\n'
    assert line_of(text, keys) == line


def test_the_line_of_the_second_of_two_long_lists_is_found() -> None:
    text = "a = [\n" + "1,\n" * 60 + "]\n\n# b\nb = [\n" + "1,\n" * 60 + "]\n"
    assert line_of(text, ("a",)) == 1
    assert line_of(text, ("b",)) == 65


@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy_or_our_error(data: bytes) -> None:
    try:
        parse_policy(data)
    except PolicyError as error:
        assert str(error).startswith("policy.toml:")


VALUES = st.recursive(
    st.one_of(
        st.booleans().map(lambda b: "true" if b else "false"),
        st.integers().map(str),
        st.floats().map(repr),
        st.sampled_from(['"all"', '"mlp"', '"x"', '""', "2020-01-01", "1e999", "9" * 400, '"\\u0000"', "[]", "{}"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
        inner.map(lambda item: "{secret = " + item + "}"),
    ),
    max_leaves=4,
)
KEYS = sorted({line.split(" = ")[0] for line in GOOD.splitlines() if " = " in line})
KEYS += ["layers", "offsets", "key", "class", "probe", "nonsense", '"a key"', "controls", "margin"]


@given(st.sampled_from(GOOD.splitlines()), st.sampled_from(KEYS), VALUES)
def test_any_statement_in_any_place_is_accepted_or_our_error(after: str, key: str, value: str) -> None:
    text = GOOD.replace(after + "\n", f"{after}\n{key} = {value}\n", 1)
    try:
        parse_policy(text.encode())
    except PolicyError as error:
        assert str(error).startswith("policy.toml:")
        assert "\n" not in str(error)
