"""The built-in engine against the plain Hugging Face model it serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from actors.config import RolloutConfig, SamplingConfig
from actors.engine import packed_weights as packed
from actors.engine.protocol import Completion, Request
from actors.engine.slots import EXTENTS, SHORTEST, attend
from actors.engine.stop_strings import StopStrings
from actors.engine.torch_engine import TorchEngine
from bfloat16 import NOT_EMULATED

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "gpt2": tiny_models.save_gpt2,
    "llama": tiny_models.save_llama,
    "qwen2": tiny_models.save_qwen2,
}
CONTEXT = 96
LENGTHS = (1, 3, 16, 17, 40, 5, 7, 2, 33, 20, 11, 60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in FAMILIES.items()}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, TorchEngine]:
    return {name: engine(folder) for name, folder in folders.items()}


@pytest.fixture
def gpt2(engines: dict[str, TorchEngine]) -> TorchEngine:
    return engines["gpt2"]


def engine(folder: Path, dtype: Any = "float32", slots: int = 8) -> TorchEngine:
    return TorchEngine(str(folder), RolloutConfig(slots=slots, dtype=dtype), torch.device("cpu"))


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def requests(lengths: Sequence[int] = LENGTHS, group_size: int = 1) -> list[Request]:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 256, size=n).astype(np.int32) for n in lengths]
    return [
        Request(sample_id=g * group_size + k, group_id=g, prompt=prompts[g])
        for g in range(len(prompts))
        for k in range(group_size)
    ]


def assert_same(left: Completion, right: Completion) -> None:
    """To the bit."""
    assert (left.sample_id, left.finish) == (right.sample_id, right.finish)
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_array_equal(left.logprobs, right.logprobs)


def teacher_forced(model: Any, request: Request, completion: Completion, temperature: float) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([request.prompt, completion.tokens]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0] / temperature, -1)
    start = len(request.prompt)
    return logprobs[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_token_for_token(
    family: str, folders: dict[str, Path], engines: dict[str, TorchEngine]
) -> None:
    model, sampling = plain(folders[family]), SamplingConfig(max_new_tokens=24, temperature=0)
    for request, completion in zip(requests(), engines[family].generate(requests(), sampling, seed=0), strict=True):
        ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        np.testing.assert_array_equal(completion.tokens, expected[0, len(request.prompt) :].numpy())
        assert completion.finish == ("stop" if completion.tokens[-1] == 256 else "length")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_teacher_forced_pass_of_the_plain_model(
    family: str, temperature: float, folders: dict[str, Path], engines: dict[str, TorchEngine]
) -> None:
    model, asked = plain(folders[family]), requests(group_size=2)
    completions = engines[family].generate(asked, SamplingConfig(max_new_tokens=24, temperature=temperature), seed=3)
    assert [c.sample_id for c in completions] == [r.sample_id for r in asked]
    for request, completion in zip(asked, completions, strict=True):
        np.testing.assert_allclose(
            completion.logprobs, teacher_forced(model, request, completion, temperature), atol=1e-5, rtol=0
        )
    assert len({int(c.tokens[0]) for c in completions}) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_float32_layers_change_neither_logprobs_nor_independence(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 0)
    one, model, asked, sampling = (
        engine(folders[family]),
        plain(folders[family]),
        requests(),
        SamplingConfig(max_new_tokens=20),
    )
    completions = one.generate(asked, sampling, seed=3)
    for request, completion in zip(asked, completions, strict=True):
        np.testing.assert_allclose(
            completion.logprobs, teacher_forced(model, request, completion, 1.0), atol=1e-5, rtol=0
        )
    for left, right in zip(completions[::-3], one.generate(asked[::-3], sampling, seed=3), strict=True):
        assert_same(left, right)


def test_three_times_as_many_requests_as_slots_refill_as_rows_end(gpt2: TorchEngine) -> None:
    asked = requests(LENGTHS * 2)
    completions = gpt2.generate(asked, SamplingConfig(max_new_tokens=30, stop=("e", "t", "a", "\n")), seed=0)
    assert len({len(c.tokens) for c in completions}) > 4, "rows must end at different times for a refill to be tested"
    for request, completion in zip(asked, completions, strict=True):
        [alone] = gpt2.generate([request], SamplingConfig(max_new_tokens=30, stop=("e", "t", "a", "\n")), seed=0)
        assert_same(completion, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_bits_do_not_depend_on_its_neighbours(family: str, dtype: str, folders: dict[str, Path]) -> None:
    one, asked, sampling = engine(folders[family], dtype), requests(), SamplingConfig(max_new_tokens=20)
    everything = {c.sample_id: c for c in one.generate(asked, sampling, seed=5)}
    order = np.random.default_rng(1).permutation(len(asked))
    for subset in ([asked[i] for i in order], asked[::-2], asked[4:5], asked[7:8]):
        for completion in one.generate(subset, sampling, seed=5):
            assert_same(completion, everything[completion.sample_id])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NOT_EMULATED)], ids=str)
@pytest.mark.parametrize(("heads", "grouped", "width"), [(12, 1, 64), (2, 7, 64), (4, 8, 128), (4, 7, 128)])
def test_attention_of_a_short_row_is_the_same_to_the_bit_in_every_extent(
    heads: int, grouped: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query, short = (
        torch.randn(64, heads * grouped, 1, width, dtype=dtype),
        torch.randn(2, 64, heads, 50, width, dtype=dtype),
    )
    outputs = []
    for extent in range(SHORTEST, 513, EXTENTS):
        keys, values = torch.nn.functional.pad(short, (0, 0, 0, extent - 50))
        mask = torch.full((64, 1, 1, extent), torch.finfo(dtype).min, dtype=dtype)
        mask[..., :50] = 0
        outputs.append(attend(torch.nn.Identity(), query, keys, values, mask)[0])
    differing = [SHORTEST + i * EXTENTS for i, output in enumerate(outputs) if not torch.equal(output, outputs[0])]
    assert differing == []


def test_a_call_leaves_nothing_behind(folders: dict[str, Path], gpt2: TorchEngine) -> None:
    sampling = SamplingConfig(max_new_tokens=20)
    fresh = engine(folders["gpt2"]).generate(requests(), sampling, seed=5)
    gpt2.generate(requests((80, 80)), SamplingConfig(max_new_tokens=3), seed=1)
    for left, right in zip(fresh, gpt2.generate(requests(), sampling, seed=5), strict=True):
        assert_same(left, right)


def test_samples_of_a_group_share_one_prefill_and_equal_separate_ones(
    gpt2: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = requests((5, 40, 17), group_size=6)
    apart = [Request(sample_id=r.sample_id, group_id=r.sample_id, prompt=r.prompt) for r in shared]
    prefilled: list[int] = []
    prefill = gpt2.prefill

    def counting(prompts: Sequence[Any]) -> Any:
        prefilled.append(len(prompts))
        return prefill(prompts)

    monkeypatch.setattr(gpt2, "prefill", counting)
    sampling = SamplingConfig(max_new_tokens=12)
    together = gpt2.generate(shared, sampling, seed=2)
    assert sum(prefilled) == 3
    for left, right in zip(together, gpt2.generate(apart, sampling, seed=2), strict=True):
        assert_same(left, right)
    assert sum(prefilled) == 3 + 18
    assert len({tuple(c.tokens) for c in together[:6]}) > 1


def test_a_stop_string_ends_the_completion_and_stays_in_it(gpt2: TorchEngine) -> None:
    free = gpt2.generate(requests(), SamplingConfig(max_new_tokens=24), seed=0)
    text = gpt2.tokenizer.decode(free[0].tokens)
    stop = next(text[i : i + 2] for i in range(4, 20) if "\ufffd" not in text[i : i + 2])
    for before, after in zip(
        free,
        gpt2.generate(requests(), SamplingConfig(max_new_tokens=24, stop=("never to be seen", stop)), seed=0),
        strict=True,
    ):
        whole = gpt2.tokenizer.decode(before.tokens)
        np.testing.assert_array_equal(after.tokens, before.tokens[: len(after.tokens)])
        if stop in whole:
            assert after.finish == "stop"
            assert gpt2.tokenizer.decode(after.tokens) == whole[: whole.index(stop) + len(stop)]
        else:
            assert_same(before, after)


def test_stop_strings_are_found_across_tokens_and_only_at_the_tail(gpt2: TorchEngine) -> None:
    stop = StopStrings(gpt2.tokenizer, ("Ende", "né"))
    completions = [
        np.array(gpt2.tokenizer.encode(text), np.int32) for text in ("Das Ende", "Ende gut, alles gut", "né", "n", "E")
    ]
    assert stop.reached(completions).tolist() == [True, False, True, False, False]


def test_the_end_of_text_token_stops(folders: dict[str, Path]) -> None:
    one, end = engine(folders["llama"]), 256
    with torch.no_grad():
        one.model.lm_head.weight[end] *= 3  # else too rare
    completions = one.generate(requests(group_size=4), SamplingConfig(max_new_tokens=10), seed=0)
    stopped = [c for c in completions if c.finish == "stop"]
    assert 0 < len(stopped) < len(completions)
    assert all(c.tokens[-1] == end and end not in c.tokens[:-1] for c in stopped)
    assert all(len(c.tokens) == 10 and end not in c.tokens for c in completions if c.finish == "length")


def test_a_full_context_ends_the_completion(folders: dict[str, Path], gpt2: TorchEngine) -> None:
    asked = requests((CONTEXT - 1, CONTEXT - 10, 3))
    completions = gpt2.generate(asked, SamplingConfig(max_new_tokens=30), seed=0)
    assert [(len(c.tokens), c.finish) for c in completions] == [(1, "length"), (10, "length"), (30, "length")]
    model = plain(folders["gpt2"])
    for request, completion in zip(asked, completions, strict=True):
        np.testing.assert_allclose(
            completion.logprobs, teacher_forced(model, request, completion, 1.0), atol=1e-5, rtol=0
        )


def test_a_prompt_without_room_for_a_token_is_refused_by_name(gpt2: TorchEngine) -> None:
    with pytest.raises(ValueError, match="context of 96 tokens, got 96 tokens for sample 1"):
        gpt2.generate(requests((3, 96)), SamplingConfig(), seed=0)
    with pytest.raises(ValueError, match="at least one token, got none for sample 0"):
        gpt2.generate(requests((0,)), SamplingConfig(), seed=0)


@pytest.mark.parametrize("ends", [256, [256, 257], [97, 8, 256]], ids=str)
def test_a_reply_ends_where_generate_ends_it(ends: int | list[int], folders: dict[str, Path], tmp_path: Path) -> None:
    """Bytes 8 and 97 come often; 256 is the tokenizer's end of text."""
    folder = Path(shutil.copytree(folders["qwen2"], tmp_path / "model"))
    written = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(written))
    model, one, asked = plain(folder), engine(folder), requests(LENGTHS[:8])
    completions = one.generate(asked, SamplingConfig(max_new_tokens=40, temperature=0), seed=0)
    for request, completion in zip(asked, completions, strict=True):
        ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        np.testing.assert_array_equal(completion.tokens, expected[0, len(request.prompt) :].numpy())
        assert completion.finish == ("stop" if completion.tokens[-1] in one.ends else "length")
    assert {8, 97} & {int(completion.tokens[-1]) for completion in completions} or 8 not in one.ends, (
        "an end that never comes tests nothing"
    )


