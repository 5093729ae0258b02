"""Tables and figures from made-up rows, with numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from benchmarks.forgetting import curves, report, rows, stability
from benchmarks.forgetting.methods import MASK_RATES
from benchmarks.forgetting.protocol import Case, Scope, chosen_rate
from benchmarks.forgetting.rows import DIVERGED, OK
from dowser_peft.miniature import UPSTREAM


def _row(method, lr, upstream, downstream, base=0, seed=0, validation=None, task="style", **options):
    run = Case(method, task, 200, **options).run(lr, base, seed)
    scores = {**dict.fromkeys(UPSTREAM, upstream), task: downstream}
    checked = dict.fromkeys(scores, validation if validation is not None else 50.0)
    return {**dataclasses.asdict(run), "status": OK, "test": scores, "validation": checked}


# The best H of the test questions is at 1e-3, that of the validation questions at 2e-3.
SWEEP = [
    _row("dowser", 1e-3, 99.0, 80.0, validation=40.0),
    _row("dowser", 2e-3, 80.0, 90.0, validation=70.0),
    _row("dowser", 4e-3, 50.0, 95.0, validation=60.0),
]


def _points(*points):
    return pd.DataFrame([{"lr": 10.0**i, "downstream": d, "upstream": u} for i, (d, u) in enumerate(points)])


def test_upstream_at_matched_downstream_by_hand():
    """From (60, 90) to (90, 80), 85 lies five sixths of the way: 90 - 5/6 * 10."""
    assert curves.upstream_at(_points((60, 90), (90, 80), (95, 50)), 85) == pytest.approx(90 - 50 / 6)
    assert curves.upstream_at(_points((90, 70), (95, 60)), 85) == 70
    assert curves.upstream_at(_points((20, 99), (80, 90)), 85) is None
    assert curves.upstream_at(_points((90, 60), (80, 95)), 85) == pytest.approx(77.5)  # learned less at a higher rate


def test_matched_is_over_base_models_on_which_runs_learned_less_and_more():
    """On base 0 half of the way from (80, 99) to (90, 80)."""
    others = [_row("dowser", 1e-3, 70.0, 86.0, base=1), _row("dowser", 1e-3, 99.0, 10.0, base=2)]
    found = curves.matched(curves.curve(curves.frame(SWEEP + others), "dowser", "style"))
    assert found.to_dict() == {0: pytest.approx(89.5)}
    others.append(_row("dowser", 5e-4, 90.0, 66.0, base=1))
    found = curves.matched(curves.curve(curves.frame(SWEEP + others), "dowser", "style"))
    assert found.to_dict() == {0: pytest.approx(89.5), 1: pytest.approx(71.0)}


def test_the_chosen_rate_is_that_of_the_validation_questions():
    chosen = curves.at_chosen_rate(curves.curve(curves.frame(SWEEP), "dowser", "style"))
    assert chosen["lr"].tolist() == [2e-3]


def test_a_model_that_collapses_at_a_high_rate_has_not_been_tried_at_a_low_one():
    found = [_row("dowser", 1e-3, 70.0, 86.0), _row("dowser", 2e-3, 50.0, 99.0), _row("dowser", 4e-3, 9.0, 9.0)]
    assert curves.matched(curves.curve(curves.frame(found), "dowser", "style")).empty


def test_a_level_that_is_never_crossed():
    high, low = [_row("random", 1e-3, 70.0, 86.0)], [_row("random", 1e-3, 70.0, 84.0)]
    assert "| 1 | reached by every rate |" in report.main_table(high, "style", "ablation")
    assert "| 1 | not reached |" in report.main_table(low, "style", "ablation")


def test_masks_at_one_rate_on_all_tasks():
    found = [
        _row(name, 4e-3, upstream + 10 * base, 90.0, base=base, task=task)
        for task in ("rename", "style")
        for base in (0, 1)
        for name, upstream in (("dowser", 50.0), ("wanda", 49.0 + 3 * base))
    ]
    shown = report.harsh_table([*found, _row("random", 4e-3, 10.0, 90.0)])
    assert "| Dowser | 55.0 ± 7.1 | 55.0 ± 7.1 |  |" in shown
    assert "(without J) | +0.5 ± 2.1 | +0.5 ± 2.1 | 2 of 4 |" in shown
    assert "Random" not in shown  # one task alone
    without_dowser = report.harsh_table([row for row in found if row["method"] != "dowser"])
    assert "| Dowser |  |  |  |" in without_dowser and "nan" not in without_dowser


def test_depth_and_rho_stand_at_the_best_rate_of_the_first_base_model():
    """There 2e-3 is best, on average 1e-3: of which nothing is known at other depths."""
    found = [*SWEEP, *(_row("dowser", lr, 60.0, 60.0, base=1, validation=v) for lr, v in ((1e-3, 99.0), (2e-3, 9.0)))]
    found += [_row("dowser", 2e-3, 0.0, 0.0, seed=1), _row("dowser", 1e-3, 66.0, 66.0, depth=2)]
    found += [_row("dowser", 1e-3, 55.0, 55.0, rho=0.5)]
    runs = curves.curve(curves.frame(found), "dowser", "style")
    assert set(curves.at_chosen_rate(runs)["lr"]) == {1e-3}
    assert set(curves.at_first_rate(runs)["lr"]) == {2e-3} and set(curves.at_first_rate(runs)["seed"]) == {0}
    expected = "70.0 ± 14.1 / 72.4 ± 17.5 |"
    assert f"|  | 66.0 / 66.0 |  | {expected}" in report.depth_table(found, "style")
    assert f"| Dowser |  |  | {expected}" in report.rho_table(found, "style")


def test_report_and_protocol_choose_the_same_rate():
    found = [*SWEEP, *(_row("dowser", lr, 9.0, 9.0, base=1, validation=v) for lr, v in ((1e-3, 90.0), (2e-3, 30.0)))]
    chosen = curves.at_chosen_rate(curves.curve(curves.frame(found), "dowser", "style"))
    scope = Scope(tasks=("style",), pretraining_seeds=(0, 1))
    assert set(chosen["lr"]) == {chosen_rate(Case("dowser", "style", 200), found, scope)} == {1e-3}


def test_runs_of_other_numbers_of_questions_are_left_out():
    runs = curves.frame([*SWEEP, {**SWEEP[0], "items": 60}])
    assert len(curves.curve(runs, "dowser", "style")) == 3
    assert len(curves.curve(runs, "dowser", "style", 60)) == 1


def test_main_table_by_hand():
    """Two base models at the chosen rate: downstream 90 and 80, upstream 80 and 70, H 84.7 and 74.7."""
    shown = report.main_table([*SWEEP, _row("dowser", 2e-3, 70.0, 80.0, base=1, validation=70.0)], "style")
    (line,) = [line for line in shown.splitlines() if line.startswith("| Dowser")]
    assert line == "| Dowser | 0.002 | 85.0 ± 7.1 | 75.0 ± 7.1 | 79.7 ± 7.1 |  | 2 | 89.5 (1) |"


def test_differences_to_dowser_are_of_the_same_base_model_and_seed():
    """On base 0 H is 84.7 against 80 of full fine-tuning; base 1 has no row of it, and its seed 1 none of Dowser's."""
    found = [*SWEEP, _row("dowser", 2e-3, 70.0, 70.0, base=1, validation=70.0)]
    found += [_row("full", 1e-4, 80.0, 80.0), _row("full", 1e-4, 10.0, 10.0, seed=1)]
    line = next(line for line in report.main_table(found, "style").splitlines() if line.startswith("| Full"))
    assert line.split(" | ")[5] == "-4.7"


