"""Every row of the architecture table against a two-layer model of its family, built on the meta device.

`python -m tests.test_families` writes the tables of docs/families.md anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memscrub.edit.locate import observe
from memscrub.errors import ArchitectureError, UsageError
from memscrub.models.architecture import FAMILIES, Family, Layout, Norm, Orientation, Variant, family_of
from memscrub.models.model import LoadedModel
from memscrub.models.readout import entry_gain, readout
from memscrub.models.site_finding import sites_of
from memscrub.models.trace import by_module, traced, weights_swapped
from tests.families import HIDDEN, VARIANTS, config_of

CASES = sorted(FAMILIES) + sorted(VARIANTS)
NEURONS = {"bloom": 4 * HIDDEN, "mpt": 4 * HIDDEN}  # whatever their configs say


def _loaded(case: str, device: str = "meta") -> LoadedModel:
    config = config_of(case, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=None,
        family=family_of(config.to_dict()),
        prompt=(),
        device=torch.device(device),
        dtype=torch.float32,
        vocabulary=96,
        max_positions=64,
    )


@pytest.mark.parametrize("name", CASES)
def test_every_block_has_both_sites_in_the_stated_orientation(name: str) -> None:
    loaded = _loaded(name)
    sites = sites_of(loaded)
    assert list(dict.fromkeys((site.kind, site.layer) for site in sites)) == [
        (kind, layer) for kind in ("mlp", "attention") for layer in (0, 1)
    ]
    for site in sites:
        if site.expert is not None:
            assert loaded.weight(site).shape == (HIDDEN, 96)
            continue
        module = loaded.model.get_submodule(site.name)
        assert loaded.weight(site).shape[0] == HIDDEN
        assert (type(module).__name__ == "Conv1D") == (site.orientation is Orientation.ROWS)
        if site.kind == "mlp":
            assert loaded.weight(site).shape[1] == NEURONS.get(name, 96)


@pytest.mark.parametrize("name", CASES)
def test_queries_are_as_many_as_the_attention_writes_from(name: str) -> None:
    loaded = _loaded(name)
    queries, outputs = sites_of(loaded, kinds=("query",)), sites_of(loaded, kinds=("attention",))
    for query, output in zip(queries, outputs, strict=True):
        size = loaded.weight(output).shape[1]
        rows = range(loaded.weight(query).shape[0]) if query.rows is None else query.rows
        config = loaded.model.config
        if hasattr(config, "kv_lora_rank"):  # latent attention: its queries are wider than its values
            size = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
            assert query.name.endswith("q_proj" if config.q_lora_rank is None else "q_b_proj")
        else:
            assert loaded.weight(query).shape[1] == HIDDEN
        assert len(set(rows)) == size
        assert (query.rows is None) == (loaded.family.layout is Layout.ALONE)


@pytest.mark.parametrize("name", CASES)
def test_moving_the_query_rows_changes_what_the_attention_makes_of_a_past_only(name: str) -> None:
    loaded = _randomised(name)
    site = sites_of(loaded, kinds=("query",), layers=[1])[0]
    ids = torch.tensor([[5, 17, 60, 3]])
    with torch.no_grad():
        before = loaded.logits(ids)
        change = torch.randn(site.part(loaded.weight(site)).shape, generator=torch.Generator().manual_seed(2))
        loaded.weight(site).add_(site.whole(change, loaded.weight(site)))
        after = loaded.logits(ids)
    # The first token sees only itself: whatever its query, the attention gives its own value back. A sink of
    # attention besides takes a share that does depend on the query.
    if loaded.family.model_type != "gpt_oss":
        torch.testing.assert_close(before[:, 0], after[:, 0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(before[:, 1:], after[:, 1:], atol=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "attention", "query"])
def test_a_block_without_a_module_that_its_family_should_have_stops_the_run(kind: str) -> None:
    loaded = _loaded("llama")
    name = sites_of(loaded, kinds=(kind,))[1].name
    parent, _, child = name.rpartition(".")
    delattr(loaded.model.get_submodule(parent), child)
    with pytest.raises(ArchitectureError, match="nothing was edited"):
        sites_of(loaded, kinds=(kind,))


@pytest.mark.parametrize("name", CASES)
def test_a_write_reaches_the_logits_as_the_row_says(name: str) -> None:
    loaded = _randomised(name)
    seen = readout(loaded)
    assert loaded.family.norm is not None
    norm, unembedding = loaded.model.get_submodule(loaded.family.norm.path), loaded.model.get_output_embeddings()
    stream = 100 * torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(0))
    # What is added whatever the stream is (biases) drops out of the difference.
    moved = unembedding(norm(stream.T)) - unembedding(norm(-stream.T))
    size = (stream - stream.mean(0) if seen.centred else stream).square().mean(0).sqrt()
    torch.testing.assert_close(moved.T * size / 2, seen.projections(stream), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_activations_times_output_vectors_are_what_enters_the_residual_stream(name: str) -> None:
    loaded = _randomised(name)
    sites = sites_of(loaded, kinds=("mlp",))
    tokens = [5, 17, 60, 3]
    seen = observe(loaded, sites, tokens)
    for indices in by_module(sites).values():  # experts together: a norm behind them sees their sum
        write = torch.zeros(len(tokens), HIDDEN)
        for index in indices:
            gain = entry_gain(loaded, sites[index])
            vectors = loaded.weight(sites[index])
            write += seen.activations[index] @ vectors.T * (1.0 if gain is None else gain)
        zeros = {sites[index].tensor: torch.zeros_like(loaded.parameter(sites[index])) for index in indices}
        with weights_swapped(loaded, zeros):
            (without,) = observe(loaded, sites[indices[0] : indices[0] + 1], tokens).residuals
        torch.testing.assert_close(seen.residuals[indices[0]] - without, write, atol=1e-3, rtol=1e-3)
        assert float(write.abs().mean()) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_a_traced_write_is_what_the_output_projection_makes_of_its_activations(name: str) -> None:
    loaded = _randomised(name)
    sites = sites_of(loaded)
    for module in by_module(sites):  # an expert's bias is weighed like its write, and is no part of an activation
        biases = getattr(loaded.model.get_submodule(module), "down_proj_bias", None)
        if biases is not None:
            biases.zero_()
    with traced(loaded, sites) as trace:
        logits = loaded.logits(torch.tensor([[5, 17, 60, 3]]))
        gradients = trace.gradients(logits[0, -1, 7])
    for module, indices in by_module(sites).items():
        bias, write = getattr(loaded.model.get_submodule(module), "bias", None), trace.writes[indices[0]]
        expected = sum(trace.activations[index] @ loaded.weight(sites[index]).T for index in indices)
        assert trace.activations[indices[0]].shape[:2] == write.shape[:2] == (1, 4)
        torch.testing.assert_close(write.detach(), expected + (0.0 if bias is None else bias), atol=1e-3, rtol=1e-3)
        assert float(gradients[indices[0]][0, -1].abs().max()) > 0


@pytest.mark.parametrize("name", CASES)
def test_logits_with_a_cached_past_are_those_of_the_whole_text(name: str) -> None:
    loaded = _randomised(name)
    ids = torch.tensor([[5, 17, 60, 3, 44, 8]])
    with torch.no_grad():
        _, past = loaded.features(ids[:, :4], keep=True)
        features, _ = loaded.features(ids[:, 4:], past, keep=True)
        rest = loaded.unembed(features[0])
        torch.testing.assert_close(rest, loaded.logits(ids)[0, 4:], atol=1e-2, rtol=1e-3)
    assert loaded.projects


def _randomised(name: str) -> LoadedModel:
    """A model of the family on the CPU whose parameters are all different, those of the norms too."""
    loaded = _loaded(name, "cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in loaded.model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    if loaded.family.multiplier is not None:
        for block in loaded.model.get_submodule(loaded.family.blocks):  # type: ignore[union-attr]
            setattr(block, loaded.family.multiplier, 0.37)
        setattr(loaded.model.config, loaded.family.multiplier, 0.37)
    return loaded


@pytest.mark.parametrize(
    ("config", "entry"),
    [
        ({"model_type": "bloom", "slow_but_exact": True}, "slow_but_exact"),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "post_layernorm"),
    ],
)
def test_a_variant_that_cannot_be_edited_is_refused_by_the_entry_that_asks_for_it(
    config: dict[str, Any], entry: str
) -> None:
    with pytest.raises(ArchitectureError, match=entry):
        family_of(config)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"model_type": "gpt_bigcode"}, Layout.FIRST),
        ({"model_type": "gpt_bigcode", "multi_query": None}, Layout.FIRST),
        ({"model_type": "gpt_bigcode", "multi_query": False}, Layout.PER_HEAD),
        ({"model_type": "falcon"}, Layout.FIRST),
        ({"model_type": "falcon", "multi_query": False}, Layout.PER_HEAD),
        ({"model_type": "falcon", "new_decoder_architecture": True}, Layout.PER_HEAD),
        ({"model_type": "bloom", "slow_but_exact": False}, Layout.PER_HEAD),
    ],
)
def test_the_layout_is_the_one_that_the_config_asks_for(config: dict[str, Any], layout: Layout) -> None:
    assert family_of(config).layout is layout


def test_defaults_of_variants_are_those_of_transformers() -> None:
    for name, family in FAMILIES.items():
        config = AutoConfig.for_model(name)
        for variant in family.variants:
            assert getattr(config, variant.entry) == variant.default


# The four models of arXiv 2606.18767 as their config.json files have them, at two layers.
PAPER = {
    "SmolLM-360M": ("llama", {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
                              "num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True}),
    "OLMo-1B": ("olmo", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
                         "num_key_value_heads": 16, "vocab_size": 50304, "tie_word_embeddings": True}),
    "OLMo-7B": ("olmo", {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                         "num_key_value_heads": 32, "vocab_size": 50304, "tie_word_embeddings": False}),
    "Llama-2-7B": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                             "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_their_sites_where_the_table_says(name: str) -> None:
    family, settings = PAPER[name]
    config = AutoConfig.for_model(family, num_hidden_layers=2, max_position_embeddings=2048, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    device = torch.device("meta")
    loaded = LoadedModel(model, None, family_of(config.to_dict()), (), device, torch.float32, config.vocab_size, 2048)
    width, neurons = settings["hidden_size"], settings["intermediate_size"]
    shapes = {site.kind: tuple(loaded.weight(site).shape) for site in sites_of(loaded, kinds=("mlp", "attention"))}
    assert shapes == {"mlp": (width, neurons), "attention": (width, width)}


def test_an_unknown_family_is_refused_with_the_known_ones_named() -> None:
    with pytest.raises(ArchitectureError, match="llama"):
        family_of({"model_type": "never-heard-of"})


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="layers 0 to 1"):
        sites_of(_loaded("llama"), layers=[2])


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert _updated(page) == page, "run: python -m tests.test_families"


PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN = "<!-- families: begin (python -m tests.test_families) -->"
END = "<!-- families: end -->"
COLUMNS = ("family", "blocks", "MLP output", "attention output", "queries", "layout", "stored as")
COLUMNS += ("routed experts", "shared expert", "norm after the MLP", "final norm")


def _updated(page: str) -> str:
    """The page with the tables between its markers renewed."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    rows = [_line(COLUMNS), "|---" * len(COLUMNS) + "|", *(_row(FAMILIES[name]) for name in sorted(FAMILIES))]
    variants = [_line(("family", "entry of config.json", "then")), "|---|---|---|", *_variants()]
    return "\n".join([before + BEGIN, "", *rows, "", *variants, "", END + after])