def save_windowed(folder: Path, family: str, **settings: Any) -> Path:
    """Two layers that see 32 tokens, or one of the two."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=32,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tiny_models.byte_tokenizer().save_pretrained(folder)
    return folder


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_a_sliding_window_is_computed_as_generate_does(family: str, tmp_path: Path) -> None:
    """Prompts shorter than the window, as long, and longer; replies that outgrow it."""
    folder = save_windowed(tmp_path, family, **WINDOWED[family])
    model, one, asked = plain(folder), engine(folder), requests((48, 5, 31, 32, 33, 90))
    for request, completion in zip(
        asked, one.generate(asked, SamplingConfig(max_new_tokens=40, temperature=0), seed=0), strict=True
    ):
        ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        np.testing.assert_array_equal(completion.tokens, expected[0, len(request.prompt) :].numpy())
    sampled = one.generate(asked, SamplingConfig(max_new_tokens=40), seed=1)
    for request, completion in zip(asked, sampled, strict=True):
        np.testing.assert_allclose(
            completion.logprobs, teacher_forced(model, request, completion, 1.0), atol=1e-5, rtol=0
        )
    for alone, together in zip(
        one.generate(asked[:1] + asked[3:4], SamplingConfig(max_new_tokens=40), seed=1),
        (sampled[0], sampled[3]),
        strict=True,
    ):
        assert_same(alone, together)


def test_a_window_that_a_layer_is_silent_about_is_refused(tmp_path: Path) -> None:
    """A Llama's attention says nothing of windows, whatever its config says."""
    folder = tiny_models.save_llama(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"sliding_window": 32,', 1))
    with pytest.raises(
        ValueError,
        match=r"^model\.path: must tell each layer's attention of its sliding window, got .* \(family llama\), which "
        r"has one of 32",
    ):
        engine(folder)


def test_what_attention_would_be_given_and_not_heed_is_refused() -> None:
    query = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"must be of a family with plain attention, got one with softcap"):
        attend(torch.nn.Identity(), query, query, query, None, softcap=50.0)