def test_weight_decay_is_compared_with_the_same_method_without():
    """H is 84.7 without, 80 with."""
    found = [*SWEEP, _row("full", 1e-4, 70.0, 70.0), _row("dowser-decay-10", 2e-3, 80.0, 80.0)]
    found.append(_row("full-decay-30", 2e-4, 75.0, 75.0))
    lines = {
        line.split(" | ")[0]: line.split(" | ")[4:7]
        for line in report.main_table(found, "style", "decay").splitlines()
    }
    assert lines["| Dowser, decay 10"] == ["80.0", "-4.7", "-4.7"]
    assert lines["| Full fine-tuning, decay 30"] == ["75.0", "-9.7", "+5.0"]
    assert lines["| Dowser"][1:] == ["", ""]


def test_each_group_has_a_table_of_its_own_with_full_fine_tuning_and_dowser():
    found = [*SWEEP, _row("full", 1e-4, 70.0, 70.0), _row("exact", 1e-3, 70.0, 70.0)]
    assert [group for group in report.GROUPS if report.has_group(found, "style", group)] == ["variant"]
    first = [line.split(" | ")[0] for line in report.main_table(found, "style", "variant").splitlines()[2:]]
    assert first == ["| Full fine-tuning", "| Dowser", "| Exact score"]
    assert not report.has_group(found, "rename", "variant")


