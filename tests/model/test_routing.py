"""Mixture-of-Depths: the block is what it says, its choices are causal, and shares are kept."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import config as type_checks

from fuyu_e2e.data.document import Document
from fuyu_e2e.data.packing import pack_row
from fuyu_e2e.data.sequence import SequenceBuilder
from fuyu_e2e.errors import UserError
from fuyu_e2e.model.attention.interface import reference_attention
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.decoder import Decoder, build_block
from fuyu_e2e.model.rope import rotary
from fuyu_e2e.model.routing.block import RoutedBlock, gather_passing, routed_blocks
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.routing.routers import Threshold, gate
from fuyu_e2e.model.row import Reports, Row, TokenInfo, TokenType, TrainingProgress

RandomDocument = Callable[[int], Document]
MakeDecoder = Callable[..., Decoder]
seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=9)
CAUSAL = [
    {"rule": "threshold", "share": 0.3},
    {"rule": "threshold", "share": 0.3, "skipped": "keys"},
    {"rule": "threshold", "share": 0.2, "text_share": 0.7, "keep_starts": True, "keep_newlines": True},
    {"rule": "image_topk", "share": 0.3},
    {"rule": "fixed", "share": 0.3},
    {"rule": "random", "share": 0.3, "skipped": "keys"},
]
BEGINNING, MIDDLE = TrainingProgress(0, 0.0), TrainingProgress(50, 0.5)


def label(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def row(builder: SequenceBuilder, random_document: RandomDocument, seeds: list[int], padding: int = 0) -> PackedBatch:
    sequences = [builder.build(random_document(seed)) for seed in seeds]
    return pack_row(sequences, sum(map(len, sequences)) + padding)


@torch.no_grad()
def run(decoder: Decoder, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and which tokens passed each routed block."""
    read = decoder.row(batch)
    logits = decoder.logits(batch, read)
    return logits, torch.stack([routed.passed for routed in routed_blocks(read)])


@pytest.mark.parametrize("skipped", ["nothing", "keys"])
@pytest.mark.parametrize("rule", ["threshold", "topk", "image_topk", "fixed", "random"])
@pytest.mark.parametrize("training", [False, True])
def test_a_share_of_one_with_unit_gates_is_the_dense_decoder(
    routed_decoder: MakeDecoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
    rule: str,
    skipped: str,
    training: bool,
) -> None:
    batch = row(builder, random_document, list(range(12)), padding=9)
    routed = routed_decoder(rule=rule, share=1.0, skipped=skipped).train(training)
    for block in routed.blocks:
        if isinstance(block, RoutedBlock):
            for weight in block.rule.parameters():
                weight.data.zero_()  # a score of 0, whose gate is 1
            if rule == "topk":
                block.rule.predictor[2].bias.data.fill_(1.0)
    decoder = Decoder(replace(routed.config, routing=None)).eval()
    missing, unexpected = decoder.load_state_dict(routed.state_dict(), strict=False)
    assert not missing
    assert [weight for weight in unexpected if ".rule." not in weight] == []
    with torch.no_grad():
        expected = decoder.logits(batch)
        logits, passed = run(routed, batch)
    real = sum(batch.document_lengths)
    assert passed[:, :real].all()
    torch.testing.assert_close(logits[:real], expected[:real], atol=1e-5, rtol=1e-6)
    assert (logits[:real] - expected[:real]).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("skipped", ["nothing", "keys"])
