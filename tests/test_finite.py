"""Results that are no numbers: refused with document, mask, part of the model and cause, and no false alarms."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import families
from headcount.engine.engine import Engine
from headcount.engine.layout import probe
from headcount.engine.pack import Budget
from headcount.engine.proof import verify_sweep
from headcount.errors import ModelError, OptionError, TaskError
from headcount.masks import Mask, removal_order
from headcount.measure import finite as refusals
from headcount.measure.copying import _ratio
from headcount.measure.evaluate import evaluate
from headcount.measure.importance import gradient_importance, oracle_from, oracle_importance
from headcount.measure.induction import induction_scores
from headcount.model.anatomy import Anatomy, find_anatomy
from headcount.model.damage import by_feature, damage_blank, removed_heads_blank
from headcount.model.finite import Finding, first_no_gradient, first_no_number
from headcount.model.load import LoadedModel, wrap
from headcount.model.norms import find_norms
from headcount.study.ledger import Ledger
from headcount.study.runner import run_study
from headcount.study.spec import StudySpec
from headcount.tasks.fewshot import FewShot
from headcount.tasks.load import get_tasks
from headcount.tasks.task import Task
from headcount.terminal import print_anatomy

NAN, INF = float("nan"), float("inf")
# Each document's subject is a token that only it has; the first ids are special.
SUBJECTS = range(10, 16)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Six documents of words, of which the i-th is about the word 10 + i, in both splits."""
    for split in ("train", "validation"):
        rows = [{"context": f"w40 w{i} w41", "options": [f"w{50 + i} w42", "w43"], "gold": i % 2} for i in SUBJECTS]
        path = tmp_path / "words" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return next(iter(get_tasks([str(tmp_path / "words")]).values()))


def model(family: str = "llama") -> LoadedModel:
    return wrap(families.tiny(family), families.reader(), name=family)


def put(loaded: LoadedModel, parameter: str, where: object, value: float) -> None:
    with torch.no_grad():
        loaded.model.get_parameter(parameter)[where] = value


def full(loaded: LoadedModel) -> Mask:
    return Mask.full(loaded.anatomy.heads_per_layer)


