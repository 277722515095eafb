"""``save_pretrained`` of wrapped and of pruned models: plain loading loads the same model, or nothing is written."""

import copy
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import load_model, prune, save_model, summary, unwrap, wrap
from taulearn.wrapping import anneal_to_one, wrapping_of
from wrapping.hosts import BY_NAME, VOCABULARY, Block, evaluated, gpt2, tokens, transformers

hub = pytest.importorskip("huggingface_hub")


class Hub(nn.Module, hub.PyTorchModelHubMixin):
    """A model of huggingface_hub's mixin, of a number of blocks that its configuration keeps."""

    def __init__(self, number: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Own(nn.Module):
    """A model with its own way of saving, which keeps the number of its blocks or does not."""

    def __init__(self, number: int = 4, *, counts: bool = True) -> None:
        super().__init__()
        self.counts = counts
        self.blocks = nn.Sequential(*(Block(4) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found

    def save_pretrained(self, path: Path, *, push_to_hub: bool = False) -> str:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        number = len(self.blocks) if self.counts else 4
        (folder / "config.json").write_text(json.dumps({"number": number}))
        torch.save({k: v.half() if self.lossy else v for k, v in self.state_dict().items()}, folder / "weights.pt")
        if push_to_hub:
            self.pushed.append(str(folder))
        return "saved"

    lossy = False
    pushed: list[str] = []  # noqa: RUF012  of the class

    @classmethod
    def from_pretrained(cls, path: str) -> "Own":
        found = cls(json.loads((Path(path) / "config.json").read_text())["number"])
        found.load_state_dict(torch.load(Path(path) / "weights.pt", weights_only=True), strict=False)
        return found


class Lossy(Own):
    lossy = True


class NumberedBlock(Block):
    """A block that adds more the higher its number is, which shows in none of its attributes."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__(width)
        self.factor: Callable[[Tensor], Tensor] = lambda x: x * (1 + number)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor(self.inner(self.norm(x)))


class Numbered(Own):
    def __init__(self, number: int = 4) -> None:
        super().__init__(number)
        self.blocks = nn.Sequential(*(NumberedBlock(4, l) for l in range(number)))


class Unloadable(Own):
    from_pretrained = None  # type: ignore[assignment]


def diffusion() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=4,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )


def diffusion_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }


def features() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


def wrapped(make: Callable[[], Any], inputs: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return wrap(make().eval(), example_inputs=inputs, **options)


OTHERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "hub": (Hub, features()),
    "diffusers": (diffusion, diffusion_inputs()),
    "own": (lambda: Own(counts=False), features()),
    "without loading": (Unloadable, features()),
}
every_other = pytest.mark.parametrize("name", OTHERS)


@every_other
def test_steps_other_than_one_are_refused_by_every_class_that_saves_so(name: str, tmp_path: Path) -> None:
    make, inputs = OTHERS[name]
    model = wrapped(make, inputs, init=0.5, form="whole")
    with pytest.raises(ValueError, match=r"steps must all be 1 .*load_model"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@every_other
def test_with_all_blocks_the_class_saves_as_it_does(name: str, tmp_path: Path) -> None:
    make, inputs = OTHERS[name]
    model = wrapped(make, inputs)
    model.save_pretrained(tmp_path / "model")
    assert "time_steps" in dict(model.named_children())
    kind: Any = Own if name == "without loading" else type(model)
    loaded = kind.from_pretrained(str(tmp_path / "model"))
    assert loaded.state_dict().keys() == {k for k in model.state_dict() if not k.startswith("time_steps.")}


@every_other
def test_without_a_block_what_loads_as_another_model_is_not_written(name: str, tmp_path: Path) -> None:
    make, inputs = OTHERS[name]
    model = wrapped(make, inputs)
    prune(model, keep=[0, 1, 3])
    for each in (model, unwrap(copy.deepcopy(model))):
        with pytest.raises(ValueError, match=r"save_pretrained, got .*load_model"):
            each.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_the_class_keeps_of_a_deletion_is_loaded_and_found_equal(tmp_path: Path) -> None:
    model = wrapped(Own, features())
    prune(model, keep=[0, 3])
    expected = model(features())
    for each in (model, unwrap(model)):
        assert each.save_pretrained(tmp_path / "a" / "model") == "saved"
        assert torch.equal(Own.from_pretrained(str(tmp_path / "a" / "model")).eval()(features()), expected)
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_values_that_are_not_those_that_were_saved_are_noticed(tmp_path: Path) -> None:
    model = wrapped(Lossy, features())
    prune(model, keep=[0, 3])
    with pytest.raises(ValueError, match="has other values when loaded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_outputs_are_compared_where_layer_numbers_enter_the_arithmetic(tmp_path: Path) -> None:
    model = wrapped(Numbered, features())
    prune(model, keep=[0, 3])
    with pytest.raises(ValueError, match="other outputs on the example inputs"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = wrapped(Numbered, features())
    prune(model, keep=[0, 1])  # numbers of what is left are as they were
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(Numbered.from_pretrained(str(tmp_path / "model")).eval()(features()), model(features()))


def test_nothing_is_pushed_before_the_model_was_loaded(tmp_path: Path) -> None:
    Own.pushed.clear()
    model = wrapped(lambda: Own(counts=False), features())
    prune(model, keep=[0, 3])
    with pytest.raises(ValueError, match="for save_pretrained"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert Own.pushed == []
    model.counts = True
    model.save_pretrained(path=tmp_path / "model", push_to_hub=True)
    assert Own.pushed == [str(tmp_path / "model")]


def test_a_folder_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = wrapped(lambda: Own(counts=False), features())
    prune(model, keep=[0, 3])
    with pytest.raises(ValueError, match="for save_pretrained"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    model.counts = True
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt", "weights.pt"]


def peft_model(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    return wrap(peft.get_peft_model(gpt2(), lora), example_inputs={"input_ids": tokens()}, **options).eval()


@pytest.mark.parametrize("init", [1.0, [1.0, 0.8, 1.0, 1.1]], ids=["deleted", "steps"])
def test_adapters_alone_are_written_for_models_with_all_blocks_only(init: Any, tmp_path: Path) -> None:
    model = peft_model(init=init)
    if init == 1.0:
        assert set(summary(model).not_saved) == {0, 1, 2, 3}
        prune(model, keep=[0, 2, 3])
    with pytest.raises(ValueError, match="save_pretrained"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    anneal_to_one(model, 1.0)
    merged = unwrap(model).merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(evaluated(loaded, tokens()), evaluated(merged, tokens()))


def test_adapters_of_a_model_with_all_blocks_are_saved_as_ever(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    torch.manual_seed(0)
    again = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.equal(evaluated(again, tokens()), evaluated(model, tokens()))


def unlike() -> Any:
    """A pruned model that its configuration does not describe, on its way out."""
    model = wrap(gpt2(scale_attn_by_inverse_layer_idx=True), example_inputs=tokens()).eval()
    prune(model, keep=[0, 2, 3])
    return model


@pytest.mark.parametrize("discard", [False, True])
def test_unwrapping_leaves_the_guard_on_what_only_it_can_save(discard: bool, tmp_path: Path) -> None:
    model = unlike()
    if discard:
        with torch.no_grad():
            model.time_steps.values.fill_(0.9)
    plain = unwrap(model, discard_steps=discard)
    stored = io.BytesIO()
    torch.save(plain, stored)
    stored.seek(0)
    copies = [plain, copy.deepcopy(plain), torch.load(stored, weights_only=False), plain.transformer]
    for each in copies:
        with pytest.raises(ValueError, match=r"configuration describes .*scaling is .*load_model"):
            each.save_pretrained(tmp_path, state_dict=each.state_dict())
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_pruned_before_it_was_wrapped_again_is_guarded(tmp_path: Path) -> None:
    model = wrap(unwrap(unlike()), example_inputs=tokens())
    with pytest.raises(ValueError, match="configuration describes"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration describes"):
        unwrap(model).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_what_its_configuration_describes_needs_no_guard_any_more(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name].wrapped()
    prune(model, keep=[0, 1, 3])
    plain = unwrap(model)
    assert "save_pretrained" not in vars(plain)
    plain.save_pretrained(tmp_path)
    inputs = BY_NAME[name].inputs()
    assert torch.equal(evaluated(type(plain).from_pretrained(tmp_path), inputs), evaluated(plain, inputs))


def test_a_model_with_all_blocks_is_as_before_when_it_is_unwrapped() -> None:
    model = unwrap(wrapped(Hub, features()))
    assert "save_pretrained" not in vars(model)
    own = Own()
    own.save_pretrained = lambda path: "mine"  # type: ignore[method-assign, assignment]
    model = wrap(own, example_inputs=features())
    assert model.save_pretrained("anywhere") == "mine"
    assert unwrap(model).save_pretrained("anywhere") == "mine"


def test_a_loaded_model_that_lost_blocks_is_guarded(tmp_path: Path) -> None:
    model = wrapped(Hub, features())
    prune(model, keep=[0, 3])
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours", Hub())
    with pytest.raises(ValueError, match="for save_pretrained"):
        loaded.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_averaged_weights_may_be_saved_in_place_of_the_models(tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].wrapped()
    prune(model, keep=[0, 1, 3])
    averaged = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    assert "time_steps.values" in averaged
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.state_dict()["transformer.ln_f.weight"], averaged["transformer.ln_f.weight"])


@pytest.mark.parametrize("keep", [range(4), [0, 1, 3]])
def test_steps_of_averaged_weights_fold_into_them(keep: Sequence[int], tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].wrapped(init=0.9)
    prune(model, keep=keep)
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        averaged.time_steps.values.copy_(torch.linspace(0.2, 1.0, len(keep)))
        averaged.transformer.h[0].mlp.c_proj.weight.mul_(3.0)
    before, state = model.time_steps.values, averaged.state_dict()
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(loaded, tokens()), evaluated(averaged, tokens()))
    assert model.time_steps.values is before
    assert before.tolist() == pytest.approx([0.9] * len(keep))
    state["time_steps.values"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"time_steps.values in state_dict must be of shape .* got \(7,\)"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert model.time_steps.values is before


def test_steps_of_averaged_weights_must_be_one_where_they_do_not_fold(tmp_path: Path) -> None:
    model = BY_NAME["bert"].wrapped(form="whole")
    state = model.state_dict() | {"time_steps.values": torch.tensor([1.0, 1.0, 0.5, 1.0])}
    with pytest.raises(ValueError, match=r"must all be 1 for save_pretrained, got \[1.0, 1.0, 0.5, 1.0\]"):
        model.save_pretrained(tmp_path, state_dict=state)
    with torch.no_grad():
        model.time_steps.values.fill_(0.5)
    model.save_pretrained(tmp_path, state_dict=state | {"time_steps.values": torch.ones(4)})
    plain = BY_NAME["bert"].make()
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(evaluated(loaded, tokens()), evaluated(plain, tokens()))


def test_lower_precision_is_saved_as_it_is(tmp_path: Path) -> None:
    model = wrap(gpt2().to(torch.bfloat16), example_inputs=tokens())
    prune(model, keep=[0, 1, 3])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(evaluated(loaded, tokens()), evaluated(model, tokens()))


def test_saving_leaves_the_model_and_the_generators_as_they_were(tmp_path: Path) -> None:
    model = BY_NAME["bert"].wrapped().train()
    prune(model, keep=[0, 1, 3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_example_inputs_are_no_part_of_the_model() -> None:
    model = BY_NAME["gpt2"].wrapped()
    wrapping = wrapping_of(model)
    assert wrapping is not None
    twin = wrapping_of(copy.deepcopy(model))
    assert twin is not None
    assert twin.inputs.value is wrapping.inputs.value is not None
    assert not [name for name in model.state_dict() if "inputs" in name]
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = wrapping_of(torch.load(stored, weights_only=False))
    assert again is not None
    assert again.inputs.value is None


def test_the_summary_says_beforehand_which_blocks_cannot_go() -> None:
    found = summary(wrap(gpt2(scale_attn_by_inverse_layer_idx=True), example_inputs=tokens()))
    assert set(found.not_saved) == {0, 1, 2}
    assert found.must_stay == {}
    assert "not saved" in str(found)
    assert "without layer 0, save_pretrained is refused: transformer.h.0.attn.scaling" in str(found)
    model = wrapped(Hub, features())
    assert set(summary(model).not_saved) == {0, 1, 2, 3}
    prune(model, keep=[0, 2])
    assert set(summary(model).not_saved) == {0, 2}
    assert summary(wrapped(Own, features())).not_saved == {}  # how it builds a model is not known
    assert "save_pretrained" not in str(summary(BY_NAME["gpt2"].wrapped()))
    assert "save_pretrained" not in str(summary(BY_NAME["sequential"].wrapped()))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def test_layer_numbers_in_the_settings_of_generation_follow(tmp_path: Path) -> None:
    inputs = {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": tokens()[:1]}
    model = whisper()
    model.generation_config.alignment_heads = [[0, 1], [1, 0], [2, 1]]
    before = model.generation_config
    wrap(model, example_inputs=inputs)
    prune(model, keep=[1, 2, 3, 5])  # the first of the encoder, the second of the decoder
    assert model.generation_config.alignment_heads == [[0, 1], [1, 1]]
    assert before.alignment_heads == [[0, 1], [1, 0], [2, 1]]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["alignment_heads"] == [[0, 1], [1, 1]]