@pytest.mark.parametrize("training", [False, True])
def test_a_routed_block_is_its_definition(
    routed_decoder: MakeDecoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
    skipped: str,
    training: bool,
) -> None:
    """Against float64 over the whole row: a mask in place of gathering, one update in place of a scatter."""
    decoder = routed_decoder(share=0.4, skipped=skipped, slack=1.0)
    batch = row(builder, random_document, list(range(10)))
    block = next(block for block in decoder.blocks if isinstance(block, RoutedBlock)).train(training)
    captured: dict[str, Any] = {}
    block.register_forward_hook(lambda _, given, result: captured.update(given=given, result=result))
    decoder.train(training)
    read = decoder.row(batch)
    decoder.logits(batch, read)
    x, row_ = captured["given"]
    y, routed = captured["result"], routed_blocks(read)[0]
    passes = routed.passed
    assert 0.1 < passes.float().mean() < 0.9
    assert not training or block.rule.capacity(row_) >= passes.sum()

    wide = build_block(decoder.config, routed.block).double()
    wide.load_state_dict(block.state_dict())
    x = x.double()
    keys = torch.ones_like(passes) if skipped == "keys" else passes
    norm = wide.attention_norm(x)
    attention = wide.attention
    cos, sin = (turn.double() for turn in rotary(batch.positions, attention.head_size, decoder.config.rope_theta))

    def turned(projected: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        heads = norm(projected.unflatten(-1, (-1, attention.head_size)))
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    q, k = turned(attention.q_proj(norm), attention.q_norm), turned(attention.k_proj(norm), attention.k_norm)
    v = attention.v_proj(norm).unflatten(-1, (-1, attention.head_size))
    attended = reference_attention(q, k, v, batch.document_lengths, keys)
    attended = attention.o_proj(attended.flatten(-2))
    update = attended + wide.mlp(wide.mlp_norm(x + attended))
    expected = torch.where(passes[:, None], x + gate(routed.scores.double())[:, None] * update, x)
    torch.testing.assert_close(y, expected.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(y[~passes], captured["given"][0][~passes]), "a token that skips is not what it was"


@pytest.mark.parametrize("routing", CAUSAL, ids=label)
@given(seeds=seeds, padding=st.integers(0, 40))
@settings(max_examples=settings.default.max_examples // 2)
def test_a_document_alone_and_packed_gives_the_same_logits_and_choices(
    routing: dict,
    seeds: list[int],
    padding: int,
    routed_decoder: MakeDecoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    decoder = routed_decoder(**routing)
    logits, passed = run(decoder, row(builder, random_document, seeds, padding))
    alone = [run(decoder, row(builder, random_document, [seed])) for seed in seeds]
    lonely_logits, lonely_passed = (
        torch.cat(parts, dim=dim) for parts, dim in zip(zip(*alone, strict=True), (0, 1), strict=True)
    )
    assert torch.equal(passed[:, : len(lonely_logits)], lonely_passed)
    assert not passed[:, len(lonely_logits) :].any(), "padding passes a block"
    torch.testing.assert_close(logits[: len(lonely_logits)], lonely_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("routing", CAUSAL, ids=label)
@given(seeds=seeds, data=st.data())
@settings(max_examples=settings.default.max_examples // 2)
def test_a_later_token_changes_nothing_before_it_and_no_other_document(
    routing: dict,
    training: bool,
    seeds: list[int],
    data: st.DataObject,
    routed_decoder: MakeDecoder,
    builder: SequenceBuilder,
    random_document: RandomDocument,
) -> None:
    decoder = routed_decoder(**routing).train(training)
    decoder.progress = MIDDLE
    batch = row(builder, random_document, seeds)
    assume(not training or len(batch.tokens) >= 4)  # of fewer, a share of 0.3 is none, which training refuses
    changed_at = data.draw(st.integers(0, len(batch.tokens) - 1))
    tokens, patches = batch.tokens.clone(), batch.patches.clone()
    tokens[changed_at] = (tokens[changed_at] + 1) % decoder.config.vocab_size
    patches[batch.patch_positions == changed_at] = 255 - patches[batch.patch_positions == changed_at]
    before, passed_before = run(decoder, batch)
    after, passed_after = run(decoder, replace(batch, tokens=tokens, patches=patches))
    start = changed_at
    if routing["rule"] == "image_topk":
        # An image is there as a whole, so its own patches and newlines may change its patches' choices.
        for patches_of_one in batch.patch_positions.split([span.patches for span in batch.images]):
            if patches_of_one[0] <= changed_at <= patches_of_one[-1]:
                start = int(patches_of_one[0])
    assert torch.equal(passed_before[:, :start], passed_after[:, :start])
    # Equal but for rounding: how many tokens pass later on changes the shapes that sums are grouped by.
    torch.testing.assert_close(before[:start], after[:start], atol=1e-5, rtol=1e-5)
    if not training:  # in training, the capacity may run out earlier in the row
        ends = torch.tensor(batch.document_lengths).cumsum(0)
        end = int(ends[torch.searchsorted(ends, changed_at, right=True)])
        assert torch.equal(passed_before[:, end:], passed_after[:, end:])
        torch.testing.assert_close(before[end:], after[end:], atol=1e-5, rtol=1e-5)
    assert (before[changed_at] - after[changed_at]).abs().max() > 1e-4


@given(passes=st.lists(st.booleans(), min_size=1, max_size=60), data=st.data())
def test_what_overflows_is_dropped_by_position(passes: list[bool], data: st.DataObject) -> None:
    flags = torch.tensor(passes)
    capacity = data.draw(st.integers(1, len(passes)))
    passing = gather_passing(flags, capacity)
    assert len(passing.index) == capacity == len(set(passing.index.tolist()))
    taken = passing.index[passing.valid]
    assert taken.tolist() == flags.nonzero()[:, 0].tolist()[:capacity]
    assert not flags[passing.index[~passing.valid]].any()
    assert gather_passing(flags, None).index.tolist() == flags.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("rule", ["threshold", "topk", "image_topk"])
def test_the_router_has_a_gradient(
    routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument, rule: str
) -> None:
    decoder = routed_decoder(rule=rule, share=0.3).train()
    batch = row(builder, random_document, list(range(10)))
    read = decoder.row(batch)
    loss = decoder.loss(batch, read)
    (loss + read.auxiliary).backward()
    weights = [weight for name, weight in decoder.named_parameters() if ".rule." in name]
    assert len(weights) >= 1
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_the_predictor_of_topk_sends_no_gradient_into_the_decoder(
    routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    decoder = routed_decoder(rule="topk", share=0.3).train()
    batch = row(builder, random_document, list(range(10)))
    read = decoder.row(batch)
    decoder.loss(batch, read)
    read.auxiliary.backward()
    touched = [name for name, weight in decoder.named_parameters() if weight.grad is not None]
    assert touched
    assert [name for name in touched if ".predictor." not in name] == []


@pytest.mark.parametrize("routing", [*CAUSAL, {"rule": "topk", "share": 0.3}], ids=label)
def test_shares_are_kept(
    routing: dict, routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    decoder = routed_decoder(**routing).train()
    batch = row(builder, random_document, list(range(100, 200)))
    read = decoder.row(batch)
    decoder.loss(batch, read)
    patches = read.types == TokenType.PATCH
    for routed in routed_blocks(read):
        shares = decoder.config.routing.shares_of(routed.block, decoder.config.layers)
        groups = [(patches, shares.patches), (~patches, shares.others)]
        if shares.patches == shares.others and routing["rule"] != "image_topk":
            groups = [(torch.ones_like(patches), shares.patches)]
        for group, share in groups:
            if routing["rule"] == "image_topk" and group is patches:  # whole patches of small images, at least one
                sizes = [span.patches for span in batch.images]
                share = sum(max(1, int(share * size + 0.5)) for size in sizes) / sum(sizes)
            exact = routing["rule"] in ("topk", "image_topk")
            tolerance = 1e-4 if exact else 0.12
            assert routed.chosen[group].float().mean() == pytest.approx(share, rel=tolerance, abs=2e-3)
        assert torch.equal(routed.chosen, routed.passed), "the capacity ran over at its own share"
    if routing.get("keep_starts"):
        assert all(routed.passed[read.positions == 0].all() for routed in routed_blocks(read))
    if routing.get("keep_newlines"):
        assert all(routed.passed[read.types == TokenType.NEWLINE].all() for routed in routed_blocks(read))


@given(
    share=st.floats(0.02, 0.98),
    means=st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    scale=st.floats(0.2, 1.5),
    seed=st.integers(0, 1_000),
)
def test_a_threshold_realises_its_share(share: float, means: list[float], scale: float, seed: int) -> None:
    """Within 1 % on scores of any mixture of humps, from histograms of 200,000 of them."""
    config = FuyuConfig(
        vocab_size=9, patch_size=1, layers=3, width=4, heads=1, kv_heads=1, head_size=2, feed_forward=4,
        routing=RoutingConfig(share=share, explore=0.0),
    )  # fmt: skip
    rule, generator = Threshold(config, 1), torch.Generator().manual_seed(seed)
    positions = torch.arange(200_000)
    tokens = TokenInfo.of_new_tokens(positions, 3)
    rows = Row(positions=positions, rope=rotary(positions, 2, 10.0), attends=(), reports=Reports(), tokens=tokens)
    scores = torch.randn(200_000, generator=generator) * scale
    scores = 8 * torch.tanh((scores + torch.tensor(means).repeat(200_000)[:200_000]) / 8)
    rule.observe(scores, rows)
    rule.update(rule.counts.clone(), dense=0.0)
    assert (scores > rule.threshold).float().mean().item() == pytest.approx(share, rel=0.01, abs=2e-4)
    assert rule.counts.sum() == 0
    rule.update(rule.counts, dense=1.0)
    assert rule.threshold.item() == -float("inf")


def test_training_begins_dense_and_reaches_its_share(
    routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    decoder = routed_decoder(share=0.2, anneal=0.5, explore=0.0).train()
    batch = row(builder, random_document, list(range(60)))
    shares = []
    decoder.end_step(BEGINNING, lambda counts: counts)
    for step in range(21):
        decoder.progress = TrainingProgress(step, step / 20)
        read = decoder.row(batch)
        decoder.loss(batch, read)
        decoder.observe(read)
        decoder.end_step(TrainingProgress(step + 1, (step + 1) / 20), lambda counts: counts)
        shares.append(torch.stack([routed.passed for routed in routed_blocks(read)]).float().mean().item())
    assert shares[0] == 1
    expected = [max(0.2, 1 - 0.8 * step / 10) for step in range(21)]
    assert shares == pytest.approx(expected, abs=0.03)


def test_exploration_depends_on_document_position_and_step_alone(
    routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument
) -> None:
    decoder = routed_decoder(share=0.3, explore=1.0, slack=3.0).train()

    def choices(seeds: list[int], step: int) -> list[torch.Tensor]:
        decoder.progress = TrainingProgress(step, 0.2)
        batch = row(builder, random_document, seeds)
        return list(run(decoder, batch)[1].split(batch.document_lengths, dim=1))

    first, second, third = choices([3, 1, 2], 7), choices([2, 3], 7), choices([3, 1, 2], 8)
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[2], second[0])
    assert not torch.equal(first[0], third[0])
    assert torch.cat(choices(list(range(100)), 5), dim=1).float().mean() == pytest.approx(0.8 * 0.3 + 0.2 * 0.3, 0.1)


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from fuyu_e2e.model.batch import PackedBatch
from fuyu_e2e.model.image_layout import ImageSpan
from fuyu_e2e.model.config import FuyuConfig
from fuyu_e2e.model.routing.config import RoutingConfig
from fuyu_e2e.model.decoder import Decoder
from fuyu_e2e.model.row import TrainingProgress

def row(lengths, images):
    generator = torch.Generator().manual_seed(sum(lengths))
    patches = sum(images)
    return PackedBatch(
        tokens=torch.randint(0, 90, (512,), generator=generator),
        positions=torch.cat([torch.arange(n) for n in (*lengths, 512 - sum(lengths))]),
        patches=torch.randint(0, 256, (patches, 12), dtype=torch.uint8, generator=generator),
        patch_positions=torch.arange(patches),
        newline_positions=torch.arange(patches, patches + len(images)),
        target_positions=torch.arange(300, 300 + len(lengths)),
        targets=torch.arange(len(lengths)),
        document_lengths=tuple(lengths),
        images=tuple(ImageSpan(0, ((1, size),), bytes(size)) for size in images),
        document_ids=tuple(lengths),
    )

sizes = [([100, 200, 150], [30, 20]), ([60] * 8, [7, 50, 30]), ([400, 90], [30, 14]), ([33] * 15, [10] * 12)]
rows = [row(*size) for size in sizes]
for rule, skipped in (("threshold", "nothing"), ("threshold", "keys"), ("image_topk", "nothing"), ("topk", "nothing")):
    torch._dynamo.reset()
    torch.manual_seed(0)
    routing = RoutingConfig(rule=rule, skipped=skipped, share=0.3)
    decoder = Decoder(FuyuConfig(
        vocab_size=90, patch_size=2, layers=5, width=32, heads=2, kv_heads=1, head_size=16, feed_forward=48,
        routing=routing,
    )).train()
    decoder.progress = TrainingProgress(3, 0.5)
    reference = [decoder.loss(row).item() for row in rows]
    counter = CompileCounterWithBackend("aot_eager")
    for block in decoder.blocks:
        block.compile(backend=counter)
    frames = []
    for row_, expected in zip(rows, reference):
        loss = decoder.loss(row_)
        loss.backward()
        assert abs(loss.item() - expected) < 1e-4 * abs(expected), (loss.item(), expected)
        frames.append(counter.frame_count)
    # Another number of images makes sizes dynamic, once.
    assert 0 < frames[0] and frames[2] == frames[1] == frames[3], (rule, skipped, frames)
    assert rule == "image_topk" or frames[0] == frames[1], (rule, skipped, frames)
"""


def test_one_compilation_serves_different_documents() -> None:
    """Rows of one length, of other documents and images; compiled block by block. Apart from the type checks here."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


VALID = {"vocab_size": 9, "patch_size": 2, "width": 8, "heads": 1, "kv_heads": 1, "head_size": 8, "feed_forward": 8}


@pytest.mark.parametrize(
    ("layers", "settings", "sentence"),
    [
        (4, {"share": 0.0}, "above 0 and at most 1"),
        (4, {"share": 1.5}, "above 0 and at most 1"),
        (4, {"share": (0.5, float("nan"))}, "above 0 and at most 1"),
        (4, {"blocks": (0, 1, 2, 3)}, "names all 4 blocks"),
        (4, {"blocks": (4,)}, "blocks are 0 to 3"),
        (2, {}, "set decoder.layers to at least 3"),
        (8, {"share": (0.5, 0.25)}, "lists 2 shares for the 3 routed blocks 2, 4, 6"),
        (4, {"rule": "best"}, "the rules are threshold, topk"),
        (4, {"rule": "topk", "text_share": 0.5}, "leave it unset"),
        (4, {"skipped": "values"}, "must be 'nothing' or 'keys'"),
        (4, {"anneal": 1.5}, "routing.anneal is 1.5"),
        (4, {"explore": -0.1}, "routing.explore is -0.1"),
        (4, {"slack": -1.0}, "routing.slack is -1.0"),
    ],
)
def test_impossible_settings_are_refused_with_a_remedy(
    layers: int, settings: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)  # it would refuse some of them before we do
    assert FuyuConfig(layers=layers + 2, **VALID, routing=RoutingConfig())
    with pytest.raises(UserError, match=sentence):
        FuyuConfig(layers=layers, **VALID, routing=RoutingConfig(**settings))


@pytest.mark.parametrize("rule", ["threshold", "topk", "image_topk", "fixed", "random"])
def test_a_row_too_short_for_its_share_is_refused(
    routed_decoder: MakeDecoder, builder: SequenceBuilder, random_document: RandomDocument, rule: str
) -> None:
    decoder = routed_decoder(rule=rule, share=0.01).train()
    if rule != "image_topk":  # where text passes anyway, no row is too short
        with pytest.raises(UserError, match=r"data.budget to at least 100"):
            decoder.loss(row(builder, random_document, [0]))


@pytest.mark.parametrize(("layers", "routed"), [(3, (1,)), (4, (2,)), (8, (2, 4, 6)), (12, (4, 6, 8, 10))])
def test_every_second_block_is_routed_unless_told(layers: int, routed: tuple[int, ...]) -> None:
    config = FuyuConfig(layers=layers, **VALID, routing=RoutingConfig())
    assert config.routed == routed
    assert FuyuConfig(layers=layers, **VALID).routed == ()


def test_settings_read_from_json_are_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_checks, "jaxtyping_disable", True)  # it would refuse lists
    config = FuyuConfig(layers=6, **VALID, routing=RoutingConfig(blocks=(1, 3), share=(0.5, 0.25)))
    read = FuyuConfig.from_dict(json.loads(json.dumps(asdict(config))))
    assert read == config
    assert hash(read) == hash(config), "what is counted of a decoder is kept by its settings"