def test_masks_at_the_same_rate_are_of_the_first_base_model_and_where_it_is_too_high_of_all():
    """At 4e-3 the random mask keeps 5 more than Dowser on base 0 and 15 less on base 1."""
    found = [_row("dowser", rate, 90.0, 10.0 * n) for n, rate in enumerate(MASK_RATES)]
    found += [_row("dowser", MASK_RATES[-1], 60.0, 90.0, base=1), _row("dowser", MASK_RATES[0], 11.0, 11.0, base=1)]
    found += [_row("random", rate, 95.0, 50.0) for rate in MASK_RATES]
    found += [_row("random", MASK_RATES[-1], 45.0, 90.0, base=1)]
    found += [_row("highest", MASK_RATES[0], 50.0, 50.0)]  # not at every rate
    assert report.rates_table(found, "style").splitlines()[2:] == [
        "| Dowser | 0 / 90 | 10 / 90 | 20 / 90 | 30 / 90 | 75.0 ± 21.2 (2) |  |",
        "| Random mask | 50 / 95 | 50 / 95 | 50 / 95 | 50 / 95 | 70.0 ± 35.4 (2) | -5.0 ± 14.1 |",
    ]


def test_labels_with_bars_stay_in_their_cell():
    shown = report.main_table([_row("super-top", 1e-3, 70.0, 70.0)], "style")
    assert r"| Super-Tuning (largest \|W\|) | 0.001 |" in shown


def test_the_table_by_old_task_has_no_column_of_another_new_task():
    shown = report.task_table([*SWEEP, _row("dowser", 2e-3, 70.0, 80.0, task="rename")], "style")
    assert shown.splitlines()[0] == f"|  | {' | '.join(UPSTREAM)} |"


def test_a_method_without_rate_has_a_line():
    shown = report.main_table([_row("zero-shot", None, 97.0, 0.0)], "style")
    assert "| Zero-shot |  | 0.0 | 97.0 | 0.0 |  | 1 |  |" in shown


def test_a_run_that_diverged_scores_nothing():
    run = Case("dowser", "style", 200).run(1e-1, 0, 0)
    runs = curves.frame([*SWEEP, {**dataclasses.asdict(run), "status": DIVERGED, "error": ""}])
    assert runs.loc[runs["lr"] == 1e-1, ["downstream", "upstream", "h"]].to_numpy().tolist() == [[0.0, 0.0, 0.0]]


def test_rho_and_depth_are_curves_of_their_own():
    found = [*SWEEP, _row("dowser", 1e-3, 77.0, 77.0, rho=0.25), _row("dowser", 1e-3, 66.0, 66.0, depth=2)]
    assert len(curves.curve(curves.frame(found), "dowser", "style")) == 3
    full = _row("full", 1e-4, 60.0, 60.0)
    assert "| Dowser |  |  | 80.0 / 84.7 | 77.0 / 77.0 |  | 60.0 / 60.0 |" in report.rho_table([*found, full], "style")
    assert "| Dowser |  | 66.0 / 66.0 |  | 80.0 / 84.7 |" in report.depth_table(found, "style")


def test_longer_training_is_a_curve_of_its_own_of_the_same_base_models():
    found = [*SWEEP, _row("dowser", 5e-4, 60.0, 60.0, longer=4)]
    assert len(curves.curve(curves.frame(found), "dowser", "style")) == 3
    found.append(_row("dowser", 2e-3, 10.0, 10.0, base=1, validation=70.0))
    found.append(_row("dowser", 2e-3, 10.0, 10.0, seed=1))
    expected = "| Dowser | 0.002 | 90.0 / 80.0 / 84.7 | 0.0005 | 60.0 / 60.0 / 60.0 | 1 |"
    assert expected in report.longer_table(found, "style")
    assert expected not in report.longer_table(SWEEP, "style")


