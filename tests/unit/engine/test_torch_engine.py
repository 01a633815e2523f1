"""The demo model through the engine, against transformers alone."""

import asyncio
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pdserve.domain.errors import LocalFault, Reason
from pdserve.domain.ids import BlockId
from pdserve.domain.prefix import hash_full_blocks
from pdserve.domain.sampling import SamplingParams
from pdserve.domain.tokens import Failed, SampledToken
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.contract import SampleStep, SequenceStep, StepBatch
from pdserve.engine.kv_memory import KvMemory
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_shape import kv_layout
from pdserve.engine.paged_model import load_model
from pdserve.engine.tokenizer import Tokenizer
from pdserve.engine.torch_engine import TorchEngine
from pdserve.models import DEMO_MODEL_DIR

FILES = ModelFiles.open("demo")
NUM_NEW_TOKENS = 20
TOKENIZER = Tokenizer.load(DEMO_MODEL_DIR)
SHARED = (
    "import os\nimport sys\n\n\ndef add(left, right):\n    return left + right\n\n\n"
    "class Point:\n    def __init__(self"
)
PROMPTS = [
    TOKENIZER.encode(SHARED + ", x, y):\n        self.x = x\n"),
    TOKENIZER.encode(SHARED + "):\n        pass\n\nfor"),
    TOKENIZER.encode("import os"),
]
GREEDY = SamplingParams()


def open_demo(block_size: int = 16, **options: Any) -> TorchEngine:
    return TorchEngine.load(FILES, block_size=block_size, num_blocks=96, **options)


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    opened = open_demo()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = load_model(FILES, "float32")
    outputs = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        outputs.append([int(token_id) for token_id in output[0, len(prompt) :]])
    return outputs