def test_ids_beyond_the_tokenizer_are_possible_and_decode(tmp_path: Path) -> None:
    padded = engine(tiny_models.save_gpt2(tmp_path, vocabulary=300))
    completions = padded.generate(
        requests(group_size=4), SamplingConfig(max_new_tokens=16, stop=("a stop string",)), seed=0
    )
    beyond = [c for c in completions if (c.tokens >= len(padded.tokenizer)).any()]
    assert beyond, "the test needs such an id to be sampled"
    assert all(isinstance(padded.tokenizer.decode(c.tokens), str) for c in beyond)


def test_loaded_weights_are_the_ones_that_generate(folders: dict[str, Path], tmp_path: Path) -> None:
    other = engine(tiny_models.save_gpt2(tmp_path, seed=9))
    target = engine(folders["gpt2"])
    sampling = SamplingConfig(max_new_tokens=10)
    before = target.generate(requests(), sampling, seed=0)
    target.load_weights(other.model.named_parameters())
    after = target.generate(requests(), sampling, seed=0)
    for left, right in zip(other.generate(requests(), sampling, seed=0), after, strict=True):
        assert_same(left, right)
    assert any(not np.array_equal(left.tokens, right.tokens) for left, right in zip(before, after, strict=True))
    assert target.model.lm_head.weight is target.model.transformer.wte.weight


