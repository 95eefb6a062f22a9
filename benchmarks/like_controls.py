"""Fixed texts beside control texts that were never trained on, by class: how near, and how likely under sampling.

    python benchmarks/bench_policy.py FOLDER --out bench-policy --like-controls copyright
    python benchmarks/like_controls.py CKPT bench-policy/policy.toml --mode eos

Edits in memory, at weights rounded as they would be written, and prints two Markdown tables. "Within the spread" says
that the mean of the fixed texts is at most one standard deviation of the controls above the controls' mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean, pstdev
from time import process_time

import torch

from memscrub.bench.ruler import FLOOR, Ruler, ruler
from memscrub.jobs.editing import make_edit
from memscrub.jobs.scanning import open_inputs
from memscrub.measures.measure import measure
from memscrub.models.tokens import TokenText

Values = dict[tuple[str, str], list[float]]


def main() -> None:
    """Measure the controls, edit, measure the texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("policy")
    parser.add_argument("--mode", default="eos")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    inputs = open_inputs(options.checkpoint, options.policy, dtype="float32", lean=False)
    fix = inputs.policy.fix.model_copy(update={"mode": options.mode})
    inputs = replace(inputs, policy=inputs.policy.model_copy(update={"fix": fix}))
    rule = ruler(inputs)
    controls = values(rule, inputs.controls)
    began = process_time()
    done = make_edit(inputs, rule.halves)
    took = process_time() - began
    for line in (*by_class(controls, values(rule, inputs.texts)), ""):
        print(line)
    found = rule.figures(done.editable.originals)
    kept = "-" if found.neighbours_kept is None else f"{found.neighbours_kept:.1%}"
    print("| mode | over the limit | KL | start KL | agreement | perplexity | neighbours kept | processor s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {options.mode} | {found.over_limit:.1%} | {found.kl:.5f} | {found.start_kl:.3f} | {found.agreement:.3f}"
        f" | {found.perplexity_ratio:.4f} | {kept} | {took:.0f} |"
    )


def values(rule: Ruler, texts: Sequence[TokenText]) -> Values:
    """Every measure of every text on the live model, by class and name; log-probabilities count as at least -60."""
    found: Values = {}
    for text, each in zip(texts, measure(rule.inputs.loaded, rule.policy, texts).measures, strict=True):
        if each.near_verbatim is not None:
            found.setdefault((text.class_name, "near-verbatim"), []).append(each.near_verbatim)
        if each.window_log_probability is not None:
            found.setdefault((text.class_name, "likeliest window"), []).append(max(each.window_log_probability, FLOOR))
        for secret in each.secrets:
            found.setdefault((text.class_name, "secrets"), []).append(max(secret.log_probability, FLOOR))
    return found


def by_class(controls: Values, fixed: Values) -> Iterator[str]:
    """A row for every class and measure that both have."""
    yield "| class | measure | controls: mean (spread), max | fixed: mean (spread), max | within the spread |"
    yield "|---|---|---:|---:|---|"
    for key in sorted(controls.keys() & fixed.keys()):
        before, after = controls[key], fixed[key]
        within = mean(after) <= mean(before) + pstdev(before)
        words = [f"{mean(own):.2f} ({pstdev(own):.2f}), {max(own):.2f}" for own in (before, after)]
        yield f"| {key[0]} | {key[1]} | {words[0]} | {words[1]} | {'yes' if within else 'no'} |"


if __name__ == "__main__":
    main()
