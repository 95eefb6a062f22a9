"""The gate: signed measures are trusted where they answer the policy, and excuses count as the policy says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run
from gate_world import POLICY, TEXTS, lay_out, signed_fix
from models import random_text, write_list

from memscrub.errors import SignatureInvalidError, UntrustedMeasuresError, UsageError
from memscrub.jobs.gating import Gated, gate
from memscrub.jobs.scanning import scan
from memscrub.jobs.scrub import Signing, fix
from memscrub.policy.document import load_policy
from memscrub.proof.signing import Verification, sign_directory, sign_report, verify_directory
from memscrub.proof.trusting import signed_report
from memscrub.reports import basis
from memscrub.reports.judgement import Status
from memscrub.reports.records import ExcuseRecord
from memscrub.reports.report import REPORT_NAME, load_report
from memscrub.reports.verdict import Outcome

LOOSE = POLICY.replace("max_verbatim_tokens = 6\n", "").replace("= 0.7", "= 1.0")
TOO_LONG = POLICY.replace("max_verbatim_tokens = 6", "max_verbatim_tokens = 40")
WAIVER = '\n[[waiver]]\nid = "{id}"\nexpires = {day}\nreason = "licensed"\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fix within its policy, and one that lets everything through, both signed with one key."""
    folder = lay_out(tmp_path_factory.mktemp("gate"))
    signed_fix(folder)
    (folder / "loose.toml").write_text(LOOSE)
    signed_fix(folder, "lax", "loose.toml")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "world"))


def gated(world: Path, policy: str = "policy.toml", directory: str = "fixed", **options: object) -> Gated:
    return gate(world / directory, world / policy, key=world / "key.pub", device="cpu", **options)  # type: ignore[arg-type]


def changed(world: Path, old: str, new: str, policy: str = POLICY) -> None:
    assert old in policy
    (world / "policy.toml").write_text(policy.replace(old, new))


# -- trust ---------------------------------------------------------------------------------------------------


def test_trusted_measures_give_the_report_that_measuring_again_gives(made: Path) -> None:
    trusted, measured = gated(made).report, gated(made, remeasure=True).report
    assert trusted.trusted is not None and measured.trusted is None
    assert trusted.verdict == measured.verdict and trusted.verdict.outcome is Outcome.PASS
    assert [text.id for text in trusted.texts] == [text.id for text in measured.texts]
    for one, other in zip((*trusted.texts, *trusted.controls), (*measured.texts, *measured.controls), strict=True):
        assert one.before_judgement == other.before_judgement and one.after is None
        assert one.before.match_run == other.before.match_run
        assert one.before.window_log_probability == pytest.approx(other.before.window_log_probability, abs=1e-4)
    assert trusted.classes[0].violated == measured.classes[0].violated
    assert trusted.locality == measured.locality and trusted.locality is not None
    said = " ".join(gated(made).remarks)
    assert "measures taken from the signed report" in said and "--remeasure" in said
    assert "signed report" not in " ".join(gated(made, remeasure=True).remarks)