def test_weights_that_do_not_fit_are_refused_and_change_nothing(folders: dict[str, Path]) -> None:
    target = engine(folders["gpt2"])
    good = {name: torch.zeros_like(p) for name, p in target.model.named_parameters()}
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    for bad, message in (
        ({**good, "zzz": torch.zeros(1)}, "'zzz' is unknown to the model"),
        (
            {name: p for name, p in good.items() if name != "transformer.wte.weight"},
            "'transformer.wte.weight' is missing",
        ),
        (
            {**good, "transformer.ln_f.weight": torch.zeros(5)},
            r"'transformer.ln_f.weight' must have shape \(32,\), got \(5,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_weights(bad.items())
    assert all(torch.equal(p, before[name]) for name, p in target.model.named_parameters())


def test_diverged_weights_are_named_and_leave_the_engine_sound(folders: dict[str, Path]) -> None:
    target = engine(folders["gpt2"])
    good = {name: p.clone() for name, p in target.model.named_parameters()}
    before = target.generate(requests(), SamplingConfig(max_new_tokens=5), seed=0)
    target.load_weights({name: p * torch.nan for name, p in good.items()}.items())
    with pytest.raises(FloatingPointError, match="logits of sample 0 are not finite"):
        target.generate(requests(), SamplingConfig(max_new_tokens=5), seed=0)
    target.load_weights(good.items())
    for left, right in zip(before, target.generate(requests(), SamplingConfig(max_new_tokens=5), seed=0), strict=True):
        assert_same(left, right)


def test_no_requests_no_completions(gpt2: TorchEngine) -> None:
    assert gpt2.generate([], SamplingConfig(), seed=0) == []