EVERY = slice(None)
DAMAGE: dict[str, tuple[str, object, float, str, str]] = {
    "an FFN": ("model.layers.1.mlp.up_proj.weight", (0, 0), NAN, "L1F, the FFN of layer 1", "1 of 1,536 values"),
    "an FFN's infinity": ("model.layers.0.mlp.down_proj.weight", (3, 4), INF, "L0F, the FFN of layer 0", "1 of 1,536"),
    "a head's queries": ("model.layers.1.self_attn.q_proj.weight", slice(8, 16), NAN, "L1H1:", "256 of 1,024"),
    "a group's values": ("model.layers.1.self_attn.v_proj.weight", (9, 0), NAN, "L1H2 and L1H3:", "1 of 512"),
    "what a head writes": ("model.layers.1.self_attn.o_proj.weight", (EVERY, slice(24, 32)), NAN, "L1H3:", "256 of"),
    "what all heads write": ("model.layers.0.self_attn.o_proj.weight", 5, NAN,
                             "the attention's output projection of layer 0 (model.layers.0.self_attn.o_proj)", "32 of"),
    "a norm": ("model.layers.1.input_layernorm.weight", 0, NAN, "the norm model.layers.1.input_layernorm", "1 of 32"),
    "the last norm": ("model.norm.weight", 2, INF, "the norm model.norm:", "1 of 32"),
    "the output layer": ("lm_head.weight", 7, NAN, "the output layer (lm_head)", "32 of 3,072"),
    "a token": ("model.embed_tokens.weight", 41, NAN, "the embeddings (model.embed_tokens)", "32 of 3,072"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_named_with_part_and_document(task: Task, what: str) -> None:
    loaded = model()
    parameter, where, value, part, many = DAMAGE[what]
    put(loaded, parameter, where, value)
    for measure, result in ((lambda: evaluate(loaded, task), "the log-likelihood of option 0 of document 0 of task "
                             "'words' (0-shot) is "),
                            (lambda: gradient_importance(loaded, task, FewShot()), "the gradient score of document 0 "
                             "of task 'words' (0-shot, importance examples) is no number for L")):
        with pytest.raises(ModelError) as caught:
            measure()
        message = str(caught.value)
        assert message.startswith(result)
        assert f"it goes wrong first in {part}" in message
        assert f"{parameter} ({many}" in message
        assert "the checkpoint is damaged" in message
        assert "\n" not in message


def damage_a_head(anatomy: Anatomy, layer: int, head: int) -> None:
    part = anatomy.layers[layer]
    with torch.no_grad():
        by_feature(part)[head * part.d_head + 1, 2] = NAN


def damage_an_ffn(anatomy: Anatomy, layer: int) -> None:
    with torch.no_grad():
        for parameter in anatomy.layers[layer].ffn_output.parameters():
            parameter.fill_(NAN)


# Norms in every place, residuals inside attention, FFNs without a module, experts, transposed and nested projections.
KINDS = (*families.CORE, "bloom", "falcon", "gpt_neo", "mpt", "dbrx", "gemma2", "gemma4-experts", "olmo2", "mixtral",
         "deepseek_v3")


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_family_is_traced_without_false_alarms(family: str) -> None:
    made = families.tiny(family)
    anatomy = find_anatomy(made)
    ids, scored = families.tokens(1, 9)[0].numpy(), np.array([6, 7, 8])
    for mask in (None, Mask.full((4, 4)).without_heads([(0, 1)]).without_ffns([1])):
        assert first_no_number(made, anatomy, ids, mask) is None
    assert first_no_gradient(made, anatomy, ids, scored, ids[:3]) is None
    damage_a_head(anatomy, 1, 2)
    assert first_no_number(made, anatomy, ids).text.startswith("L1H2: the weights themselves")
    without = Mask.full((4, 4)).without_heads([(1, 2)])
    with removed_heads_blank(anatomy, without) as blank:
        assert blank
        assert first_no_number(made, anatomy, ids, without) is None
    assert first_no_number(made, anatomy, ids) is not None, "weights come back"
    damage_an_ffn(anatomy, 0)
    assert first_no_number(made, anatomy, ids).text.startswith("L0F, the FFN of layer 0: the weights themselves")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())


def test_damaged_weights_come_back_where_writing_zeros_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model()
    put(loaded, "model.embed_tokens.weight", 5, NAN)
    put(loaded, "model.norm.weight", 3, NAN)
    looked = torch.isfinite

    def stopped(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1 and not looked(tensor).all():
            raise KeyboardInterrupt
        return looked(tensor)

    monkeypatch.setattr(torch, "isfinite", stopped)
    with pytest.raises(KeyboardInterrupt), damage_blank(loaded.model):
        pass
    assert loaded.model.get_input_embeddings().weight[5].isnan().all()


def test_only_documents_with_a_damaged_token_are_hit(task: Task) -> None:
    """Also where others share their row or their batch, and where it is the padding's token."""
    sound = model()
    for token, first in ((13, 3), (0, None)):
        loaded = model()
        put(loaded, "model.embed_tokens.weight", token, NAN)
        for budget, trees in ((Budget(1000, 1000), True), (Budget(1, 1000), True), (Budget(1, 1000), False)):
            if first is None:
                expected = evaluate(sound, task, budget=budget, trees=trees).gold_loglikelihood
                found = evaluate(loaded, task, budget=budget, trees=trees)
                np.testing.assert_allclose(found.gold_loglikelihood, expected, atol=1e-5)
                continue
            with pytest.raises(ModelError, match=f"option 0 of document {first} of"):
                evaluate(loaded, task, budget=budget, trees=trees)
            evaluate(loaded, task, limit=first, budget=budget, trees=trees)
    scores = [gradient_importance(m, task, FewShot(), budget=Budget(None, 1000, 1000))["head"] for m in (sound, loaded)]
    np.testing.assert_allclose(scores[0].scores["example"], scores[1].scores["example"], rtol=1e-4)


def test_what_a_mask_removes_may_be_damaged(task: Task) -> None:
    """Weights of a removed part are not read, also by heads whose zeros meet NaN in the output projection."""
    loaded, erased = model(), model()
    gone = full(loaded).without_heads([(1, 3), (0, 0)]).without_ffns([0])
    masks = [gone, gone.without_heads([(0, 2)]), gone.without_ffns([1])]
    for parameter, where in (("model.layers.1.self_attn.o_proj.weight", (EVERY, slice(24, 32))),
                             ("model.layers.0.self_attn.o_proj.weight", (3, 1)),
                             ("model.layers.0.mlp.gate_proj.weight", (0, 0))):
        put(loaded, parameter, where, NAN)
        put(erased, parameter, where, 0)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    for chosen in (masks, masks[:1]):
        found, expected = (evaluate(m, task, chosen, budget=Budget(1000, 1000)) for m in (loaded, erased))
        np.testing.assert_allclose(found.gold_loglikelihood, expected.gold_loglikelihood, atol=1e-5)
        assert (found.correct == expected.correct).all()
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(9), before[name].nan_to_num(9)), f"{name} comes back"
    with pytest.raises(ModelError, match="is nan without L1H3, L0F; it goes wrong first in L0H0: the weights"):
        evaluate(loaded, task, [gone, full(loaded).without_heads([(1, 3)]).without_ffns([0])])
    with pytest.raises(ModelError, match=r"document 0 of task 'words' \(0-shot, importance examples\) is nan; "):
        oracle_importance(loaded, task, FewShot())


def test_attention_with_a_residual_inside_is_swept_where_a_removed_head_is_damaged(task: Task) -> None:
    """BLOOM adds the residual in its attention, which must not be taken for a plain one because NaN equals nothing."""
    loaded, erased = model("bloom"), model("bloom")
    for which, value in ((loaded, NAN), (erased, 0.0)):
        with torch.no_grad():
            by_feature(which.anatomy.layers[0])[8:16] = value
    gone = full(loaded).without_heads([(0, 1)])
    masks = [gone, gone.without_ffns([0]), gone.without_heads([(0, h) for h in range(4)])]
    found, expected = (evaluate(m, task, masks).gold_loglikelihood for m in (loaded, erased))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def scaled(loaded: LoadedModel, **factors: float) -> None:
    with torch.no_grad():
        for name, factor in factors.items():
            loaded.model.get_parameter(name.replace("__", ".")).mul_(factor)


def test_overflow_is_told_from_damage_with_the_type(task: Task) -> None:
    ffn = {"model__layers__1__mlp__up_proj__weight": 3e3, "model__layers__1__mlp__gate_proj__weight": 3e2}
    for dtype, factor, remedy in ((torch.float16, 1.0, "float16 overflows (its largest number is 65504): use the type "
                                   "bfloat16 or float32 (--dtype)"),
                                  (torch.float32, 1e17, "float32 overflows beyond 3e+38: weights are far too large")):
        loaded = wrap(families.tiny("llama").to(dtype), families.reader())
        scaled(loaded, **{name: own * factor for name, own in ffn.items()})
        for measure in (lambda m=loaded: evaluate(m, task), lambda m=loaded: gradient_importance(m, task, FewShot())):
            with pytest.raises(ModelError, match="it goes wrong first in L1F") as caught:
                measure()
            message = caught.value.on_command_line()
            assert f"L1F, the FFN of layer 1: all weights there are numbers, but {remedy}" in message
            assert "damaged" not in message


def test_overflow_between_parts_is_the_residual_streams(task: Task) -> None:
    loaded = wrap(families.tiny("llama-bias").to(torch.float16), families.reader())
    for name in ("mlp.down_proj", "self_attn.o_proj"):  # each branch holds it, their sum does not
        put(loaded, f"model.layers.0.{name}.bias", EVERY, 4e4)
    with pytest.raises(ModelError, match=r"first in the residual stream of layer 0: .* float16 overflows"):
        evaluate(loaded, task)


class Root(nn.Module):
    """Its value is a number everywhere, its derivative is none at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * (x > 0)).sqrt()


def test_gradients_that_are_no_numbers_are_named_where_the_forward_pass_has_numbers(task: Task) -> None:
    loaded = model()
    loaded.model.model.layers[1].mlp.act_fn = Root()
    assert np.isfinite(evaluate(loaded, task).gold_loglikelihood).all()
    with pytest.raises(ModelError, match=r"the gradient score of document 0 .*importance examples\) is no number for "
                       r"L0H0, L0H1, .*first in L1F, the FFN of layer 1: all weights there are numbers, and it is no"):
        gradient_importance(loaded, task, FewShot())


def test_gradients_that_overflow_are_told_with_the_type(task: Task) -> None:
    loaded = wrap(families.tiny("llama").to(torch.float16), families.reader())
    with torch.no_grad():  # large logits of a tiny residual stream: the norm's derivative is as large as it is small
        loaded.model.model.norm.weight.fill_(1)
        loaded.model.model.norm.variance_epsilon = 1e-9
        loaded.model.lm_head.weight.mul_(2000)
        loaded.model.model.embed_tokens.weight.mul_(1e-3)
        for part in loaded.anatomy.layers:
            part.out_proj.weight.mul_(1e-3)
            part.ffn_output.weight.mul_(1e-3)
    assert np.isfinite(evaluate(loaded, task).gold_loglikelihood).all()
    with pytest.raises(ModelError, match=r"the gradient score .* first in the norm model.norm: .*float16 overflows .*"
                       r"\(dtype\)"):
        gradient_importance(loaded, task, FewShot())


def test_a_norm_of_nothing_is_neither_damage_nor_overflow(task: Task) -> None:
    """Only under the mask: without its heads and FFNs, a token with an embedding of zeros leaves the last norm 0/0."""
    loaded = model()
    loaded.model.model.norm.variance_epsilon = 0.0
    put(loaded, "model.embed_tokens.weight", 62, 0.0)  # the first option of the third document
    nothing = Mask([[False] * 4] * 2, [False] * 2)
    evaluate(loaded, task)
    with pytest.raises(ModelError, match=r"option 0 of document 2 of task 'words' \(0-shot\) is nan without L0H0, "
                       r"L0H1, L0H2 and 5 more heads, L0F and L1F; it goes wrong first in the norm model.norm: all "
                       r"weights there are numbers, and it is no overflow, since a wider type gives none either"):
        evaluate(loaded, task, [full(loaded), nothing])


def masked_out(loaded: LoadedModel, *tokens: int) -> None:
    """Logits of -inf, as models give padded vocabulary."""
    def hook(module: nn.Module, args: object, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(tokens), -INF)

    loaded.model.lm_head.register_forward_hook(hook)


def test_logits_of_minus_infinity_are_fine_but_for_targets(task: Task) -> None:
    padded = model()
    masked_out(padded, *range(70, 96))  # no document has them
    assert probe(padded).trees, "the layout does not depend on them"
    smaller = model()
    put(smaller, "lm_head.weight", slice(70, 96), 0)
    smaller.model.lm_head.register_forward_hook(lambda m, a, y: torch.cat([y[..., :70], y[..., 70:] - 1e4], -1))
    for measure in (lambda m: evaluate(m, task, [full(m), full(m).without_ffns([0])]).gold_loglikelihood,
                    lambda m: gradient_importance(m, task, FewShot())["head"].scores["example"]):
        np.testing.assert_allclose(measure(padded), measure(smaller), rtol=1e-4)
    masked_out(padded, 64)
    with pytest.raises(ModelError, match=r"option 0 of document 4 .* is -inf; .*a token of the continuation "
                       r"\('w64', 'w42'\) a logit of -inf"):
        evaluate(padded, task)


def test_layouts_do_not_depend_on_single_tokens_without_numbers() -> None:
    loaded = model()
    put(loaded, "model.embed_tokens.weight", slice(10, 60), NAN)
    assert probe(loaded).trees
    put(loaded, "model.norm.weight", 0, NAN)
    assert not probe(loaded).trees
    assert probe(loaded).reason == "the model's log-likelihoods of random tokens are no numbers"


def test_norms_are_found_where_the_first_tokens_have_no_numbers() -> None:
    gemma = model("gemma2")
    expected = find_norms(gemma.model, gemma.anatomy)
    assert len(expected) == 2
    put(gemma, "model.embed_tokens.weight", slice(0, 3), NAN)
    assert find_norms(gemma.model, gemma.anatomy) == expected


def test_a_metric_that_is_no_number_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model()
    for value in (NAN, INF):
        own = task.inner.process_results

        def worse(doc: dict, results: list, own: Callable = own, value: float = value) -> dict:
            """The third document's metric, as it is for real log-likelihoods only."""
            return own(doc, results) | ({"acc": value} if "w12 " in str(doc) and results[0][0] not in (0, -1e4) else {})

        with monkeypatch.context() as patch:
            patch.setattr(task.inner, "process_results", worse)
            with pytest.raises(TaskError, match=rf"the metric 'acc' of document 2 of task 'words' \(0-shot\) without "
                               rf"L1F is {value:g}, though"):
                evaluate(loaded, task, [full(loaded).without_ffns([1])])


def test_no_importance_is_made_of_measurements_that_are_no_numbers(task: Task) -> None:
    loaded = model()
    measured = evaluate(loaded, task, [full(loaded), full(loaded).without_ffns([0]), full(loaded).without_ffns([1])])
    for field in ("correct", "gold_loglikelihood"):
        values = getattr(measured, field).copy()
        values[2, 4] = NAN
        with pytest.raises(ModelError, match=r"of document 4 of task 'words' \(0-shot\) without L1F is no number"):
            oracle_from(dataclasses.replace(measured, **{field: values}))


def test_no_order_is_made_of_scores_that_are_no_numbers() -> None:
    with pytest.raises(OptionError, match="1 of 3 are no numbers"):
        removal_order(np.array([1.0, NAN, 0.5]))
    with pytest.raises(OptionError, match="position 2"):
        removal_order(np.array([1.0, 2.0, 0.5]), np.array([0.0, 0.0, INF]))


def test_greedy_matches_nothing_where_there_is_no_number() -> None:
    loaded = model()
    put(loaded, "lm_head.weight", 50, NAN)
    packed = Engine.of(loaded).pack([[refusals.Request(np.array([1, 5]), np.array([50]))]])
    assert Engine.of(loaded).loglikelihoods(packed).greedy.tolist() == [[0]]


INDUCTION = {
    "a head": ("model.layers.1.self_attn.q_proj.weight", slice(8, 16), NAN,
               "the prefix matching score of L1H1 is no number in random text 0; it goes wrong first in L1H1: the "
               "weights"),
    "the last norm": ("model.norm.weight", 1, NAN, "the copying score of L0H0, L0H1, L0H2 and 5 more heads is no "
                      "number in random text 0; it goes wrong first in the norm model.norm: the weights"),
    "a token that no text has": ("model.embed_tokens.weight", 3, NAN, "the OV copying score reads the embeddings and "
                                 "the output layer of all tokens, and not all of them are numbers: "
                                 "model.embed_tokens.weight (32 of 3,072 values)"),
    "a token that the output layer lacks": ("lm_head.weight", 3, NAN, "lm_head.weight (32 of 3,072 values)"),
}


@pytest.mark.parametrize("what", INDUCTION)
def test_induction_scores_that_are_no_numbers_are_refused(what: str) -> None:
    loaded = model()
    parameter, where, value, message = INDUCTION[what]
    put(loaded, parameter, where, value)
    with pytest.raises(ModelError, match=re.escape(message)):
        induction_scores(loaded, lengths=[5], seeds=2)


def test_a_copying_score_of_no_number_is_not_nothing() -> None:
    logits = torch.ones(1, 3, 3)
    logits[0, 2, 1] = NAN
    attended = torch.zeros(1, 3, dtype=torch.long)
    assert torch.isnan(_ratio(logits, attended, 1e-5)[0]).tolist() == [False, False, True]
    assert _ratio(torch.ones(1, 3, 3), attended, 1e-5).tolist() == [[0, 0, 0]]


def test_sound_models_are_never_traced(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Finding:
        raise AssertionError("nothing is wrong")

    for name in ("first_no_number", "first_no_gradient", "removed_heads_blank"):
        monkeypatch.setattr(refusals, name, never)
    loaded = model()
    oracle_importance(loaded, task, FewShot())
    gradient_importance(loaded, task, FewShot())
    induction_scores(loaded, lengths=[5], seeds=2)


def test_contracts_are_proved_apart_from_numbers(task: Task) -> None:
    """Where heads and FFNs are does not depend on a damaged weight; what fails all the same is told by its cause."""
    loaded = model()
    put(loaded, "model.layers.1.self_attn.k_proj.weight", (0, 0), NAN)
    put(loaded, "model.layers.0.mlp.up_proj.weight", (0, 0), INF)
    assert [result.holds for result in Engine.of(loaded).contracts] == [True] * 3
    assert torch.isnan(loaded.model.get_parameter("model.layers.1.self_attn.k_proj.weight")).sum() == 1
    assert not verify_sweep(loaded.model, loaded.anatomy).holds, "NaN is not forgotten over later masks"
    unfit = wrap(families.tiny("diffllama"), families.reader())
    put(unfit, "model.layers.0.mlp.up_proj.weight", (0, 0), NAN)
    with pytest.raises(ModelError, match="cannot be measured: it fails the check"):
        evaluate(unfit, task)
    wide = wrap(families.tiny("llama").to(torch.float16), families.reader())
    scaled(wide, **{f"model__layers__0__mlp__{name}_proj__weight": 1e3 for name in ("up", "gate")})
    with pytest.raises(ModelError, match=r"document 0 of .*it goes wrong first in L0F.*float16 overflows.*\(dtype\)"):
        evaluate(wide, task)
    wide = wrap(families.tiny("llama").to(torch.float16), families.reader())
    scaled(wide, **{f"model__layers__0__self_attn__{name}_proj__weight": 1e4 for name in "vo"})
    with pytest.raises(ModelError, match=r"cannot be measured: it fails the check .*for random tokens it gives no "
                       r"numbers: it goes wrong first in the attention's output projection of layer 0 .*float16 over"):
        evaluate(wide, task)


def test_a_study_keeps_what_it_measured_and_goes_on_when_the_cause_is_gone(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task's documents do not have the word 14, the second's do, of which the machine makes NaN."""
    loaded, own = model(), nn.functional.embedding
    for split in ("train", "validation"):
        lines = (tmp_path / "words" / f"{split}.jsonl").read_text().splitlines()[:4]
        (tmp_path / "before").mkdir(exist_ok=True)
        (tmp_path / "before" / f"{split}.jsonl").write_text("\n".join(lines))
    asked = StudySpec("llama", tasks=tuple(str(tmp_path / name) for name in ("before", "words")), shots=(0,),
                      out=tmp_path / "study", fractions=(0.5,))
    with monkeypatch.context() as machine, pytest.raises(
        ModelError, match=r"document 4 of task 'words' .*it goes wrong first in the embeddings"
    ):
        machine.setattr(nn.functional, "embedding",
                        lambda ids, *args: own(ids, *args).masked_fill((ids == 14)[..., None], NAN))
        run_study(asked, loaded=loaded)
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "study" / "entries").iterdir()}
    assert kept, "what was measured before stays"
    run_study(asked, loaded=loaded)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "study" / "entries").iterdir()}
    assert {name: after[name] for name in kept} == kept, "nothing of it is measured again"
    for entry in Ledger(tmp_path / "study").entries("evaluation"):
        assert np.isfinite(entry.table["gold_loglikelihood"]).all()


def test_verify_says_that_a_damaged_model_gives_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = model()
    assert print_anatomy(loaded, verify=True)
    assert "FAILS" not in capsys.readouterr().out
    put(loaded, "model.layers.1.mlp.up_proj.weight", (0, 0), float("nan"))
    assert not print_anatomy(dataclasses.replace(loaded), verify=True)
    told = " ".join(capsys.readouterr().out.split())
    assert "FAILS random tokens give numbers" in told
    assert "model.layers.1.mlp.up_proj.weight" in told


def test_weights_that_do_not_fit_into_float16_are_no_damage(task: Task) -> None:
    plain = families.tiny("llama")
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[0] = 1e6
    loaded = wrap(plain.half(), families.reader())
    with pytest.raises(ModelError, match=r"do not fit into float16: use the type bfloat16 or float32"):
        evaluate(loaded, task)
    put(loaded, "model.layers.1.mlp.up_proj.weight", (0, 0), NAN)
    with pytest.raises(ModelError, match="the checkpoint is damaged"):
        evaluate(loaded, task)