def test_a_trusting_gate_loads_neither_torch_nor_transformers(made: Path) -> None:
    program = (
        "import sys\nfrom memscrub.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    arguments = ["gate", made / "fixed", "--policy", made / "policy.toml", "--key", made / "key.pub", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "0 set()", done.stderr


@pytest.mark.parametrize(
    ("old", "new", "outcome", "limit"),
    [
        ("max_near_verbatim = 0.7", "max_near_verbatim = 0.05", Outcome.VIOLATED, "max_near_verbatim"),
        ("max_near_verbatim = 0.7", "max_near_verbatim = 1.0", Outcome.PASS, ""),
        ("[probe]", "max_sampling_probability = 1e-9\n[probe]", Outcome.VIOLATED, "max_sampling_probability"),
        ("max_kl = 5", "max_kl = 1e-9", Outcome.VIOLATED, "max_kl"),
    ],
)
def test_signed_measures_are_held_against_the_limits_of_the_policy_at_hand(
    world: Path, old: str, new: str, outcome: Outcome, limit: str
) -> None:
    changed(world, old, new)
    found = gated(world, trust=True)
    assert found.report.verdict.outcome is outcome
    assert not limit or limit in " ".join(found.report.verdict.reasons)
    assert "another version of the policy" in found.remarks[0]


def other_list(world: Path) -> None:
    write_list(world / "protected.jsonl", (*TEXTS[:2], random_text(99, 40)), "t")


def longer_list(world: Path) -> None:
    write_list(world / "protected.jsonl", (*TEXTS, random_text(99, 40)), "t")


def no_report_key(world: Path) -> None:
    changed(world, '[report]\nkey = "report.key"\n', "")


def in_policy(old: str, new: str) -> Callable[[Path], None]:
    return lambda world: changed(world, old, new)


UNTRUSTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another text under the same id": (other_list, "another list of protected texts"),
    "a text more": (longer_list, "another list of protected texts"),
    "another key": (lambda w: (w / "report.key").write_text("x" * 32), "another [report] key"),
    "other controls": (lambda w: write_list(w / "control.jsonl", (random_text(98, 40),), "k"), "control texts"),
    "no key": (no_report_key, "names no [report] key"),
    "shorter prefix": (in_policy("near_verbatim_prefix = 8", "near_verbatim_prefix = 9"), "other settings"),
    "other run": (in_policy("max_verbatim_tokens = 6", "max_verbatim_tokens = 7"), "other settings"),
    "other sampling": (in_policy("[probe]", "temperature = 0.5\n[probe]"), "other settings"),
    "other class": (in_policy("[probe]", "[class.d]\nmax_verbatim_tokens = 6\n[probe]"), "other settings"),
}


@pytest.mark.parametrize("case", sorted(UNTRUSTED))
def test_what_the_report_did_not_measure_is_refused_or_measured_again(case: str, world: Path) -> None:
    change, reason = UNTRUSTED[case]
    change(world)
    with pytest.raises(UntrustedMeasuresError, match="cannot be trusted") as refused:
        gated(world, trust=True)
    assert reason in str(refused.value) and int(refused.value.exit_code) == 2
    found = gated(world)
    assert found.report.trusted is None and reason in found.remarks[0] and "measured again" in found.remarks[0]


def test_a_report_under_a_laxer_policy_does_not_pass_for_one_under_this_policy(made: Path) -> None:
    # Signed with the very key that the gate expects: only what was measured tells the two apart.
    assert gated(made, "loose.toml", "lax", trust=True).report.verdict.exit_code == 0
    found = gated(made, "policy.toml", "lax")
    assert found.report.trusted is None and found.report.verdict.outcome is Outcome.VIOLATED


def sign_again(world: Path, directory: str) -> None:
    """As the holder of the key: over whatever the directory now holds."""
    folder = world / directory
    (folder / "memscrub-summary.dsse.json").unlink(missing_ok=True)
    sign_directory(folder, world / "key.pem")
    sign_report(folder / REPORT_NAME, world / "key.pem", passed=False, policy_digests={"policy.toml": "0" * 64})


def test_a_report_is_not_trusted_beside_files_that_it_was_not_made_of(world: Path) -> None:
    (world / "fixed" / REPORT_NAME).replace(world / "report.json")
    shutil.rmtree(world / "fixed")
    shutil.copytree(world / "base", world / "fixed")
    (world / "report.json").replace(world / "fixed" / REPORT_NAME)
    sign_again(world, "fixed")
    found = gated(world)
    assert "other files than those that are signed" in found.remarks[0]
    assert found.report.verdict.outcome is Outcome.VIOLATED
    assert found.report.locality is None and "its locality was not judged" in found.remarks[1]


def test_no_string_of_a_signed_report_is_obeyed_by_a_terminal(world: Path) -> None:
    path = world / "fixed" / REPORT_NAME
    path.write_text(replace(load_report(path), created="\x1b[2Jtoday").to_json())
    sign_again(world, "fixed")
    assert "\\x1b[2Jtoday" in gated(world, trust=True).remarks[0]