def generate(
    engine: TorchEngine,
    pool: BlockPool,
    prompt: tuple[int, ...],
    *,
    chunk: int = 512,
    params: SamplingParams = GREEDY,
    resume: tuple[int, ...] = (),
    company: tuple[SequenceStep, ...] = (),
) -> tuple[list[SampledToken], int]:
    """Tokens after `prompt + resume`, and how many blocks the prefix cache gave."""
    block_size = engine.spec.layout.block_size
    known = [*prompt, *resume]
    names = hash_full_blocks(known[:-1], block_size)
    total = -(-(len(prompt) + NUM_NEW_TOKENS) // block_size)
    table = pool.reserve(total, names)
    assert table is not None
    table.hold(table.num_cached_blocks, total - table.num_cached_blocks)
    computed = table.num_cached_blocks * block_size
    tokens: list[SampledToken] = []
    while len(known) < len(prompt) + NUM_NEW_TOKENS:
        end = min(computed + chunk, len(known))
        sample = SampleStep(params=params, token_index=len(known) - len(prompt))
        step = SequenceStep(
            token_ids=tuple(known[computed:end]),
            start=computed,
            block_table=table.block_ids,
            sample=sample if end == len(known) else None,
        )
        token = engine.compute(StepBatch((*company, step))).sampled[-1]
        computed = end
        if isinstance(token, SampledToken):
            tokens.append(token)
            known.append(token.token_id)
    asyncio.run(table.publish(names))
    num_cached = table.num_cached_blocks
    table.release()
    return tokens, num_cached


def ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize(("block_size", "chunk"), list(itertools.product((8, 16, 32), (16, 512))))
@pytest.mark.parametrize("reuse", [True, False])
def test_greedy_tokens_equal_generate(
    expected: list[list[int]], block_size: int, chunk: int, reuse: bool
) -> None:
    engine = open_demo(block_size)
    pool = BlockPool(96, reuse_prefixes=reuse)
    outputs = [generate(engine, pool, prompt, chunk=chunk) for prompt in (*PROMPTS, *PROMPTS)]
    engine.close()
    assert [ids(tokens) for tokens, _ in outputs] == expected + expected
    assert (outputs[1][1] > 0, outputs[3][1] > 0) == (reuse, reuse)
    assert pool.usage().is_idle


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_close(expected: list[list[int]], dtype: str) -> None:
    engine = open_demo(dtype=dtype)
    tokens, _ = generate(engine, BlockPool(96), PROMPTS[0])
    engine.close()
    assert ids(tokens)[:3] == expected[0][:3]
    assert engine.spec.layout.item_bytes == 2


def test_torch_and_numba_attention_agree(expected: list[list[int]]) -> None:
    engine = open_demo(attention="torch")
    tokens, _ = generate(engine, BlockPool(96), PROMPTS[0])
    engine.close()
    assert ids(tokens) == expected[0]


def company_of(engine: TorchEngine, seed: int) -> tuple[SequenceStep, ...]:
    """Other requests' steps of many shapes, in blocks past those of the pool under test."""
    chooser = Random(seed)
    steps = []
    for index in range(chooser.randrange(1, 6)):
        length = chooser.choice((1, 1, 7, 30))
        table = tuple(BlockId(48 + 4 * index + place) for place in range(4))
        sample = SampleStep(params=SamplingParams(temperature=1, seed=index), token_index=3)
        token_ids = tuple(chooser.randrange(2, 2000) for _ in range(length))
        steps.append(SequenceStep(token_ids=token_ids, start=0, block_table=table, sample=sample))
    return tuple(steps)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_tokens_do_not_depend_on_the_batch_or_on_resuming(
    engine: TorchEngine, seed: int
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=100, seed=seed)
    alone = ids(generate(engine, BlockPool(48), PROMPTS[0], params=params)[0])
    other = company_of(engine, seed)
    crowded = generate(engine, BlockPool(48), PROMPTS[0], params=params, company=other, chunk=16)
    assert ids(crowded[0]) == alone
    resumed = generate(engine, BlockPool(48), PROMPTS[0], params=params, resume=tuple(alone[:7]))
    assert ids(resumed[0]) == alone[7:]


def test_seeds_differ(engine: TorchEngine) -> None:
    outputs = {
        tuple(
            ids(
                generate(
                    engine,
                    BlockPool(48),
                    PROMPTS[2],
                    params=SamplingParams(temperature=1, seed=seed),
                )[0]
            )
        )
        for seed in range(5)
    }
    assert len(outputs) == 5


def test_logprobs_are_those_of_the_plain_model(engine: TorchEngine) -> None:
    params = SamplingParams(logprobs=5)
    tokens, _ = generate(engine, BlockPool(48), PROMPTS[2], params=params)
    model = load_model(FILES, "float32")
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPTS[2], *ids(tokens)[:-1]]])).logits[0]
    plain = torch.log_softmax(logits[len(PROMPTS[2]) - 1 :].double(), dim=-1)
    for token, row in zip(tokens, plain, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        assert token.top_logprobs[0][0] == token.token_id
        assert [value for _, value in token.top_logprobs] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-4
        )


def test_layout_is_the_one_that_config_json_gives(engine: TorchEngine) -> None:
    assert engine.spec.layout == kv_layout(FILES.config, block_size=16, dtype="float32")


def test_two_engines_have_one_identity(engine: TorchEngine) -> None:
    other = open_demo()
    assert other.spec == engine.spec
    other.close()


async def test_cancelled_step_returns_once_it_is_computed() -> None:
    engine = open_demo()
    step = SequenceStep(
        token_ids=tuple(range(2, 402)),
        start=0,
        block_table=tuple(BlockId(block) for block in range(25)),
    )
    task = asyncio.create_task(engine.step(StepBatch((step,))))
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(engine.kv, KvMemory)
    written = bytes(engine.kv.block(BlockId(24)))
    assert any(written)
    result = await engine.step(
        StepBatch((replace(step, sample=SampleStep(params=GREEDY, token_index=0)),))
    )
    assert result.sampled[0] is not None
    assert bytes(engine.kv.block(BlockId(24))) == written
    engine.close()


def test_empty_batch_is_no_work(engine: TorchEngine) -> None:
    assert engine.compute(StepBatch(())).sampled == ()


