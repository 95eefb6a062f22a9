"""Quantized checkpoints: refused by name, or written out in full to the very values the library computes with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from memscrub.errors import CheckpointError, ExitCode, NumericalError, OutputError, UsageError
from memscrub.storage.checkpoint import CONFIG, INDEX, SINGLE, digest_files, open_checkpoint, read_tensor
from memscrub.storage.dequantize import Dequantized, dequantize
from memscrub.storage.dequantize_formats import block_scaled, unpacked_mxfp4
from memscrub.storage.quantized import SUPPORTED, refuse_quantized

torch.set_num_threads(1)

BLOCK = [16, 16]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PROBE = torch.arange(24).reshape(2, 12) * 5 % 64
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


def llama(width: int = 40) -> LlamaForCausalLM:
    """Two blocks in bfloat16; the usual 40 intermediate neurons are not divided by blocks of 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.15,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return GptOssForCausalLM(config).to(torch.bfloat16).eval()


def linears(model: Any) -> list[str]:
    return [name for name in model.state_dict() if "_proj.weight" in name]


def saved(
    root: Path, model: Any, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any], *, parts: int
) -> Path:
    """The model's own files with its weights replaced, in one file or in two with an index."""
    root.mkdir()
    model.config.save_pretrained(root)
    config = json.loads((root / CONFIG).read_text()) | {"dtype": "bfloat16", "quantization_config": dict(quantization)}
    (root / CONFIG).write_text(json.dumps(config))
    (root / "tokenizer_config.json").write_text("{}")
    (root / "sub").mkdir()
    (root / "sub" / "notes.txt").write_text("carried over")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if parts == 1:
        save_file(whole, root / SINGLE, {"format": "pt"})
        return root
    place = {name: SHARDS[number % 2] for number, name in enumerate(sorted(whole))}  # scales apart from their weights
    for shard in SHARDS:
        save_file({n: t for n, t in whole.items() if place[n] == shard}, root / shard, {"format": "pt"})
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return root


def body(model: Any) -> dict[str, Tensor]:
    """What is stored of a model: tied weights once."""
    return {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}


def fp8_checkpoint(root: Path, *, parts: int = 2, width: int = 40, **change: Any) -> Path:
    """Every projection in 8-bit floats with a scale for each block, as DeepSeek and Qwen publish them."""
    model = llama(width)
    tensors = body(model)
    for name in linears(model):
        weight = tensors[name].float()
        rows, columns = (-(-n // b) for n, b in zip(weight.shape, BLOCK, strict=True))
        padded = torch.zeros(rows * BLOCK[0], columns * BLOCK[1])
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scale = padded.view(rows, BLOCK[0], columns, BLOCK[1]).abs().amax(dim=(1, 3)) / 448
        spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        full = (padded / spread).to(torch.float8_e4m3fn)
        tensors[name] = full[: weight.shape[0], : weight.shape[1]]
        tensors[name.replace(".weight", ".weight_scale_inv")] = scale
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK} | change
    return saved(root, model, tensors, quantization, parts=parts)


def mxfp4_checkpoint(root: Path, *, parts: int = 2) -> Path:
    """The experts of a small gpt-oss as blocks of 32 four-bit values with one exponent each."""
    model = gpt_oss()
    tensors = body(model) | {"lm_head.weight": model.lm_head.weight.detach()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        weight = tensors.pop(name).float().transpose(1, 2)  # [experts, out, in]
        groups = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = (groups.abs().amax(-1) / 6).log2().ceil()
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        scaled = groups / exponent.exp2()[..., None]
        nearest = (scaled.abs()[..., None] - table).abs().argmin(-1).to(torch.uint8) + 8 * (scaled < 0).to(torch.uint8)
        tensors[f"{name}_blocks"] = nearest[..., 0::2] | nearest[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    return saved(root, model, tensors, {"quant_method": "mxfp4"}, parts=parts)


def compressed_checkpoint(root: Path, form: str, weights: Mapping[str, Any], *, parts: int = 2, **change: Any) -> Path:
    """Every projection as the package compresses it."""
    model = llama()
    tensors = body(model)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    for name in linears(model):
        weight = tensors.pop(name)
        grouped = weight.unflatten(1, (-1, weights["group_size"])) if "group_size" in weights else weight[:, None]
        if weights["strategy"] == "tensor":
            grouped = weight.reshape(1, 1, -1)
        least, most = grouped.amin(-1), grouped.amax(-1)
        if weights["strategy"] == "tensor":
            least, most = least.reshape(1), most.reshape(1)
        scale, zero = calculate_qparams(least, most, scheme.weights)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
        packed = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
        tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in packed.items()}
    quantization = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}}, "ignore": ["lm_head"],
    } | change  # fmt: skip
    return saved(root, model, tensors, quantization, parts=parts)