def _row(family: Family) -> str:
    paths = (f"`{path}`" for path in (family.blocks, family.mlp, family.attention, family.query))
    behind = [] if family.after_mlp is None else [_norm(family.after_mlp)]
    behind += [] if family.multiplier is None else [f"times `{family.multiplier}`"]
    experts, routed, shared = family.experts, "none", "none"
    if experts is not None:
        routed = f"`{experts.path}`, {experts.orientation.value}; on disk " + " or ".join(
            f"`{n}`" for n in experts.stored
        )
        shared = "none" if experts.shared is None else f"`{experts.shared}`"
    final = "unknown" if family.norm is None else _norm(family.norm)
    layout, orientation = family.layout.value, family.orientation.value
    cells = (*paths, layout, orientation, routed, shared, ", ".join(behind) or "none", final)
    return _line((f"`{family.model_type}`", *cells))


def _norm(norm: Norm) -> str:
    return f"`{norm.path}` ({'LayerNorm' if norm.centred else 'RMSNorm'}, gain: {norm.gain.value})"


def _variants() -> list[str]:
    return [
        _line(
            (
                f"`{name}`",
                f"`{variant.entry}` {str(variant.value).lower()}"
                + (", the default" * (variant.value == variant.default)),
                _consequence(variant),
            )
        )
        for name, family in sorted(FAMILIES.items())
        for variant in family.variants
    ]


def _consequence(variant: Variant) -> str:
    if variant.query is not None:
        return f"queries: `{variant.query}`"
    return f"refused: {variant.reason}" if variant.layout is None else f"layout: {variant.layout.value}"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(_updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