def test_other_coordinates_are_compared_on_the_same_base_models():
    found = [*SWEEP, _row("dowser", 2e-3, 10.0, 10.0, base=1, validation=70.0)]
    found += [_row("dowser", 1e-3, 70.0, 70.0, transform="rescale-2")]
    found += [_row("random", 1e-3, 50.0, 50.0, transform="rescale-2")]
    shown = report.regimes_table(found, "style")
    assert "| Dowser | 80.0 / 84.7 |  | 70.0 / 70.0 |  |" in shown
    assert "| Random mask |  |  | 50.0 / 50.0 / -20.0 |  |" in shown


def test_larger_base_models_are_a_curve_and_a_table_of_their_own():
    found = [*SWEEP, _row("dowser", 1e-3, 70.0, 70.0, size="10M"), _row("lora", 1e-3, 50.0, 50.0, size="10M")]
    assert len(curves.curve(curves.frame(found), "dowser", "style")) == 3
    shown = report.larger_table(found, "style")
    assert "| Dowser | 80.0 / 84.7 | 70.0 / 70.0 |" in shown
    assert "| LoRA r=8 |  | 50.0 / 50.0 / -20.0 |" in shown
    assert "| Zero-shot |  | 90.0 / 0.0 |" in report.larger_table(
        [*found, _row("zero-shot", None, 90.0, 0.0, size="10M")], "style"
    )


def test_full_fine_tuning_belongs_to_every_rho():
    runs = curves.frame([_row("full", 1e-4, 70.0, 90.0)])
    assert len(curves.curve(runs, "full", "style", rho=0.5)) == 1


def test_everything_is_written_from_rows_alone(tmp_path):
    path = tmp_path / "runs.jsonl"
    methods = [("full", 1e-4), ("lora", 1e-3), ("super-bottom", 1e-3), ("random", 1e-3), ("zero-shot", None)]
    found = [*SWEEP, *(_row(name, lr, 70.0, 80.0) for name, lr in methods)]
    found += [_row("dowser", 1e-3, 77.0, 77.0, rho=0.25), _row("dowser", 1e-3, 66.0, 66.0, depth=2)]
    found += [_row("dowser", 1e-3, 66.0, 66.0, longer=4), _row("dowser", 1e-3, 66.0, 66.0, size="10M")]
    rows.append(found, path)
    kinds = [("synthetic", 4, 8), ("synthetic", 64, 8), ("magnitude", 0, 0)]
    rows.append(
        [
            {"source": kind, "num_prompts": n, "num_probes": r, "spearman": 0.9, "hamming": 0.05, "seed": seed}
            for kind, n, r in kinds
            for seed in (0, 1)
        ],
        tmp_path / "stability.jsonl",
    )
    report.write(path)
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {
        f"{name}.png" for name in ("pareto-style", "radar-style", "depth-style", "rho-style", "stability")
    }
    text = (tmp_path / "tables.md").read_text()
    assert "| magnitude |  |  | 0.900 ± 0.000 | 0.050 ± 0.000 | 2 |" in text
    assert all(f"## {title}" in text for title in ("Depth", "Update ratio", "Longer training", "Larger base models"))


def test_rows_of_real_models_and_of_the_miniature_have_one_page(tmp_path):
    """Named by either file."""
    rows.append(SWEEP, tmp_path / "runs.jsonl")
    (tmp_path / "real.jsonl").write_text("")
    report.write(tmp_path / "runs.jsonl")
    expected = (tmp_path / "tables.md").read_text()
    assert "| Dowser | 80 |" in expected
    report.write(tmp_path / "real.jsonl")
    assert (tmp_path / "tables.md").read_text() == expected


def test_the_committed_tables_are_of_the_committed_rows():
    found = report.page(rows.read(), stability.RESULTS)
    assert (rows.RESULTS.parent / "tables.md").read_text().startswith(found)
