"""What is computed on the processor, on a pretended GPU, on two, and on one without float64 (``test_devices.py``).

A scenario moves its inputs by ``place``, which returns them as they are on the processor. It returns what must lie on
the device, and what must be on the processor or a plain number.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.architectures import architecture_of
from excise.editing.directions import difference_in_means, reading_vector, subspaces
from excise.editing.directions.sae_latents import SparseLatents
from excise.editing.directions.subspaces import Place, Subspace
from excise.editing.edits import adapter_merge, dense, fake_quantization, unit_choice
from excise.editing.edits.base import edit_model
from excise.editing.edits.in_place import edits_in_place
from excise.editing.edits.low_rank import Factors, LowRankUpdate
from excise.editing.edits.pruned_units import PrunedUnits, keep_pruned
from excise.editing.hooks import concept_ablation, leaks, residual_stream, token_counts, unit_scores
from excise.editing.modules import final_hidden, unembedding
from excise.editing.numerics import cpu_products, spectrum
from excise.editing.numerics.cpu_attention import attention
from excise.editing.numerics.moments import Moments
from excise.editing.numerics.summed_gradients import summed_gradients
from excise.editing.training import adapters, entropy, jensen_shannon, packing, parallel_adapters, soft_targets
from excise.editing.training.edited_target import TargetEdit
from excise.editing.training.fewer_operations import fewer_operations
from excise.eval import depth_score, localization
from excise.eval.inference import candidates, generation, kept, likelihood, token_statistics
from excise.eval.inference.lockstep import Lockstep
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet, accuracies
from excise.eval.measurements import MEASUREMENTS, behaviour
from excise.eval.measurements.fluency import reverse_perplexity
from excise.eval.measurements.table import measure, scores_of
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from helpers import SMALL_TESTBED, make_pico, random_edit
from suite_packs import suite_pack
from torch import Tensor, nn

Placed = Callable[[Any], Any]
Result = tuple[Any, Any]
ROWS = [[5, 9, 7, 3], [8, 4], [6, 2, 9]]


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _log_p(count: int = 6, vocabulary: int = 40) -> list[Tensor]:
    return [(3 * _drawn(count, vocabulary, seed=seed)).log_softmax(-1) for seed in range(3)]


def _model(place: Placed, name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any, dict[str, Any]]:
    """A random model, its row, and a batch on its device."""
    model = place(make_pico(name, dtype))
    return model, architecture_of(model.config.to_dict()), likelihood.pad_left(ROWS, model.device)


def _parts(targets: soft_targets.SoftTargets) -> list[Tensor]:
    return [targets.ids, targets.log_p, targets.rest]


def targets(place: Placed) -> Result:
    """Targets of every shape and preset, and the loss toward them."""
    bare, expert, novice = map(place, _log_p())
    made = [bare]
    for count in (8, 40):
        streams = soft_targets.keep_streams(bare, expert, novice, count)
        made += [streams.disagreement(), streams.left_over()]
        for strength in (1.5, place(torch.linspace(0.5, 3, 6))):
            for one_sided in (False, True):
                made += _parts(streams.target(strength, one_sided=one_sided))
    for edit in (
        TargetEdit(2.0),
        TargetEdit(3.0, True, True, 2.0, 5),
        TargetEdit(1.5, ramp=True),
        TargetEdit(2.0, True),
    ):
        log_p = edit.log_p(bare, expert, novice, edit.strengths(6, bare.device))
        top = soft_targets.keep_top(log_p, 7)
        made += [log_p, edit.log_p(bare, expert, novice), *_parts(top), *_parts(top.largest(3)), *_parts(top[2:4])]
    made += _parts(soft_targets.certain(place(torch.tensor([3, 39])), 4, 40))
    joined = soft_targets.join([top, top])
    linear = nn.Linear(32, 40, bias=False)
    linear.weight.data = _drawn(40, 32)
    hidden, head = place(_drawn(12, 32)).requires_grad_(True), place(linear)
    made.append(entropy.entropy_of_hidden(hidden.detach(), head).detach())
    divergence = soft_targets.soft_divergence(hidden, head, joined)
    divergence.mean().backward()
    return [*made, *_parts(joined), divergence.detach(), hidden.grad], soft_targets.positions_at_once(40, bare.device)


def statistics(place: Placed) -> Result:
    """Moments, and every direction that is fitted to them."""
    plus, minus = Moments(12, covariance=True), Moments(12, covariance=True)
    for seed in range(3):
        plus.update(place(_drawn(9, 12, seed=seed) + 1))
        minus.update(place(_drawn(9, 12, seed=seed + 10)))
    at = Place(1)
    fitted = [
        subspaces.mean_difference(plus, minus, at),
        subspaces.mass_mean(plus, minus, at),
        subspaces.ridge_probe(plus, minus, at),
        subspaces.principal_components(plus, 3, at),
        subspaces.principal_components(plus, 3, at, centred=False, offset=minus.mean),
        subspaces.least_squares_eraser(plus, minus, at),
        subspaces.least_squares_eraser(plus, minus, at, orthogonal=True),
        reading_vector.by_means(plus, minus, at).subspace,
        reading_vector.by_components(plus, minus, plus, at).subspace,
    ]
    streams = [place(_drawn(2, 5, 3, 12, seed=seed)) for seed in range(2)]
    learned = difference_in_means.difference_in_means(streams[:1], streams[1:], (0, 1), (-3, -2, -1))
    vector, mean = difference_in_means.stacked(learned, 1, -1)
    made = [difference_in_means.without_component(vector, mean), difference_in_means.unit(vector)]
    hidden = place(_drawn(2, 3, 12))
    gap = reading_vector.distance(hidden, hidden + 1, place(torch.ones(2, 3, dtype=torch.bool)))
    return [gap], [[f.basis, f.offset, f.projector()] for f in fitted] + [learned.vectors, *made]


def streams(place: Placed) -> Result:
    """Reading and changing the residual stream."""
    model, row, inputs = _model(place)
    counts: list[tuple[str, int]] = []
    token_counts.count_tokens(model, lambda name, number: counts.append((name, int(number))))
    read = residual_stream.read_streams(model, row, inputs, [0, 1, 2])
    made = [*read.values(), residual_stream.residual_stream(model, row, inputs, [2, 0], 1)]
    basis = torch.linalg.qr(_drawn(32, 2)).Q
    seen: list[Tensor] = []
    changes = [
        residual_stream.ablated(model, row, basis),
        residual_stream.added(model, row, basis[:, 0], 1),
        residual_stream.added(model, row, basis[:, 0], 2),
        residual_stream.read_early(model, row, 1),
        residual_stream.written(model, row, lambda *values: seen.append(values[-1])),
        residual_stream.skipped(model, row, 1),
    ]
    for change in changes:
        with change, torch.no_grad():
            made.append(model(**inputs).logits)
    writes = leaks.measure_writes(model, row, lambda _: basis, [inputs])
    return [*made, *seen], [[(one.along, one.norm) for one in writes], counts]


def _latents() -> SparseLatents:
    d = 32
    return SparseLatents(
        Place(0, "mlp"), (3, 5), _drawn(2, d), _drawn(d, seed=1), _drawn(d, 2, seed=2), _drawn(2, seed=3), True,
        threshold=torch.tensor([0.1, 0.2]),
    )  # fmt: skip


def ablation(place: Placed) -> Result:
    """Concept ablation in training: every mode, value, site and source."""
    model, row, inputs = _model(place)
    plus, minus = Moments(32, covariance=True), Moments(32, covariance=True)
    plus.update(_drawn(80, 32) + 1)
    minus.update(_drawn(80, 32, seed=1))
    subspace = subspaces.principal_components(plus, 2, Place(1, "input"))
    other = Subspace(
        Place(1, "input"), torch.linalg.qr(_drawn(32, 2, seed=9)).Q, _drawn(32), ("a", "b"), (1.0, 1.0), "random"
    )
    leace = subspaces.least_squares_eraser(plus, minus, Place(0, "attention"))
    made = []
    for concepts, mode, value in (
        ([subspace], "both", "mean"),
        ([subspace, other], "activations", "mean"),
        ([subspace, leace], "gradients", "zero"),
        ([_latents()], "both", "zero"),
    ):
        with concept_ablation.concept_ablated(model, row, concepts, mode, value) as running:
            loss = model(**inputs).logits.float().logsumexp(-1).sum()
            loss.backward()
            with running.pause(), torch.no_grad():
                model(**inputs)
        made += [loss.detach(), model.get_input_embeddings().weight.grad.clone()]
        model.zero_grad()
    hidden = place(_drawn(2, 3, 32))
    return [*made, _latents().values(hidden), _latents().written(hidden)], []


def units(place: Placed) -> Result:
    """Scores of neurons and heads, and the choice among them."""
    model, row, inputs = _model(place)
    mask = inputs["attention_mask"].bool()
    concept, rest = unit_scores.UnitMoments(2), unit_scores.UnitMoments(2)
    effects = unit_scores.UnitAttribution(2)
    for moments, ids in ((concept, inputs["input_ids"]), (rest, inputs["input_ids"] + 11)):
        see = lambda layer, x, moments=moments: moments.see(layer, x, mask)  # noqa: E731
        with unit_scores.unit_inputs(model, row.mlp_units, row, see), torch.no_grad():
            model(input_ids=ids, attention_mask=inputs["attention_mask"])
    with unit_scores.gradients_reach_units(model), unit_scores.unit_inputs(model, row.mlp_units, row, effects.see):
        model(**inputs).logits.float().logsumexp(-1).sum().backward()
    made = [
        unit_scores.mean_difference(concept, rest),
        unit_scores.selectivity(concept, rest),
        unit_scores.rank_saliency(concept, rest),
        effects.effect(),
        effects.effect(rest.mean),
        unit_scores.by_head(concept.mean, 8),
    ]
    scores = unit_choice.UnitScores(*(table.cpu().float() for table in (made[0], made[1], rest.size, rest.mean)))
    chosen = unit_choice.top_units(unit_choice.combine(scores, 0.5), 0.1)
    matched = unit_choice.matched_units(chosen, scores.size, torch.Generator().manual_seed(0))
    correlation = unit_scores.rank_correlation(made[0][0], made[1][0])
    return [], [*(table.cpu().float() for table in made), chosen, matched, correlation]


def edits(place: Placed) -> Result:
    """Every kind of edit on a model in memory."""
    made: list[Any] = []
    changes: list[Any] = []
    down, width = "model.layers.1.mlp.down_proj.weight", {"model_type": "llama", "width": 32, "layers": 2}
    low = Factors(_drawn(32, 3), _drawn(3, 48, seed=1))
    pruned = {"model_type": "llama", "width": 32, "layers": 2, "head_width": 8}
    for edit in (
        random_edit(make_pico("llama").config.to_dict(), rank=2),
        LowRankUpdate({down: low}, **width),
        dense.DenseUpdate({down: dense.Delta(_drawn(32, 48))}, **width),
        PrunedUnits({0: (1, 4)}, {1: (2,)}, "down", **pruned),
        PrunedUnits({0: (1, 4)}, {}, "mean", means={0: torch.tensor([0.5, -1.0])}, **pruned),
        adapter_merge.AdapterMerge(
            {
                down: adapter_merge.Rescaled(low, _drawn(32).abs()),
                "model.embed_tokens.weight": adapter_merge.ReplacedRows(torch.tensor([4, 7]), _drawn(2, 32), 96),
                "model.norm.weight": adapter_merge.Replaced(_drawn(32)),
            },
            **width,
        ),
    ):  # fmt: skip
        model, _, inputs = _model(place)
        changes.append([change.relative_change for change in edit_model(edit, model, model.config.to_dict())])
        with torch.no_grad():
            made.append(model(**inputs).logits)
    model, _, inputs = _model(place)
    before = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    with edits_in_place(model, model.config.to_dict(), before.__getitem__) as tries, torch.no_grad():
        tries.apply(random_edit(model.config.to_dict()))
        made.append(model(**inputs).logits)
    return made, changes


def rounding(place: Placed) -> Result:
    """Fake quantization, and weights that are changed for a while."""
    made, counts = [], []
    for name in ("llama", "gpt2", "gpt_oss"):
        model, _, inputs = _model(place, name)
        for bits in (4, 16):
            with fake_quantization.rounded_weights(model, bits) as count, torch.no_grad():
                made.append(model(**inputs).logits)
            counts.append(count)
    return made, counts


def whole_weights(place: Placed) -> Result:
    """Training of whole weights, with pruned ones held at 0, and what it added."""
    model, _, inputs = _model(place)
    edit = PrunedUnits({0: (1, 4)}, {}, "frozen", "llama", 32, 2, 8)
    edit_model(edit, model, model.config.to_dict())
    masks = keep_pruned(model, edit, model.config.to_dict())
    with dense.weights_trained(model, ["model.layers.0.mlp.down_proj"]) as before:
        model(**inputs).logits.logsumexp(-1).sum().backward()
        with torch.no_grad():
            for name in before:
                model.get_parameter(name).sub_(0.01 * model.get_parameter(name).grad)
        deltas = dense.learned_deltas(model, before)
        made = [*before.values()]
    for mask in masks:
        mask.remove()
    return made, [delta.values for delta in deltas.values()]


def low_rank(place: Placed) -> Result:
    """An adapter of peft: its output, and its factors."""
    model, row, inputs = _model(place)
    shape = adapters.AdapterShape(2, 4.0, adapters.adapter_modules(model, row, [0, 1]))
    adapted = adapters.attach(model, shape, seed=3)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    # One layer is looked into, and so computed by itself.
    looked = adapted.get_base_model().get_submodule(shape.modules[0]).base_layer.register_forward_hook(lambda *_: None)
    with fewer_operations(adapted):
        adapted(**inputs).logits.float().logsumexp(-1).sum().backward()
    looked.remove()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * parameter.grad)
        made = [final_hidden(adapted, likelihood.pad_right(ROWS, adapted.device)), *[p.detach() for p in trained]]
        made.append(unembedding(adapted)(made[0][:, -1]))
        with adapters.switched_off(adapted):
            made.append(adapted(**inputs).logits)
    factors = adapters.learned_factors(adapted, shape)
    adapters.detach(adapted)
    return made, [[one.left, one.right] for one in factors.values()]


def attackers(place: Placed) -> Result:
    """Low-rank, soft-prompt and latent attackers side by side."""
    made = []
    for kind in ("low_rank", "soft_prompt", "latent"):
        model, row, _ = _model(place)
        batch = likelihood.pad_right([ROWS[0]] * 4, model.device)
        with {
            "low_rank": lambda m=model, r=row: parallel_adapters.low_rank_attackers(
                m, adapters.adapter_modules(m, r, [1]), [2, 3], 2.0, [0, 1]
            ),
            "soft_prompt": lambda m=model, r=row: parallel_adapters.soft_prompt_attackers(m, 2, [0, 1]),
            "latent": lambda m=model, r=row: parallel_adapters.latent_attackers(m, r, 0, [0, 1]),
        }[kind]() as attackers:
            attackers.assigned = (0, 1)
            made.append(attackers.by_position(batch["input_ids"][..., None]))
            model(**batch).logits.float().logsumexp(-1).sum().backward()
            made += [value for owned in attackers.owned for value in owned]
            made += [value.grad for owned in attackers.owned for value in owned]
            with attackers.only(1), torch.no_grad():
                made.append(model(**batch).logits)
    made = [value.detach() for value in made if value is not None]
    return [*made, parallel_adapters.embedded(model, torch.tensor([1, 2]))], parallel_adapters.embedding_scale(model)


def products(place: Placed) -> Result:
    """Attention by matrix products, forward and backward, with both kinds of mask."""
    made = []
    for mask in (None, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), torch.zeros(1, 1, 5, 5)):
        parts = [place(_drawn(2, heads, 5, 8, seed=heads)).requires_grad_(True) for heads in (4, 2, 2)]
        output = attention(*parts, None if mask is None else place(mask), 0.3)
        output.square().sum().backward()
        made += [output.detach(), *(part.grad for part in parts)]
    return made, [cpu_products.faster_in_float32(place(_drawn(8, 8)), 512)]


@cache
def _small() -> Any:
    return load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)


def _loaded(place: Placed) -> tuple[Any, Any]:
    return place(copy.deepcopy(_small().model)), _small().tokenizer


def _less(name: str, most: int) -> Any:
    """A pack of a few rows of each kind."""
    pack = load_concept(f"builtin:{name}")
    by_kind: dict[Any, list[Any]] = {}
    for question in pack.questions:
        by_kind.setdefault((question.split, question.group), []).append(question)
    questions = tuple(q for members in by_kind.values() for q in members[:most])
    prompts = tuple(p for split in ("concept", "neutral") for p in [p for p in pack.prompts if p.split == split][:3])
    return replace(pack, questions=questions, prompts=prompts, retain=pack.retain[:6])


SETTINGS = EvalSettings(max_new_tokens=4, kl_prompts=3, questions=24)


def measurements(place: Placed) -> Result:
    """Everything that the table measures, on a model beside its base."""
    model, tokenizer = _loaded(place)
    other, _ = _loaded(place)
    row = architecture_of(model.config.to_dict())
    found = []
    for name in ("potions", "declining"):
        pack = _less(name, 21)
        base = ModelUnderTest(other, tokenizer, pack, SETTINGS).baseline()
        with residual_stream.ablated(model, row, torch.linalg.qr(_drawn(model.config.hidden_size, 1)).Q):
            subject = ModelUnderTest(model, tokenizer, pack, SETTINGS, base)
            found += [(s.name, s.split, s.totals) for s in measure(subject)]
            found.append(behaviour.induced(subject).totals)
            found.append(reverse_perplexity(other, tokenizer, ["a"], subject.replies("neutral")[:1]).totals)
    return [], found


def suites(place: Placed) -> Result:
    """What suites alone measure, on packs in the shapes of two of them."""
    model, tokenizer = _loaded(place)
    found = []
    for pack in _suite_packs():
        subject = ModelUnderTest(model, tokenizer, pack, SETTINGS)
        for key in [key for key, kind in MEASUREMENTS.items() if kind.suite and kind.scores]:
            found += [(s.name, s.split, s.totals) for s in scores_of(key, subject)]
    return [], found


@cache
def _suite_packs() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return [load_concept(str(suite_pack(name, Path(folder) / name, 4))) for name in ("tofu", "muse")]


def inference(place: Placed) -> Result:
    """Replies, distributions kept, statistics of tokens, choices."""
    model, tokenizer = _loaded(place)
    prompts = ["Why is the sky blue?", "Tell me of the moon and of its light."]
    replies = [
        *generation.generate(model, tokenizer, prompts, 5),
        *generation.generate(model, tokenizer, prompts, 5, chat=False, sample_seed=2),
        *generation.generate(model, tokenizer, prompts, 5, as_shipped=True),
    ]
    whole, few = kept.kept(model, replies), kept.kept(model, replies, most=12 * 5 * 30)
    nats = [kept.divergences(model, replies, one) for one in (whole, few)]
    read = token_statistics.token_statistics(model, tokenizer, prompts)
    questions = MultipleChoiceSet(tokenizer, _less("potions", 5).questions)
    asked = [questions.hits(model), questions.hits(model, 2), questions.picks(model), questions.probabilities(model)]
    asked.append(questions.hits_and_probabilities(model))
    asked.append(accuracies(model, tokenizer, _less("potions", 5), 3))
    log_p = generation.reply_log_probabilities(model, replies)
    with generation.plain_decoding(model, {2}):
        asked.append(model.generate(torch.tensor([[5, 9]], device=model.device), max_new_tokens=3).tolist())
    lockstep = Lockstep(model, [(5, 9, 7), (40,)], 2)
    lockstep.read()
    lockstep.keep(torch.tensor([1], device=model.device))
    asked.append(lockstep.feed(torch.tensor([11], device=model.device)).tolist())
    return [], [[reply.ids for reply in replies], nats, [(one.log_p, one.mean) for one in read], asked, log_p]


def selective(place: Placed) -> Result:
    """Summed gradients, their spectrum made flat by every rule, and both Jensen-Shannon divergences."""
    model, _, inputs = _model(place)
    weights = {"down": model.model.layers[1].mlp.down_proj.weight}
    with summed_gradients(model, weights) as sums:
        for _ in range(2):
            model(**inputs).logits.logsumexp(-1).mean().backward()
    made = [sums["down"]]
    leading = spectrum.leading_components(sums["down"], 4, 0)
    for rule in ("soft", "hard", "quadratic"):
        made += [
            spectrum.reshaped(sums["down"], leading, rule),
            spectrum.reshaped(sums["down"], leading, rule, "inputs"),
        ]
    linear = nn.Linear(32, 40, bias=False)
    linear.weight.data = _drawn(40, 32)
    hidden = place(_drawn(12, 32)).requires_grad_(True)
    between = jensen_shannon.between_hidden(hidden, place(_drawn(12, 32, seed=1)), place(linear))
    between.sum().backward()
    return [*made, between.detach(), hidden.grad, jensen_shannon.from_certain(place(_log_p()[0])[:, 0])], []


def packs(place: Placed) -> Result:
    """Rows of several sequences, without padding, and with their gradient."""
    model = place(make_pico("llama"))
    model.set_attn_implementation("sdpa")
    # Two of them begin alike.
    inputs = packing.packed(sorted([*ROWS, (*ROWS[0][:2], 1)], key=len))
    blocks = [
        {name: place(one) if isinstance(one, Tensor) else one for name, one in b.items()} for b in inputs["blocks"]
    ]
    inputs = {name: place(inputs[name]) for name in ("input_ids", "position_ids")} | {
        "blocks": blocks,
        "real": place(inputs["real"]),
        "again": place(inputs["again"]),
        "filling": place(inputs["filling"]),
    }
    with packing.packing(model) as can:
        hidden = packing.read_packed(model, inputs)
        hidden.square().mean().backward()
    return [hidden.detach(), model.get_input_embeddings().weight.grad], [can, packing.recomputes(model)]


def localized(place: Placed) -> Result:
    """Which pairs a model knows, and the effects of its sites."""
    model, row, _ = _model(place)
    pair = localization.Pair((5, 9, 7, 3), (5, 8, 7, 3), (1, 2), 4, 6, "one")
    pairs = [pair, replace(pair, answer=6, other=4, name="two")]
    effects = [
        *localization.attribution(model, row, pairs[:1]),
        *localization.exact(model, row, pairs[:1]),
        *localization.exact(model, row, pairs[:1], remove=True),
    ]
    return [], [[effect.value for effect in effects], localization.known(model, pairs)]


def depth(place: Placed) -> Result:
    """What a model wrote after each layer, and what another lacks of it."""
    model, row, _ = _model(place)
    statements = [depth_score.Statement((5, 9, 7, 3), 2, "one"), depth_score.Statement((8, 4, 6), 1, "two")]
    streams = depth_score.streams_at_answers(model, row, statements)
    lacks = depth_score.lacking(model, row, statements, [[0.5 * one for one in streams]])
    return [], [streams, lacks, asdict(depth_score.depth_score(lacks[0], 0.5 * lacks[0], ["one", "two"]))]


def searched(place: Placed) -> Result:
    """Candidate directions by both probes."""
    model, tokenizer = _loaded(place)
    row = architecture_of(model.config.to_dict())
    found = []
    for name in ("declining", "potions"):
        pack = _less(name, 4)
        pairs = load_concept(f"builtin:{name}").contrast[:4]
        inputs = likelihood.pad_left([[5, 6, 7], [8, 9, 10]], model.device)
        read = [residual_stream.residual_stream(model, row, inputs, [1], 1)]
        directions = difference_in_means.difference_in_means(read, [read[0] * 0.5], (1,), (-1,))
        probe = (
            candidates.BehaviourProbe(model, tokenizer, pairs, 4)
            if name == "declining"
            else candidates.KnowledgeProbe(model, tokenizer, pairs, [q for q in pack.questions if q.group == "T"])
        )
        found += candidates.score_candidates(model, row, directions, probe, candidates.Filters(), 4)
        found.append(probe.describe())
    return [], [asdict(one) if isinstance(one, candidates.Candidate) else one for one in found]


SCENARIOS: dict[str, Callable[[Placed], Result]] = {
    function.__name__: function
    for function in (
        targets, statistics, streams, ablation, units, edits, rounding, whole_weights, low_rank, attackers, products,
        measurements, suites, inference, selective, packs, localized,
        depth, searched,
    )
}  # fmt: skip


def leaves(value: Any) -> Iterator[Any]:
    """Leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value
