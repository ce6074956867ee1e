"""Recipes against the numbers of what they repeat, written out here once more."""

import dataclasses

import pytest

from reroll.errors import UsageError
from reroll.models import Interface
from reroll.recipes import RECIPES, cpu_bytes, fineweb_1b5, fineweb_124m, memorise

COLUMNS = (
    "kind", "lr", "embedding_lr", "head_lr", "vector_lr", "adjust_lr_fn", "warmup", "warmdown", "steps",
    "vocab", "heads", "position", "activation", "qk_norm", "zero_init", "tied", "embed_norm", "epochs",
)  # fmt: skip
OLD = (50_257, 12, "rotary", "gelu", False, False, True, False, 1)
FIVE = (50_304, 6, "rotary", "relu2", True, True, True, False, 1)
MATCH = ("muon", 0.0018, 0.0036, 0.0036, 0.0036, "match_rms_adamw")  # 0.1 · 0.0036 · √max(m, n) for matrices
RECORDS = {
    "1": ("adamw", 0.0006, None, None, None, None, 700, None, 19_560,
          50_257, 12, "learned", "gelu", False, False, True, False, 2),
    "2": ("adamw", 0.0018, None, None, None, None, 250, 2000, 9_536, *OLD),
    "3": (*MATCH, 250, 2000, 6_676, *OLD),
    "4": (*MATCH, 0, 1800, 6_200, *OLD),
    "5": (*MATCH, 0, 1450, 5_100, *FIVE),
    "6": (*MATCH, 0, 1450, 5_100, *FIVE),
    "7": (*MATCH, 0, 1450, 5_100, *FIVE),
    "8": ("muon", 0.02, 0.3, 0.002, 0.0036, "original", 0, 1308, 4_578,
          50_304, 6, "rotary", "relu2", True, True, False, True, 1),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_records_of_the_speedrun(record):
    config = fineweb_124m(record)
    values = {}
    for section in (config.optim.schedule, config.run, config.task, config.model, config.optim):
        values |= {name: getattr(section, name) for name in COLUMNS if hasattr(section, name)}
    assert tuple(values.get(name) for name in COLUMNS) == RECORDS[record]
    model, optim, task, run = config.model, config.optim, config.task, config.run
    assert (model.kind, model.layers, model.width) == ("gpt", 12, 768)
    assert (model.softcap, model.value_residual, model.embed_shortcut) == (None, False, False)
    assert (task.kind, task.path, task.length, task.batch, task.valid_tokens) == (
        "tokens", "fineweb", 1024, 512, 10_485_760,
    )  # fmt: skip
    assert (run.dtype, run.eval_every, run.target_valid) == ("bf16", 125, 3.28)
    assert (optim.betas, optim.eps, optim.schedule.floor) == ((0.9, 0.95), 1e-8, 0.0)
    first = record == "1"
    assert (optim.weight_decay, optim.clip) == (
        {"1": 0.1, "2": 0.1}.get(record, 0.0), 1.0 if first else None,
    )  # fmt: skip
    assert optim.schedule.kind == ("cosine" if first else "linear")
    if optim.kind == "muon":
        assert (optim.momentum, optim.nesterov, optim.ns_coefficients, optim.ns_steps) == (0.95, True, "jordan", None)
        assert (optim.momentum_warmup, optim.beta2, optim.cautious) == (0, None, False)


def test_an_argument_that_a_recipe_does_not_have_is_refused():
    for call, message in (
        (lambda: fineweb_124m("0"), "record='0' must be one of 1, 2, 3, 4, 5, 6, 7, 8."),
        (lambda: fineweb_124m(9), "record='9' must be one of 1, 2"),
        (lambda: fineweb_1b5("sgd"), "rule='sgd' must be one of muon, adamw."),
        (lambda: memorise("huge"), "size='huge' must be one of tiny"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert message in str(error.value)


def test_the_rate_of_record_8_over_its_steps():
    """1 up to step 3269, and 1/1308 at the last one, which is 4577."""
    config = fineweb_124m()
    rates = [config.optim.schedule(step, config.run.steps) for step in (0, 3269, 3270, 3271, 4577)]
    assert rates == pytest.approx([1, 1, 1, 1307 / 1308, 1 / 1308])
    assert config == fineweb_124m("8")


def test_the_matrices_of_records_3_to_7_move_as_they_did():
    """0.00998 for 768 × 768, 0.01995 for both of the MLP; record 8 moves them by 0.02, 0.04 (up) and 0.02 (down)."""
    seven, eight = fineweb_124m("7").optim.lr, fineweb_124m("8").optim.lr
    for (m, n), old, new in (((768, 768), 0.00998, 0.02), ((3072, 768), 0.01995, 0.04), ((768, 3072), 0.01995, 0.02)):
        assert seven * 0.2 * max(m, n) ** 0.5 == pytest.approx(old, rel=1e-3)
        assert seven * 0.2 * max(m, n) ** 0.5 == pytest.approx(0.1 * 0.0036 * max(m, n) ** 0.5)
        assert eight * max(1, m / n) ** 0.5 == pytest.approx(new)


def test_cpu_bytes_is_record_8_made_small():
    config, record = cpu_bytes(), fineweb_124m()
    for name in ("kind", "embedding_lr", "momentum", "betas", "adjust_lr_fn"):
        assert getattr(config.optim, name) == getattr(record.optim, name)
    for name in ("position", "activation", "qk_norm", "zero_init", "tied", "embed_norm"):
        assert getattr(config.model, name) == getattr(record.model, name)


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_the_scale_up_to_1_5_billion_weights(rule):
    """Against its logs: rates of matrices and of the tied embedding, schedule, and what it has of record 7."""
    config, seven = fineweb_1b5(rule), fineweb_124m("7")
    model, optim, task, run = config.model, config.optim, config.task, config.run
    assert (model.layers, model.heads, model.width) == (52, 12, 1536)
    assert model == dataclasses.replace(seven.model, layers=52, heads=12, width=1536)
    assert (task.batch, task.length, run.steps, run.target_valid) == (480, 1024, 20_344, None)
    assert (optim.kind, optim.lr, optim.embedding_lr, optim.betas) == (rule, 0.0009, 0.0018, (0.9, 0.95))
    assert (optim.weight_decay, optim.clip) == (0.0, None)
    if rule == "muon":
        assert optim.lr * 0.2 == pytest.approx(0.1 * 0.0018)
        assert (optim.adjust_lr_fn, optim.momentum) == ("match_rms_adamw", 0.95)
    rates = [optim.schedule(step, run.steps) for step in (0, 499, 14_532, 14_533, 20_343)]
    first = 1 if rule == "muon" else 1 / 500
    assert rates == pytest.approx([first, 1, 1, 5811 / 5812, 1 / 5812])
    assert task.valid_tokens == {"muon": 10_420_224, "adamw": 10_403_840}[rule]


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]().model.kind != "gpt"])
def test_a_transformer_in_place_of_a_recurrent_model_is_small(name):
    model = RECIPES[name]().replace(model="gpt").model
    model.check()
    assert sum(p.numel() for p in model.build(Interface(10, None, 10, "every")).parameters()) < 60_000