CHANNEL8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TENSOR8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
SKEWED4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}
KINDS: dict[str, tuple[Callable[[Path], Path], Any, Callable[[], Any]]] = {
    "fp8": (
        lambda root: fp8_checkpoint(root, width=48),  # the library refuses weights that its blocks do not divide
        FineGrainedFP8Config(dequantize=True, weight_block_size=tuple(BLOCK)),
        lambda: llama(48),
    ),
    "mxfp4": (mxfp4_checkpoint, Mxfp4Config(dequantize=True), gpt_oss),
    **{
        f"compressed-tensors {form} {number}": (
            lambda root, form=form, weights=weights: compressed_checkpoint(root, form, weights),
            CompressedTensorsConfig(dequantize=True),
            llama,
        )
        for number, (form, weights) in enumerate(
            [
                ("float-quantized", CHANNEL8),
                ("float-quantized", TENSOR8),
                ("int-quantized", INT8),
                ("pack-quantized", INT8),
                ("pack-quantized", {**INT4, "group_size": 8}),
                ("pack-quantized", SKEWED4),
            ]
        )
    },
}


def run(source: Path, out: Path) -> Dequantized:
    return dequantize(open_checkpoint(source, quantized=True), out)


def loaded(path: Path, quantization: Any = None) -> Any:
    extra = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **extra).eval()


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=PROBE, use_cache=False).logits.float()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning:transformers.quantizers.auto")
def test_in_full_a_model_is_to_the_bit_what_the_library_makes_of_the_quantized_one(tmp_path: Path, kind: str) -> None:
    build, library, original = KINDS[kind]
    source = build(tmp_path / "in")
    before = digest_files(source)
    done = run(source, tmp_path / "out")
    assert digest_files(source) == before
    ours, weights = loaded(tmp_path / "out"), load_all(tmp_path / "out")
    assert getattr(ours.config, "quantization_config", None) is None
    theirs = loaded(source, library)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name].float(), value.float()), name
    assert torch.equal(logits(ours), logits(theirs))
    error = (logits(ours) - logits(original())).abs().mean() / logits(original()).abs().mean()
    assert 0 < error < 0.35
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert done.tensors == len([name for name in weights if name.endswith(("_proj.weight", "_proj"))]) - (
        8 if kind == "mxfp4" else 0
    )
    assert done.kept == len(weights) - done.tensors and done.bytes_written > 0


def load_all(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(open_checkpoint(path), name) for name in open_checkpoint(path).tensors}


def test_blocks_that_are_cut_off_give_what_compressed_tensors_gives_and_experts_are_scaled_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(41, 19, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator)
    ours = block_scaled(weight, scale, BLOCK).to(torch.bfloat16)
    state = {"m.weight": weight, "m.weight_scale_inv": scale}
    assert torch.equal(ours, FP8BlockDequantizer(weight_block_size=tuple(BLOCK)).process(state)["m.weight"])
    experts = torch.stack([weight.float(), 2 * weight.float()]).to(torch.float8_e4m3fn)
    both = block_scaled(experts, torch.stack([scale, scale]), BLOCK)
    assert torch.equal(both[0].to(torch.bfloat16), ours) and torch.equal(both[1], 2 * both[0])


def test_blocks_of_mxfp4_give_what_the_library_gives_for_every_value_and_exponent() -> None:
    values = torch.arange(256).to(torch.uint8).reshape(16, 16).repeat(20, 1)
    blocks = values.reshape(1, 32, 10, 16)
    scales = torch.arange(320).remainder(64).add(96).to(torch.uint8).reshape(1, 32, 10)
    ours = unpacked_mxfp4(blocks[0], scales[0]).to(torch.bfloat16)
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales)[0])