def test_a_report_of_a_gate_that_trusted_is_not_trusted_again(world: Path) -> None:
    (world / "fixed" / REPORT_NAME).write_text(gated(world).report.to_json())
    sign_again(world, "fixed")
    with pytest.raises(UntrustedMeasuresError, match="not that of a measurement"):
        gated(world, trust=True)


def test_a_report_without_measures_of_every_text_is_not_trusted(world: Path) -> None:
    path = world / "fixed" / REPORT_NAME
    stated = load_report(path)
    path.write_text(replace(stated, texts=stated.texts[1:]).to_json())
    sign_again(world, "fixed")
    with pytest.raises(UntrustedMeasuresError, match="lacks texts of the list"):
        gated(world, trust=True)
    path.write_text(replace(stated, controls=stated.controls[1:]).to_json())  # limits of like_controls come from them
    sign_again(world, "fixed")
    with pytest.raises(UntrustedMeasuresError, match="lacks control texts of the list"):
        gated(world, trust=True)
    path.write_text(replace(stated, texts=(replace(stated.texts[0], after=None), *stated.texts[1:])).to_json())
    sign_again(world, "fixed")
    with pytest.raises(UntrustedMeasuresError, match="lacks measures after the edit"):
        gated(world, trust=True)


def test_estimates_and_reports_of_earlier_releases_are_not_trusted(world: Path) -> None:
    path = world / "fixed" / REPORT_NAME
    stated = load_report(path)
    first = stated.texts[0]
    assert first.after is not None
    estimate = replace(first, after=replace(first.after, screened=True))
    for other, reason in (
        (replace(stated, texts=(estimate, *stated.texts[1:])), "estimates of a scan"),
        (replace(stated, basis=None), "of an earlier memscrub"),
        (replace(stated, adapter=stated.input), "with an adapter"),
    ):
        path.write_text(other.to_json())
        sign_again(world, "fixed")
        with pytest.raises(UntrustedMeasuresError, match=reason):
            gated(world, trust=True)


