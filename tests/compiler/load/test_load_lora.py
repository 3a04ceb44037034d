"""LoRAs of every common format change the weights as diffusers changes them, or are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from small_pipelines import TEXT_WIDTH, run_text_encoder, run_unet
from torch import Tensor, nn

from sdc.compiler.load import LoraSource, load_checkpoint, parse_lora
from sdc.engines.errors import InputError

TOLERANCE = 1e-5  # the same sums in another order

UNET_LAYERS = (
    "conv_in",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.1.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.2.attentions.0.proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.resnets.1.time_emb_proj",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
)
TEXT_LAYERS = (
    "encoder.layers.0.self_attn.k_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)


def random_pair(part: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down and up matrices for a layer; an up matrix of a convolution is 1x1."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / 3
    up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) / 3
    return down, up


def kohya_tensors(pipeline: StableDiffusionPipeline, *, seed: int, rank: int = 3) -> dict[str, Tensor]:
    """A LoRA as sd-scripts writes it; ranks differ from layer to layer, alpha is 2.

    Where alphas differ, diffusers 0.42 gives attention layers the most frequent one, so it is no reference then.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for prefix, module, layers in (
        ("lora_unet_", pipeline.unet, UNET_LAYERS),
        ("lora_te_text_model_", pipeline.text_encoder, TEXT_LAYERS),
    ):
        for index, path in enumerate(layers):
            name = prefix + path.replace(".", "_")
            down, up = random_pair(module.get_submodule(path), rank + index % 2, generator)
            alpha = torch.tensor(2.0)
            tensors.update({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha})
    return tensors


def write_peft(pipeline: StableDiffusionPipeline, folder: Path, *, seed: int) -> Path:
    """A LoRA as diffusers' training scripts write it, by peft and diffusers themselves, with their metadata."""
    torch.manual_seed(seed)
    layers, metadata = {}, {}
    for name, targets in (("unet", ["to_q", "to_out.0", "conv1", "net.2"]), ("text_encoder", ["q_proj", "fc2"])):
        module = copy.deepcopy(getattr(pipeline, name))
        config = LoraConfig(
            r=2, lora_alpha=5, target_modules=targets, rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 7}
        )
        module.add_adapter(config)
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        layers[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        metadata[name] = {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": targets,
            "rank_pattern": {"to_q": 3},
            "alpha_pattern": {"to_q": 7},
        }
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=metadata["unet"],
        text_encoder_lora_adapter_metadata=metadata["text_encoder"],
    )
    return folder / "pytorch_lora_weights.safetensors"