def test_layout_and_everything_that_is_not_a_weight_stay(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in", activation_scheme="dynamic")
    (source / "model.sig").write_text("of the quantized files")
    run(source, tmp_path / "out")
    before, after = open_checkpoint(source, quantized=True), open_checkpoint(tmp_path / "out")
    assert set(after.files) == set(before.files) - {"model.sig"}
    assert after.shards == before.shards
    for name, info in after.tensors.items():
        assert info.shard == before.tensors[name].shard
        if before.tensors[name].dtype == "BF16":
            assert torch.equal(read_tensor(after, name), read_tensor(before, name))
    assert "lm_head.weight" not in after.tensors  # tied stays tied
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "carried over"
    assert set(before.config) - set(after.config) == {"quantization_config"}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(info.end - info.begin for info in after.tensors.values())
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / SHARDS[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_stays_one_file_and_scales_of_activations_go(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in", parts=1, weight_block_size=None)
    tensors = load_file(source / SINGLE)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = torch.tensor(0.5)
        tensors[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(1.0)
    save_file(tensors, source / SINGLE)
    done = run(source, tmp_path / "out")
    assert len(done.dropped) == done.tensors == 14 and open_checkpoint(tmp_path / "out").shards == (SINGLE,)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[name], (tensors[name].float() / 2).to(torch.bfloat16))


def test_the_stated_dtype_is_written_and_a_value_it_cannot_hold_stops_the_run(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in", parts=1)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"dtype": "float16"}))
    assert run(source, tmp_path / "half").dtype == "float16"
    tensors = load_file(source / SINGLE)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file(tensors | {name: tensors[name] * 1e9}, source / SINGLE)
    with pytest.raises(NumericalError, match=r"mlp\.down_proj\.weight in full holds NaN or infinite"):
        run(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "in"]


def test_every_stored_part_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    source = fp8_checkpoint(tmp_path / "in")
    monkeypatch.setattr(
        "memscrub.storage.dequantize.read_tensor", lambda ckpt, name: held.append(1) or read_tensor(ckpt, name)
    )
    done = run(source, tmp_path / "out")
    assert len(held) == 2 * done.tensors  # every weight and its scale, once each


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), "up_proj.weight' .F8_E4M3. is quantized in a"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "has no 8-bit weight beside it"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 9)}),
            r"have shape \[2, 9\], which does not fit",
        ),
        (lambda t: t.update(extra=torch.zeros(2, dtype=torch.int8)), "'extra' .I8. is quantized in a way"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    source = fp8_checkpoint(tmp_path / "in", parts=1)
    tensors = load_file(source / SINGLE)
    change(tensors)
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match=match):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "marlin-24"}, "not one that compressed-tensors reads|stored as marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed with a sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "compressed with a transform_config"),
        ({"config_groups": {}}, "does not say in one way"),
        ({"config_groups": {"group_0": "x"}}, "not one that compressed-tensors reads"),
        ({"config_groups": {"group_0": {"targets": ["re:nothing"], "weights": INT4}}}, "does not say in one way"),
    ],
)
def test_other_parts_of_compressed_tensors_are_refused_by_name(tmp_path: Path, change: Any, match: str) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", {**INT4, "group_size": 8}, **change)
    with pytest.raises(CheckpointError, match=match):
        run(source, tmp_path / "out")


