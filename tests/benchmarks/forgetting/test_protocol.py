"""The protocol on imagined rows: which runs it wants next."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.forgetting import protocol
from benchmarks.forgetting.methods import METHODS
from benchmarks.forgetting.protocol import Case, Scope
from benchmarks.forgetting.rows import DIVERGED, OK, run_of

SCOPE = Scope(tasks=("style",))
CASE = Case("dowser", "style", 200)
RATES = METHODS["dowser"].rates


def _row(case, lr, base, h, seed=0, status=OK):
    """A row whose validation H-score is ``h``."""
    run = case.run(lr, base, seed)
    return {**dataclasses.asdict(run), "status": status, "validation": {"old": h, "style": h}}


def _rows(case, scores, base=0):
    return [_row(case, lr, base, h) for lr, h in scores.items()]


def _rates(runs):
    return sorted(run.lr for run in runs)


def test_what_plays_no_part_is_left_out_of_a_run():
    assert Case("full", "style", 200, rho=0.5).run(1e-4, 0, 0) == Case("full", "style", 200).run(1e-4, 0, 0)
    zero_shot = Case("zero-shot", "style", 200, depth=2).run(None, 1, 2)
    assert (zero_shot.seed, zero_shot.steps, zero_shot.depth, zero_shot.rho) == (0, 0, None, None)


def test_a_sweep_starts_with_the_middle_of_the_grid():
    runs = protocol.sweep(CASE, [], SCOPE)
    assert [run.lr for run in runs] == [RATES[1], RATES[2], RATES[0], RATES[3]]
    assert {(run.pretraining_seed, run.seed) for run in runs} == {(0, 0)}


def test_a_sweep_ends_where_the_best_rate_is_inside():
    rows = _rows(CASE, dict(zip(RATES, (50, 80, 70, 10), strict=True)))
    assert _rates(protocol.sweep(CASE, rows, SCOPE)) == sorted(RATES)


def test_a_sweep_follows_the_best_rate_at_most_four_times():
    scores = dict(zip(RATES, (50, 60, 70, 80), strict=True))
    grown = [RATES[-1] * 2**doublings for doublings in range(1, 5)]
    for rate, score in zip(grown, (81, 82, 83, 84), strict=True):
        assert max(_rates(protocol.sweep(CASE, _rows(CASE, scores), SCOPE))) == rate
        scores[rate] = score
    assert max(_rates(protocol.sweep(CASE, _rows(CASE, scores), SCOPE))) == grown[-1]
    scores = dict(zip(RATES, (80, 70, 60, 50), strict=True))
    assert min(_rates(protocol.sweep(CASE, _rows(CASE, scores), SCOPE))) == RATES[0] / 2


def test_a_rate_that_diverged_is_the_worst():
    diverged = _row(CASE, RATES[3], 0, 0, status=DIVERGED)
    del diverged["validation"]
    rows = [*_rows(CASE, dict(zip(RATES[:3], (50, 60, 70), strict=True))), diverged]
    assert CASE.validation(rows, 0, 0)[RATES[3]] == 0.0
    assert max(_rates(protocol.sweep(CASE, rows, SCOPE))) == RATES[3]


def test_transfer_takes_the_best_rate_and_its_neighbours():
    rows = _rows(CASE, dict(zip(RATES, (50, 80, 70, 10), strict=True)))
    runs = protocol.transfer(CASE, rows, SCOPE)
    assert {(run.pretraining_seed, run.lr) for run in runs} == {(base, lr) for base in (1, 2) for lr in RATES[:3]}
    assert {run.lr for run in protocol.transfer(CASE, rows, SCOPE, neighbours=0)} == {RATES[1]}
    assert protocol.transfer(CASE, [], SCOPE) == []


def test_the_chosen_rate_is_the_best_on_average_of_those_tried_everywhere():
    rows = _rows(CASE, dict(zip(RATES, (50, 80, 70, 99), strict=True)))
    rows += _rows(CASE, {RATES[0]: 40, RATES[1]: 50, RATES[2]: 90}, base=1)
    assert protocol.chosen_rate(CASE, rows, Scope(pretraining_seeds=(0, 1))) == RATES[2]  # 80 against 65
    assert protocol.chosen_rate(CASE, rows[:4], Scope(pretraining_seeds=(0, 1))) == RATES[3]
    assert protocol.chosen_rate(CASE, [], SCOPE) is None


def test_completion_goes_on_where_the_chosen_rate_is_the_last_that_all_base_models_tried():
    scope = dataclasses.replace(SCOPE, pretraining_seeds=(0, 1))
    first = _rows(CASE, dict(zip(RATES, (10, 20, 70, 60), strict=True)))
    inside = first + _rows(CASE, dict(zip(RATES[1:], (20, 70, 60), strict=True)), base=1)
    assert protocol.completion(CASE, inside, scope) == []
    high = first + _rows(CASE, {RATES[1]: 20, RATES[2]: 80}, base=1)
    assert [(run.pretraining_seed, run.lr) for run in protocol.completion(CASE, high, scope)] == [
        (0, RATES[3]),
        (1, RATES[3]),
    ]
    low = first + _rows(CASE, {RATES[2]: 80, RATES[3]: 60}, base=1)
    assert {run.lr for run in protocol.completion(CASE, low, scope)} == {RATES[1]}
    assert protocol.completion(CASE, first, scope) == []  # nothing was transferred yet


def test_completion_asks_for_a_rate_that_learns_too_little():
    scope = dataclasses.replace(SCOPE, pretraining_seeds=(0, 1))
    rows = _rows(CASE, dict(zip(RATES, (10, 86, 90, 60), strict=True)))
    rows += _rows(CASE, {RATES[1]: 88, RATES[2]: 95, RATES[3]: 70}, base=1)  # too high a rate learns too little, too
    assert protocol.completion(CASE, rows, scope) == [CASE.run(RATES[0], 1, 0)]
    lowest = RATES[0] / 2**protocol.EXTENSIONS
    rows += _rows(CASE, {lowest: 88}, base=1)
    assert protocol.completion(CASE, rows, scope) == []  # there the grid ends
    assert protocol.completion(Case("zero-shot", "style", 200), [], scope) == []


def test_every_mask_has_the_harsh_rate_on_every_base_model():
    (stage,) = protocol.stages("harsh", SCOPE)
    wanted = {(run.method, run.pretraining_seed) for run in stage.runs([])}
    assert wanted == {(name, base) for name in protocol.MASKS for base in (0, 1, 2)}
    assert {"dowser", "shira", "dowser-column", "highest"} <= set(protocol.MASKS)
    assert {run.lr for run in stage.runs([])} == {RATES[-1]}


def test_repeats_are_the_other_seeds_at_the_chosen_rate():
    rows = [row for base in (0, 1, 2) for row in _rows(CASE, {RATES[0]: 40, RATES[1]: 80}, base)]
    runs = protocol.repeats(CASE, rows, SCOPE)
    assert {(run.pretraining_seed, run.seed, run.lr) for run in runs} == {
        (base, seed, RATES[1]) for base in (0, 1, 2) for seed in (1, 2)
    }


def test_rows_of_other_settings_do_not_count():
    others = [dataclasses.replace(CASE, **change) for change in ({"rho": 0.5}, {"depth": 2}, {"items": 50})]
    rows = [row for case in others for row in _rows(case, {RATES[0]: 99.0})]
    assert CASE.validation(rows, 0, 0) == {}


def test_the_longer_study_has_both_lengths():
    scope = Scope(tasks=("style",), pretraining_seeds=(0,), seeds=(0,), methods=("dowser",))
    wanted = [run for stage in protocol.stages("longer", scope) for run in stage.runs([])]
    assert {run.steps for run in wanted} == {100, 400} and len(wanted) == 2 * len(RATES)


def test_post_merge_methods_come_behind_the_runs_they_share():
    runs = protocol.stages("main", SCOPE)[0].runs([])
    shares = [METHODS[run.method].after_full and run.method != "full" for run in runs]
    assert shares == sorted(shares) and any(shares)
    assert [run.method for run in runs[:2]] == ["zero-shot", "full"]


def test_the_first_to_need_a_full_run_pays_for_it():
    run, step = protocol.SECONDS_PER_RUN, protocol.SECONDS_PER_STEP
    first, second, other, full = (
        Case(method, "style", 200).run(lr, 0, 0)
        for method, lr in (("grafting", 8e-4), ("dare", 8e-4), ("dare", 1e-4), ("full", 8e-4))
    )
    assert protocol.estimates([first, second, other], []) == [run + 100 * step, run, run + 100 * step]
    assert protocol.estimates([first, second, full], [full]) == [run, run, run]
    adapters = [Case(method, "style", 200).run(1e-3, 0, 0) for method in ("dowser", "random", "zero-shot")]
    assert protocol.estimates(adapters, []) == [run + 100 * step, run + 100 * step, run]


def test_every_study_covers_its_methods():
    wanted = {
        study: {run.method for stage in protocol.stages(study, Scope()) for run in stage.runs([])}
        for study in protocol.STUDIES
    }
    assert wanted["variants"] == {"dowser", *protocol.VARIANTS}
    assert wanted["decay"] == set(protocol.DECAY)
    others = {"magnitude", *protocol.VARIANTS, *protocol.DECAY}  # |W|: the same weights as super-bottom
    assert wanted["all"] == set(METHODS) - others
    assert wanted["main"] | wanted["ablations"] == wanted["all"]
    assert "full" in wanted["rho"] and "full" in wanted["depth"]
    assert wanted["larger"] == set(protocol.IN_LARGER)


def test_larger_base_models_take_longer():
    runs = [run for stage in protocol.stages("larger", Scope()) for run in stage.runs([])]
    assert {run.size for run in runs} == {protocol.LARGE}
    cost = protocol.estimates(runs[-1:], []), protocol.estimates([dataclasses.replace(runs[-1], size=None)], [])
    assert cost[0][0] == protocol.LARGE_COSTS * cost[1][0]


def test_the_most_telling_runs_come_first():
    titles = [stage.title for stage in protocol.stages("all", Scope())]
    assert titles[:2] == ["main, rename: sweep", "main, rename: transfer"]
    assert titles.index("main, rename: repeats") < titles.index("depth, rename: sweep")
    assert titles[-1] == "ablations, mirror: repeats"


def test_methods_can_be_left_out():
    scope = dataclasses.replace(SCOPE, methods=("dowser", "lora"))
    assert {run.method for run in protocol.stages("main", scope)[0].runs([])} == {"dowser", "lora"}


def test_the_quick_look_is_short():
    runs = protocol.stages("quick", Scope())[0].runs([])
    assert sum(protocol.estimates(runs, [])) < 200
    assert {run.task for run in runs} == {"style"}
    assert len(runs) == len(protocol.QUICK)


def test_the_dry_run_counts_each_run_once():
    table = protocol.dry_run("main", dataclasses.replace(SCOPE, methods=("dowser", "grafting", "full", "zero-shot")))
    assert [count for _, count, _ in table] == [3 + 3 * 4, 3 * 2 * 3, 0, 3 * 6]
    seconds = 18 * (protocol.SECONDS_PER_RUN + 100 * protocol.SECONDS_PER_STEP)
    assert table[3][2] == pytest.approx(seconds / 3600)  # grafting at a rate of its own


def test_a_dry_run_and_the_real_one_want_the_same():
    """Played through with imagined rows every stage comes to rest, after as many runs as the dry run says."""
    scope, rows, counts = Scope(tasks=("style",)), [], []
    for stage in protocol.stages("all", scope):
        before = len(rows)
        for _ in range(5):
            known = {run_of(row) for row in rows}
            new = [run for run in stage.runs(rows) if run not in known]
            if not new:
                break
            rows += [protocol._imagined(run) for run in new]
        else:
            pytest.fail(f"{stage.title} never ends")
        counts.append(len(rows) - before)
    assert counts == [count for _, count, _ in protocol.dry_run("all", scope)]