def test_missing_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_DIR, model_dir)
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LocalFault, match=r"lacks weights of the model: .*layers\.1\.mlp"):
        TorchEngine.load(model_dir, block_size=16, num_blocks=4)


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_DIR, model_dir)
    config = json.loads((model_dir / "config.json").read_text())
    config["model_type"] = "nobodys"
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(LocalFault, match=r"cannot load .*model type nobodys"):
        TorchEngine.load(model_dir, block_size=16, num_blocks=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be cpu, cuda or cuda:N; got tpu"),
        ({"attention": "flash"}, "attention must be auto, numba or torch; got flash"),
    ],
)
def test_setting_that_cannot_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalFault, match=message):
        open_demo(**options)


@pytest.mark.parametrize("attention", ["numba", "torch"])
def test_prompt_of_bad_numbers_harms_neither_neighbours_nor_the_prefix_cache(
    expected: list[list[int]], attention: str
) -> None:
    """A prompt whose embedding is NaN shares a step, and its first block, with a good one.

    Free blocks are full of NaN. Attention of torch carries NaN back to the positions before it in
    the same chunk, so that even the KV of the shared beginning is spoiled.
    """
    engine = open_demo(attention=attention)
    pool = BlockPool(96, are_sound=engine.kv.are_sound)
    assert isinstance(engine.kv, KvMemory)
    engine.kv.bytes[:] = b"\xff" * engine.kv.num_bytes
    bad_id = 7
    assert bad_id not in PROMPTS[0]
    with torch.no_grad():
        engine._model._model.get_input_embeddings().weight[bad_id] = torch.nan
    bad = (*PROMPTS[0][:16], bad_id, *PROMPTS[0][17:20])
    sample = SampleStep(params=GREEDY, token_index=0)
    for company in ((), generate_step(PROMPTS[0])):
        table = pool.reserve(2, hash_full_blocks(bad, 16))
        assert table is not None
        first = table.num_cached_blocks
        table.hold(first, 2 - first)
        step = SequenceStep(
            token_ids=bad[16 * first :],
            start=16 * first,
            block_table=table.block_ids,
            sample=sample,
        )
        drawn = engine.compute(StepBatch((step, *company))).sampled
        assert isinstance(drawn[0], Failed)
        assert drawn[0].reason is Reason.UNUSABLE_LOGITS
        assert [isinstance(token, SampledToken) for token in drawn[1:]] == [True] * len(company)
        asyncio.run(table.publish(hash_full_blocks(bad, 16)))
        table.release()
    tokens, _ = generate(engine, pool, PROMPTS[0])
    engine.close()
    assert ids(tokens) == expected[0]


def generate_step(prompt: tuple[int, ...]) -> tuple[SequenceStep, ...]:
    """The whole prompt in one step, in blocks past those that a small pool hands out first."""
    table = tuple(BlockId(64 + place) for place in range(-(-len(prompt) // 16)))
    sample = SampleStep(params=GREEDY, token_index=0)
    return (SequenceStep(token_ids=prompt, start=0, block_table=table, sample=sample),)


async def test_layers_that_are_told_of_have_their_final_kv(engine: TorchEngine) -> None:
    """Of two prompts in one step, of which one goes on from an earlier chunk."""
    layout, num_layers = engine.spec.layout, len(engine.spec.layout.layers)
    kv = engine.kv
    assert isinstance(kv, KvMemory)
    tables = [tuple(map(BlockId, range(first, first + 8))) for first in (0, 8)]
    first, *_ = PROMPTS
    chunk = SequenceStep(token_ids=first[:9], start=0, block_table=tables[0])
    await engine.step(StepBatch((chunk,)))
    sequences = (
        SequenceStep(token_ids=first[9:], start=9, block_table=tables[0]),
        SequenceStep(token_ids=first, start=0, block_table=tables[1]),
    )
    used = [block for table in tables for block in table[: layout.num_blocks_for(len(first))]]
    ends = [layout.layer_offset_bytes(layer) for layer in range(num_layers + 1)]
    told: list[tuple[int, list[bytes]]] = []

    def on_layers(count: int) -> None:
        told.append((count, [bytes(kv.block(block)[: ends[count]]) for block in used]))

    await engine.step(StepBatch(sequences, on_layers))
    assert [count for count, _ in told] == list(range(1, num_layers + 1))
    for count, seen in told:
        assert seen == [bytes(kv.block(block)[: ends[count]]) for block in used], count