def write_old_diffusers(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    """A LoRA as diffusers wrote it before it used peft: attention processors."""
    generator = torch.Generator().manual_seed(8)
    tensors: dict[str, Tensor] = {}
    for path, part in pipeline.unet.named_modules():
        block, mark, projection = path.rpartition(".to_")
        if mark and isinstance(part, nn.Linear):
            name = f"unet.{block}.processor.to_{projection.removesuffix('.0')}_lora"
            tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = random_pair(part, 2, generator)
    attention = "encoder.layers.0.self_attn"
    for now, then in {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.items():
        part = pipeline.text_encoder.get_submodule(f"{attention}.{now}")
        name = f"text_encoder.text_model.{attention}.{then}_lora"
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = random_pair(part, 4, generator)
    save_file(tensors, folder / "old.safetensors")
    return folder / "old.safetensors"


def fused_by_diffusers(pipeline: StableDiffusionPipeline, files: Mapping[Path, float]) -> StableDiffusionPipeline:
    """The pipeline with LoRAs loaded and applied by diffusers."""
    fused = StableDiffusionPipeline(
        **{
            **pipeline.components,
            "unet": copy.deepcopy(pipeline.unet),
            "text_encoder": copy.deepcopy(pipeline.text_encoder),
        },
        requires_safety_checker=False,
    )
    names = [f"lora{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        fused.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    fused.set_adapters(names, list(files.values()))
    fused.fuse_lora(adapter_names=names)
    return fused


def assert_equal_to_diffusers(folder: Path, pipeline: StableDiffusionPipeline, files: Mapping[Path, float]) -> None:
    checkpoint = load_checkpoint(str(folder), loras=[LoraSource(file, scale) for file, scale in files.items()])
    expected = fused_by_diffusers(pipeline, files)
    for run, found, wanted, plain in (
        (run_unet, checkpoint.unet(), expected.unet, pipeline.unet),
        (run_text_encoder, checkpoint.text_encoder(), expected.text_encoder, pipeline.text_encoder),
    ):
        assert (run(wanted) - run(plain)).abs().max() > 1000 * TOLERANCE
        torch.testing.assert_close(run(found), run(wanted), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture
def kohya(pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    save_file(kohya_tensors(pipeline, seed=11), tmp_path / "kohya.safetensors", metadata={"ss_network_dim": "3"})
    return tmp_path / "kohya.safetensors"


def test_kohya_equals_diffusers(folder: Path, pipeline: StableDiffusionPipeline, kohya: Path) -> None:
    assert_equal_to_diffusers(folder, pipeline, {kohya: 0.7})


def test_peft_equals_diffusers(folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    assert_equal_to_diffusers(folder, pipeline, {write_peft(pipeline, tmp_path, seed=12): 1.0})


def test_old_diffusers_equals_diffusers(folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    assert_equal_to_diffusers(folder, pipeline, {write_old_diffusers(pipeline, tmp_path): -0.5})


def test_several_add_up(folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path, kohya: Path) -> None:
    assert_equal_to_diffusers(folder, pipeline, {kohya: 0.3, write_peft(pipeline, tmp_path, seed=13): 0.9})


def test_half_precision_files_are_folded_in_float32(folder: Path, kohya: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(kohya).items()}
    save_file(half, kohya)
    weights = load_checkpoint(str(folder)).unet().state_dict()
    folded = load_checkpoint(str(folder), loras=[LoraSource(kohya, 0.5)]).unet().state_dict()
    name = "lora_unet_down_blocks_0_resnets_1_conv1"
    up, down = half[f"{name}.lora_up.weight"].float(), half[f"{name}.lora_down.weight"].float()
    update = torch.einsum("or,rihw->oihw", up.flatten(1), down) * 0.5 * float(half[f"{name}.alpha"]) / len(down)
    path = "down_blocks.0.resnets.1.conv1.weight"
    torch.testing.assert_close(folded[path], weights[path] + update, atol=1e-6, rtol=1e-6)
    unchanged = "down_blocks.0.resnets.1.conv2.weight"
    assert torch.equal(folded[unchanged], weights[unchanged])


def test_decomposed_convolution_equals_its_three_convolutions(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(14)
    down = torch.randn(3, 12, 1, 1, generator=generator)
    mid = torch.randn(3, 3, 3, 3, generator=generator)
    up = torch.randn(12, 3, 1, 1, generator=generator)
    name = "lora_unet_down_blocks_0_resnets_0_conv2"
    tensors = {f"{name}.lora_{role}.weight": value for role, value in (("down", down), ("mid", mid), ("up", up))}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "locon.safetensors")
    plain = load_checkpoint(str(folder)).unet().down_blocks[0].resnets[0].conv2
    lora = LoraSource(tmp_path / "locon.safetensors")
    folded = load_checkpoint(str(folder), loras=[lora]).unet().down_blocks[0].resnets[0].conv2
    x = torch.randn(2, 12, 5, 7, generator=generator)
    functional = nn.functional.conv2d
    expected = plain(x) + functional(functional(functional(x, down), mid, padding=1), up) * 2 / 3
    torch.testing.assert_close(folded(x), expected, atol=1e-4, rtol=1e-5)


def test_peft_folder_takes_alpha_from_the_file_beside_it(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(15)
    down, up = torch.randn(2, 48, generator=generator), torch.randn(48, 2, generator=generator)
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": True}))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    plain = load_checkpoint(str(folder)).unet().state_dict()[path]
    lora = LoraSource(tmp_path / "adapter_model.safetensors")
    folded = load_checkpoint(str(folder), loras=[lora]).unet().state_dict()[path]
    torch.testing.assert_close(folded, plain + up @ down * 6 / 2**0.5, atol=1e-5, rtol=1e-5)


def test_digest_follows_file_and_scale_where_the_lora_changes_something(
    folder: Path, pipeline: StableDiffusionPipeline, kohya: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(kohya_tensors(pipeline, seed=99), other)
    choices: list[list[LoraSource]] = [[], [LoraSource(kohya)], [LoraSource(kohya, 0.5)], [LoraSource(other)]]
    checkpoints = [load_checkpoint(str(folder), loras=loras) for loras in choices]
    assert len({checkpoint.digest("unet") for checkpoint in checkpoints}) == len(choices)
    assert len({checkpoint.digest("text_encoder") for checkpoint in checkpoints}) == len(choices)
    assert len({checkpoint.digest("vae_encoder") for checkpoint in checkpoints}) == 1


def refused(folder: Path, tmp_path: Path, tensors: Mapping[str, Tensor]) -> Callable[[str], None]:
    save_file(dict(tensors), tmp_path / "bad.safetensors")

    def expect(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_checkpoint(str(folder), loras=[LoraSource(tmp_path / "bad.safetensors")])

    return expect


def test_another_width_is_refused_by_its_first_layer(
    folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    tensors = kohya_tensors(pipeline, seed=1)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors[f"{name}.lora_down.weight"] = torch.zeros(3, TEXT_WIDTH + 1)
    refused(folder, tmp_path, tensors)(rf"{name} changes a weight of \[48, 25\], the checkpoint's is \[48, 24\]")


def test_layers_that_are_left_over_are_named(folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    tensors = kohya_tensors(pipeline, seed=1)
    tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 5)
    tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.zeros(7, 2)
    refused(folder, tmp_path, tensors)("1 of its 15 layers .* first lora_te2_text_model_.*Stable Diffusion XL")


def test_a_file_of_which_nothing_fits_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 5)}
    tensors["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.zeros(7, 2)
    refused(folder, tmp_path, tensors)("1 of its 1 layers .*Flux")


@pytest.mark.parametrize(
    ("ending", "method"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("diff", "full weight")]
)
def test_other_methods_are_refused_by_name(folder: Path, tmp_path: Path, ending: str, method: str) -> None:
    refused(folder, tmp_path, {f"lora_unet_conv_in.{ending}": torch.zeros(2, 5)})(method)


def test_a_layer_without_its_other_half_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path, {"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 5)})("no up matrix")


def test_a_checkpoint_is_no_lora(folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path, {"conv_in.weight": torch.zeros(2, 5)})("conv_in.weight is neither")


def test_the_same_layer_twice_is_refused(folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    tensors = kohya_tensors(pipeline, seed=1)
    for role in ("lora_down", "lora_up"):
        tensors[f"unet.conv_in.{role}.weight"] = tensors[f"lora_unet_conv_in.{role}.weight"].clone()
    refused(folder, tmp_path, tensors)(r"unet\.conv_in twice")


def test_pickles_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "style.pt")
    for file, message in (("style.pt", "convert it to safetensors"), ("none.safetensors", "not found")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(str(folder), loras=[LoraSource(tmp_path / file)])


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("dir/a.safetensors:0.8", "dir/a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2.0),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", 1.0),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
    ],
)
def test_parse_lora(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == LoraSource(Path(path), scale)


def test_the_lora_that_ships_has_a_short_name() -> None:
    lora = parse_lora("tiny-lcm:0.5")
    assert lora.path.is_file()
    assert lora.scale == 0.5
    plain = load_checkpoint("tiny").unet().state_dict()
    folded = load_checkpoint("tiny", loras=[lora]).unet().state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], folded[name])}
    assert "mid_block.resnets.0.conv1.weight" in changed
    assert not changed & {"conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"}


@pytest.mark.parametrize("text", ["", ":1", "a.safetensors:", "a.safetensors:strong", "a.safetensors:nan", "a:inf"])
def test_parse_lora_refuses(text: str) -> None:
    with pytest.raises(InputError, match=r"FILE\[:SCALE\]"):
        parse_lora(text)