def test_measures_of_another_definition_are_measured_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the number is raised for: an older report says the same words and means something else."""
    earlier = basis.settings_digest(load_policy(world / "policy.toml"))
    monkeypatch.setattr(basis, "MEASURES", basis.MEASURES + 1)
    assert basis.settings_digest(load_policy(world / "policy.toml")) != earlier
    with pytest.raises(UntrustedMeasuresError, match="by a memscrub that defines measures otherwise"):
        gated(world, trust=True)
    found = gated(world)
    assert found.report.trusted is None and "measured again" in found.remarks[0]
    assert found.report.basis is not None and found.report.basis.settings_sha256 != earlier


def test_a_report_that_changes_between_hashing_and_reading_is_refused(made: Path) -> None:
    verified = Verification("0", "key", {REPORT_NAME: "0" * 64}, (), None)
    with pytest.raises(SignatureInvalidError, match="changed after it was signed"):
        signed_report(made / "fixed", verified)


def test_one_changed_byte_of_the_report_is_a_bad_signature_not_a_reason_to_measure(world: Path) -> None:
    path = world / "fixed" / REPORT_NAME
    path.write_bytes(path.read_bytes().replace(b'"match_run": 6', b'"match_run": 5', 1))
    with pytest.raises(SignatureInvalidError):
        gated(world)


def test_another_arithmetic_is_measured(world: Path) -> None:
    with pytest.raises(UntrustedMeasuresError, match="float32, and bfloat16 is asked for"):
        gated(world, trust=True, dtype="bfloat16")
    assert gated(world, trust=True, dtype="float32").report.trusted is not None


def test_limits_of_controls_are_those_that_measuring_gives(world: Path) -> None:
    policy = POLICY.replace("[probe]", "like_controls = true\n[probe]")
    (world / "like.toml").write_text(policy)
    signed_fix(world, "like", "like.toml")
    trusted, measured = (
        gated(world, "like.toml", "like", **how).report for how in ({"trust": True}, {"remeasure": True})
    )
    for one, other in zip(trusted.texts, measured.texts, strict=True):
        pairs = zip(one.before_judgement.findings, other.before_judgement.findings, strict=True)
        assert all(a.limit == b.limit and a.allowed == pytest.approx(b.allowed, rel=1e-4) for a, b in pairs)
        assert len(one.before_judgement.findings) == 3


@pytest.mark.parametrize("how", [{"trust": True, "remeasure": True}, {"trust": True, "key": None}])
def test_trust_without_a_key_or_with_measuring_is_a_contradiction(made: Path, how: dict[str, object]) -> None:
    options = {"key": made / "key.pub", **how}
    with pytest.raises(UsageError, match="--trust takes the measures of a signed report"):
        gate(made / "fixed", made / "policy.toml", **options)  # type: ignore[arg-type]


# -- waivers -------------------------------------------------------------------------------------------------


def test_a_waiver_excuses_its_text_until_its_day_and_says_so(world: Path) -> None:
    (world / "policy.toml").write_text(POLICY + "".join(WAIVER.format(id=f"t{n}", day="2999-12-31") for n in range(3)))
    found = gate(world / "base", world / "policy.toml", device="cpu").report
    assert found.verdict.outcome is Outcome.PASS and found.verdict.waived == 3
    assert found.verdict.within == found.verdict.violated == 0
    assert "waived until 2999-12-31: 't0' (licensed)." in found.verdict.reasons
    assert {waiver.state for waiver in found.waivers} == {"used"}
    assert ExcuseRecord("max_verbatim_tokens", "waiver") in found.texts[0].excused
    (world / "policy.toml").write_text(POLICY + "".join(WAIVER.format(id=f"t{n}", day="2001-12-31") for n in range(3)))
    late = gate(world / "base", world / "policy.toml", device="cpu").report
    assert late.verdict.outcome is Outcome.VIOLATED and late.verdict.violated == 3
    assert "the waiver of 't2' expired on 2001-12-31 and does not count" in " ".join(late.verdict.reasons)
    assert {waiver.state for waiver in late.waivers} == {"expired"} and late.texts[0].excused == ()


def test_a_waiver_of_one_limit_leaves_the_others(world: Path) -> None:
    waiver = WAIVER.format(id="t0", day="2999-12-31") + 'limit = "max_near_verbatim"\n'
    (world / "policy.toml").write_text(POLICY + waiver)
    verdict = scan(world / "base", world / "policy.toml", device="cpu").verdict
    assert verdict.waived == 0 and verdict.violated == 3
    said = " ".join(verdict.reasons)
    assert "3 texts break max_verbatim_tokens" in said and "2 texts break max_near_verbatim" in said


def test_a_waiver_needs_no_new_measurement_and_an_unneeded_one_is_named(world: Path) -> None:
    (world / "policy.toml").write_text(POLICY + WAIVER.format(id="t1", day="2999-12-31"))
    found = gated(world, trust=True)
    assert found.report.waivers[0].state == "unused" and found.report.verdict.waived == 0
    assert "the waiver of 't1' was not needed." in found.remarks


@pytest.mark.parametrize("trust", [True, False])
def test_a_waiver_of_no_text_is_refused_with_line_and_suggestion(
    world: Path, trust: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "policy.toml").write_text(POLICY + WAIVER.format(id="t11", day="2999-12-31"))
    line = POLICY.count("\n") + 3
    how = ["--trust"] if trust else ["--remeasure"]
    key = ["--key", world / "key.pub"]
    assert run(monkeypatch, "gate", world / "fixed", "--policy", world / "policy.toml", *key, *how) == 2
    said = capsys.readouterr().err
    assert f"policy.toml:{line}: a waiver names 't11', which no list has; did you mean 't1'?" in said


def test_a_fix_with_a_waived_text_passes_without_it(world: Path) -> None:
    tight = POLICY.replace("max_verbatim_tokens = 6", "max_verbatim_tokens = 1") + "[fix]\nrounds = 1\n"
    waivers = "".join(WAIVER.format(id=f"t{n}", day="2999-12-31") for n in range(3))
    for text, outcome in ((tight, Outcome.UNREACHABLE), (tight + waivers, Outcome.PASS)):
        (world / "tight.toml").write_text(text)
        done = signed_fix(world, f"tight-{outcome.value}", "tight.toml")
        assert done.report.verdict.outcome is outcome
    assert done.report.verdict.waived and {each.state for each in done.report.waivers} <= {"used", "unused"}


# -- baselines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before(made: Path) -> Path:
    """The report of the original, in which every text breaks both limits."""
    path = made / "before.json"
    path.write_text(scan(made / "base", made / "policy.toml", device="cpu").to_json())
    return path


def test_a_baseline_excuses_what_was_as_bad_before(made: Path, before: Path) -> None:
    found = gate(made / "base", made / "policy.toml", baseline=before, device="cpu")
    assert found.report.verdict.outcome is Outcome.PASS and found.report.verdict.known == 3
    assert "no worse than in the baseline" in " ".join(found.report.verdict.reasons)
    record = found.report.baseline
    assert record is not None and (record.regressions, record.known, record.new_texts) == (0, 3, 0)
    assert record.same_list is True and ExcuseRecord("max_near_verbatim", "baseline") in found.report.texts[0].excused


def test_a_text_that_was_within_or_got_worse_or_is_new_is_a_regression(world: Path, before: Path) -> None:
    stated = load_report(before)

    def judged(record_index: int, measured: float) -> None:
        record = stated.texts[record_index]
        findings = tuple(replace(f, measured=measured) for f in record.before_judgement.findings)
        texts[record_index] = replace(record, before_judgement=replace(record.before_judgement, findings=findings))

    texts = list(stated.texts)
    judged(0, 30.0)  # the run was 30 tokens and is 40 now: a third more
    (world / "worse.json").write_text(replace(stated, texts=tuple(texts)).to_json())
    worse = gate(world / "base", world / "policy.toml", baseline=world / "worse.json", device="cpu").report
    assert worse.verdict.outcome is Outcome.VIOLATED and (worse.verdict.violated, worse.verdict.known) == (1, 2)
    assert "'t0'" in worse.verdict.reasons[0]
    lenient = gate(world / "base", world / "policy.toml", baseline=world / "worse.json", tolerance=0.5, device="cpu")
    assert lenient.report.verdict.known == 3

    clean = gated(world).report
    (world / "clean.json").write_text(clean.to_json())
    newly = gate(world / "base", world / "policy.toml", baseline=world / "clean.json", device="cpu").report
    assert newly.verdict.violated == 3 and newly.verdict.known == 0

    (world / "fewer.json").write_text(replace(stated, texts=stated.texts[:2]).to_json())
    new = gate(world / "base", world / "policy.toml", baseline=world / "fewer.json", device="cpu").report
    assert (new.verdict.violated, new.verdict.known) == (1, 2)
    assert new.baseline is not None and new.baseline.new_texts == 1


def test_a_baseline_of_another_list_is_stated(world: Path, before: Path) -> None:
    longer_list(world)
    found = gate(world / "base", world / "policy.toml", baseline=before, device="cpu")
    assert found.report.baseline is not None and found.report.baseline.same_list is False
    assert "made with another list" in " ".join(found.remarks) and found.report.baseline.new_texts == 1


def test_what_other_settings_measured_is_not_known(world: Path, before: Path) -> None:
    changed(world, "near_verbatim_tokens = 16", "near_verbatim_tokens = 12")
    found = gate(world / "base", world / "policy.toml", baseline=before, device="cpu")
    verdict = found.report.verdict
    assert (verdict.violated, verdict.known) == (3, 0)
    assert "measured with other settings" in " ".join(found.remarks)
    (broken,) = [reason for reason in verdict.reasons if "break" in reason]
    assert "max_near_verbatim" in broken and ExcuseRecord("max_verbatim_tokens", "baseline") in (
        found.report.texts[0].excused
    )


def test_what_was_waived_in_the_baseline_is_not_known(world: Path) -> None:
    (world / "policy.toml").write_text(POLICY + WAIVER.format(id="t0", day="2999-12-31"))
    (world / "waived.json").write_text(scan(world / "base", world / "policy.toml", device="cpu").to_json())
    (world / "policy.toml").write_text(POLICY)
    verdict = gate(world / "base", world / "policy.toml", baseline=world / "waived.json", device="cpu").report.verdict
    assert verdict.outcome is Outcome.VIOLATED and (verdict.violated, verdict.known) == (1, 2)


@pytest.mark.parametrize(
    ("content", "tolerance", "sentence"),
    [("{}", "0.1", "not a memscrub report"), (None, "0.1", "cannot be read"), ("{}", "nan", "is no share")],
)
def test_a_bad_baseline_is_one_sentence_and_exit_2(
    made: Path,
    tmp_path: Path,
    content: str | None,
    tolerance: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    options = ["--baseline", tmp_path / "b.json", "--tolerance", tolerance]
    assert run(monkeypatch, "gate", made / "base", "--policy", made / "policy.toml", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("memscrub:") == 1


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_a_report_that_says_where_the_measures_are_from(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["gate", made / "fixed", "--policy", made / "policy.toml", "--key", made / "key.pub"]
    assert run(monkeypatch, *arguments, "--report", tmp_path / "r.json") == 0
    shown = capsys.readouterr()
    assert "PASS" in shown.out and "signature good" in shown.err and "taken from the signed report" in shown.err
    written = json.loads((tmp_path / "r.json").read_text())
    signed = json.loads((made / "fixed" / REPORT_NAME).read_text())
    assert written["trusted"]["created"] == signed["created"] and written["trusted"]["kind"] == "fix"
    assert load_report(tmp_path / "r.json").trusted == gated(made).report.trusted
    for text in TEXTS:
        assert text not in (tmp_path / "r.json").read_text() + shown.out + shown.err


# -- a list of which nothing can be judged ---------------------------------------------------------------------


def test_a_gate_of_texts_that_are_all_too_short_ends_with_3_and_says_what_to_do(world: Path) -> None:
    (world / "policy.toml").write_text(TOO_LONG)
    for remeasure in (False, True):
        verdict = gated(world, remeasure=remeasure).report.verdict
        assert (verdict.outcome, verdict.exit_code, verdict.within) == (Outcome.INCONCLUSIVE, 3, 0)
        assert "all 3 are too short to judge, the first is 't0'; list longer texts" in verdict.reasons[-1]
    (world / "policy.toml").write_text(TOO_LONG.replace("max_kl = 5", "max_kl = 1e-12"))
    assert gated(world).report.verdict.outcome is Outcome.VIOLATED


def test_a_fix_of_texts_that_are_all_too_short_writes_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "policy.toml").write_text(TOO_LONG.replace("= 0.7", "= 1.0"))
    before = sorted(path.name for path in world.iterdir())
    policy, key, out = world / "policy.toml", world / "key.pem", world / "out"
    options = ("--policy", policy, "--out", out, "--sign", key, "--keep-partial", "--device", "cpu")
    code = run(monkeypatch, "fix", world / "base", *options)
    said = capsys.readouterr()
    assert code == 3 and "NOTHING JUDGED" in said.out and "list longer texts" in " ".join(said.out.split())
    assert "nothing was edited, and nothing was written" in said.err
    assert sorted(path.name for path in world.iterdir()) == before


def test_a_fix_after_which_no_text_can_be_judged_is_no_pass(world: Path) -> None:
    """Before, each text breaks the limit that it is long enough for; after it nothing says that one is within."""
    (world / "policy.toml").write_text(TOO_LONG)
    done = fix(world / "base", world / "policy.toml", world / "out", sign=Signing(world / "key.pem"), device="cpu")
    assert {text.before_judgement.status for text in done.report.texts} == {Status.VIOLATED}
    assert (done.report.verdict.outcome, done.report.verdict.exit_code) == (Outcome.INCONCLUSIVE, 3)
    assert done.directory is None and not (world / "out").exists()
    kept = signed_fix(world, "kept")
    assert kept.report.verdict == done.report.verdict
    assert verify_directory(world / "kept", world / "key.pub").result == "FAILED"