def test_a_stated_shape_that_does_not_fit_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", {**INT4, "group_size": 8}, parts=1)
    tensors = load_file(source / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([40, 2**40])
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match="shape that is stored for"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_activation_ordering_is_refused_rather_than_ignored(tmp_path: Path, dtype: torch.dtype) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", {**INT4, "group_size": 8}, parts=1)
    tensors = load_file(source / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(32, dtype=dtype)
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        run(source, tmp_path / "out")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", {**INT4, "group_size": 8})
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(UsageError, match=r"pip install 'memscrub\[quantized\]'"):
        run(source, tmp_path / "out")


def test_a_plain_checkpoint_and_an_existing_output_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is not quantized; use it as it is"):
        run(tmp_path / "plain", tmp_path / "out")
    source = fp8_checkpoint(tmp_path / "in")
    with pytest.raises(OutputError, match="exists already"):
        run(source, tmp_path / "plain")
    with pytest.raises(OutputError, match="overlaps the input"):
        run(source, source / "out")


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        *(("bitsandbytes", "bitsandbytes"), ("gptq", "GPTQ"), ("awq", "AWQ"), ("hqq", "HQQ"), ("eetq", "EETQ")),
        *(("torchao", "torchao"), ("gguf", "GGUF"), ("somethingnew", "somethingnew"), (7, "an unnamed method")),
    ],
)
def test_methods_that_cannot_be_undone_are_refused_by_name(method: Any, shown: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantized \({shown}\).*fix the original"):
        refuse_quantized({"quantization_config": {"quant_method": method}}, "ckpt")


@pytest.mark.parametrize("method", SUPPORTED)
def test_methods_that_can_be_undone_are_refused_with_the_command(method: str) -> None:
    for key in ("quantization_config", "compression_config"):
        with pytest.raises(CheckpointError, match="`memscrub dequantize 'my ckpt' --out NEW`") as caught:
            refuse_quantized({key: {"quant_method": method}}, "'my ckpt'")
        assert caught.value.exit_code is ExitCode.USAGE


def test_dequantizing_refuses_other_methods_by_name_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quantized \(GPTQ\).*fix the original"):
        run(fp8_checkpoint(tmp_path / "in", quant_method="gptq"), tmp_path / "out")


def test_a_method_in_colours_does_not_reach_the_terminal() -> None:
    with pytest.raises(CheckpointError, match="an unnamed method"):
        refuse_quantized({"quantization_config": {"quant_method": "\x1b[31mred"}}, "ckpt")


def test_narrow_weights_without_a_quantization_config_are_not_taken_for_weights(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in")
    config = json.loads((source / CONFIG).read_text())
    del config["quantization_config"]
    (source / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"stored as F8_E4M3, but config\.json names no"):
        open_checkpoint(source)


def reheaded(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the only shard."""
    data = (source / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    (source / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def test_a_config_that_is_no_utf8_once_unescaped_is_carried_over(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in")
    config = json.loads((source / CONFIG).read_text()) | {"note": "half a pair: \ud800"}
    (source / CONFIG).write_text(json.dumps(config))
    done = dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")
    del config["quantization_config"]
    assert json.loads((done.directory / CONFIG).read_text()) == config


def test_the_config_states_the_dtype_that_was_written(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in")
    config = json.loads((source / CONFIG).read_text()) | {"dtype": "float8_e4m3fn"}
    (source / CONFIG).write_text(json.dumps(config))
    done = dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")
    assert json.loads((done.directory / CONFIG).read_text())["dtype"] == "bfloat16" == done.dtype


def test_a_header_that_only_the_library_refuses_is_one_sentence(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in", parts=1)
    reheaded(source, lambda header: header["__metadata__"].update(x="\ud800"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_no_floats_are_not_taken_for_factors(tmp_path: Path) -> None:
    source = fp8_checkpoint(tmp_path / "in", parts=1)

    def change(header: dict[str, Any]) -> None:
        next(entry for name, entry in header.items() if name.endswith("_scale_inv"))["dtype"] = "I32"

    reheaded(source, change)
    with pytest.raises(CheckpointError, match="is stored as I32"):
        dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")


CHANNEL = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"FOO": ["Linear"]}, "is not one that compressed-tensors reads"),
        ({"g": {"targets": ["re:("], "weights": CHANNEL}}, "by a pattern that memscrub does not read"),
        ({"g": {"targets": ["re:(a+)+$"], "weights": CHANNEL}}, "by a pattern that memscrub does not read"),
        ({"g": {"targets": ["re:" + "a?" * 40], "weights": CHANNEL}}, "by a pattern that memscrub does not read"),
    ],
)
def test_groups_that_the_package_chokes_on_are_one_sentence(tmp_path: Path, groups: Any, words: str) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", CHANNEL, config_groups=groups)
    with pytest.raises(CheckpointError, match=words):
        dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")


def test_modules_named_by_a_pattern_are_read(tmp_path: Path) -> None:
    groups = {"g": {"targets": [r"re:.*\.(self_attn|mlp)\..*_proj$"], "weights": CHANNEL}}
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", CHANNEL, config_groups=groups)
    assert dequantize(open_checkpoint(source, quantized=True), tmp_path / "out").tensors == 14


def test_a_stated_shape_that_is_no_number_is_refused(tmp_path: Path) -> None:
    source = compressed_checkpoint(tmp_path / "in", "pack-quantized", CHANNEL, parts=1)
    tensors = load_file(source / SINGLE)
    name = next(name for name in tensors if name.endswith("weight_shape"))
    save_file(tensors | {name: torch.tensor([torch.nan, 1.0])}, source / SINGLE)
    with pytest.raises(CheckpointError, match="The shape that is stored"):
        dequantize(open_checkpoint(source, quantized=True), tmp_path / "out")


def test_the_commands_say_what_to_do_and_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = fp8_checkpoint(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "t.txt").write_text("one text\n")
    assert command_line.run(monkeypatch, "diff", source, source) == 2
    advice = capsys.readouterr().err
    assert f"`memscrub dequantize {source} --out NEW`" in advice and advice.count("memscrub:") == 1
    assert command_line.run(monkeypatch, "dequantize", source, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "14 tensors from fp8 to bfloat16, 6 as they were" in shown and "not those of the original" in shown
    assert command_line.run(monkeypatch, "diff", out, out) == 0
    assert command_line.run(monkeypatch, "dequantize", source, "--out", out) == 2
