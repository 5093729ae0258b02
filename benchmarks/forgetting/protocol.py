"""Which runs, in which order: an economical protocol for two cores.

The question for each method is how much it keeps of the old tasks once it has learned the new one, at its own best
learning rate, over several base models. Per method and task, with a constant budget of steps:

1. sweep: every rate of the method's grid on the first base model (pretraining seed), one fine-tuning seed. Where the
   best rate lies at an end of the grid, the grid grows by a factor of two, at most four times. Best is the highest
   H-score on the validation questions; test questions choose nothing.
2. transfer: the best rate and its two neighbours on the other base models. The rate with the best mean validation
   H-score over all base models is *chosen*.
3. completion: where the chosen rate is the lowest or highest that all base models tried, the next one, too; and on
   each base model a rate that is too low to learn the task, so that what is kept at one level of learning can be read.
4. repeats: the chosen rate with the other fine-tuning seeds on every base model.

Depth and rho take the best rate of the first base model alone to the others. Validation and test questions are drawn
separately from the same held-out items. Of lives, eats and spanish there are 30 items, and both splits ask all; of
successor, mirror, digit, parity, sort and larger 15 to 64 % of the validation questions are test questions, too; of
the other eight tasks, rename and style among them, none.

Post-merge methods share the full fine-tuning runs that they need: most of their rows cost the questions only. The
order is by what a row tells: the main methods on the relearning task come first on all base models, then the other
tasks, the ablations, depth and rho, and the repeats of each where its error bars are needed next. Whatever is
interrupted can be tabulated as it is, and goes on where it stopped.

Cost (``python -m benchmarks.forgetting STUDY --dry-run``), in core-hours on one thread each: 0.15 s a step and 12 s of
loading and questions, grids that do not grow, three base models and three fine-tuning seeds:

    main        rename 3.4   style 1.7   mirror 3.4
    ablations   rename 2.0   style 1.0   mirror 2.0    (beyond main, as depth and rho)
    depth       rename 1.8
    rho         rename 1.4
    all               16.7                             of the above; eight and a half hours on two free cores
    variants    rename 4.1   style 1.9   mirror 4.1
    decay       rename 5.1   style 2.4   mirror 5.1
    regimes     rename 5.1   style 2.4
    longer      rename 9.7   style 3.9   mirror 9.7
    harsh       rename 0.8   style 0.4   mirror 0.8
    larger      rename 5.9   style 2.8   mirror 5.9
    stability          0.3

plus 45 core-minutes of pretraining for each base model that is not there yet, and about three times as many, as it has
parameters, for each of the study ``larger``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from benchmarks.forgetting.methods import MASK_RATES, METHODS
from benchmarks.forgetting.miniature import STEPS
from benchmarks.forgetting.rows import FAILED, OK, Row, Run, run_of, summary
from benchmarks.forgetting.transforms import copying, rescaling

RHO = 0.1
RHOS = (0.01, 0.05, 0.25, 0.5)  # 0.1 is everywhere, 1 is full fine-tuning
DEPTHS = (1, 2, 4)  # and all eight
ITEMS = 200
EXTENSIONS = 4
MATCHED = 85.0  # downstream score at which upstream averages are compared
TOO_LOW = 80.0  # on the fewer validation questions; so that the test questions are below MATCHED, too
SECONDS_PER_STEP, SECONDS_PER_RUN = 0.15, 12.0
LARGE_COSTS = 3.3  # times as much: the ratio of the parameters

MAIN = [name for name, method in METHODS.items() if method.group in ("paper", "peft", "column")]
# |W| is missing: it trains the same weights as super-bottom.
ABLATIONS = [
    "dowser",
    *(name for name, method in METHODS.items() if method.group == "ablation" and name != "magnitude"),
]
VARIANTS = [name for name, method in METHODS.items() if method.group == "variant"]
MASKS = [
    name
    for name, method in METHODS.items()
    if method.rates == MASK_RATES and method.group not in ("variant", "decay") and name != "magnitude"
]
HARSH = MASK_RATES[-1]
DECAY = [name for name, method in METHODS.items() if method.group == "decay"]
IN_DEPTH = ["full", "grafting", "dare", "tailor", "half-way", "spider", "dowser", "lora", "super-bottom"]
IN_REGIMES = ["full", "dowser", "wanda", "magnitude", "random"]
REGIME_TASKS = ("style", "rename")
REGIMES = {"as it is": None, "sigma 1": rescaling(1), "sigma 2": rescaling(2), "copies": copying(4)}
IN_LONGER = ["full", "half-way", "dowser", "lora", "super-bottom", "random"]
IN_LONGER += ["dowser-decay-3", "dowser-decay-10", "full-decay-100"]
LONGER = 4  # times the usual number of steps
IN_LARGER = ["zero-shot", "full", "dowser", "dowser-decay-3", "dowser-decay-10", "super-bottom", "random", "lora"]
LARGE = "10M"
IN_RHO = ["grafting", "dare", "tailor", "dowser", "super-bottom", "random"]
QUICK = ["zero-shot", "full", "grafting", "half-way", "dowser", "lora", "random"]


@dataclass(frozen=True)
class Scope:
    """What a study ranges over."""

    tasks: tuple[str, ...] = tuple(STEPS)
    methods: tuple[str, ...] | None = None  # None: all of the study's
    pretraining_seeds: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    items: int = ITEMS

    def of(self, methods: list[str]) -> list[str]:
        """Those of ``methods`` that are wanted."""
        return [name for name in methods if name in (self.methods or methods)]


@dataclass(frozen=True)
class Stage:
    """A step of a study: ``runs(rows)`` says what it wants, given what is known; it is asked until nothing is new."""

    title: str
    runs: Callable[[list[Row]], list[Run]]


@dataclass(frozen=True)
class Case:
    """One curve: a method on a task at one rho and depth, on base models transformed in one way and of one size,
    trained for ``longer`` times the task's steps."""

    method: str
    task: str
    items: int
    rho: float = RHO
    depth: int | None = None
    transform: str | None = None
    longer: int = 1
    size: str | None = None

    def run(self, lr: float | None, pretraining_seed: int, seed: int) -> Run:
        """A run of this curve; what plays no part in the method is None, so that equal runs are equal."""
        method = METHODS[self.method]
        return Run(
            pretraining_seed=pretraining_seed,
            task=self.task,
            method=self.method,
            lr=lr,
            steps=self.longer * STEPS[self.task] if method.rates else 0,
            seed=seed if method.rates else 0,
            rho=self.rho if method.has_rho else None,
            depth=self.depth if method.rates else None,
            items=self.items,
            transform=self.transform,
            size=self.size,
        )

    def validation(
        self, rows: list[Row], pretraining_seed: int, seed: int, score: str = "h"
    ) -> dict[float | None, float]:
        """Validation H-score, or another ``score``, per learning rate that was tried; zero where the run diverged."""
        found = {}
        for row in rows:
            run = run_of(row)
            if row["status"] != FAILED and run == self.run(run.lr, pretraining_seed, seed):
                found[run.lr] = summary(row["validation"], run.task)[score] if row["status"] == OK else 0.0
        return found


def best_rate(scores: dict[float | None, float]) -> float | None:
    """The rate of the highest score, the lower of two equal ones."""
    return max(sorted(scores, key=lambda rate: rate or 0.0), key=lambda rate: scores[rate])


def chosen_rate(case: Case, rows: list[Row], scope: Scope) -> float | None:
    """The rate with the best mean validation H-score, of those tried on the most base models; None without any."""
    per_base = [case.validation(rows, base, scope.seeds[0]) for base in scope.pretraining_seeds]
    tried: dict[float | None, list[float]] = {}
    for scores in per_base:
        for rate, score in scores.items():
            tried.setdefault(rate, []).append(score)
    if not tried:
        return None
    most = max(map(len, tried.values()))
    return best_rate({rate: sum(found) / most for rate, found in tried.items() if len(found) == most})


def sweep(case: Case, rows: list[Row], scope: Scope) -> list[Run]:
    """All rates on the first base model, from the middle of the grid outwards; more where the best is at an end."""
    rates = METHODS[case.method].rates
    if not rates:
        return [case.run(None, base, 0) for base in scope.pretraining_seeds]
    scores = case.validation(rows, scope.pretraining_seeds[0], scope.seeds[0])
    wanted = sorted(rates, key=lambda rate: abs(rates.index(rate) - (len(rates) - 1) / 2))
    for _ in range(EXTENSIONS):
        if not set(wanted) <= set(scores):
            break
        best = best_rate({rate: scores[rate] for rate in wanted})
        if best == min(wanted):
            wanted.append(min(wanted) / 2)
        elif best == max(wanted):
            wanted.append(max(wanted) * 2)
    return [case.run(rate, scope.pretraining_seeds[0], scope.seeds[0]) for rate in wanted]


def transfer(case: Case, rows: list[Row], scope: Scope, neighbours: int = 1) -> list[Run]:
    """The best rate of the first base model and its neighbours there, on the other base models."""
    scores = case.validation(rows, scope.pretraining_seeds[0], scope.seeds[0])
    if not METHODS[case.method].rates or not scores:
        return []
    rates = sorted(scores, key=lambda rate: rate or 0.0)
    best = rates.index(best_rate(scores))
    near = rates[max(0, best - neighbours) : best + neighbours + 1]
    return [case.run(rate, base, scope.seeds[0]) for base in scope.pretraining_seeds[1:] for rate in near]


def completion(case: Case, rows: list[Row], scope: Scope) -> list[Run]:
    """On each base model a rate that learns less than ``TOO_LOW``, and the neighbour of a chosen rate that is the
    lowest or highest of those tried on all of them."""
    rates, seed = METHODS[case.method].rates, scope.seeds[0]
    learned = [case.validation(rows, base, seed, "downstream") for base in scope.pretraining_seeds]
    common = set.intersection(*map(set, learned))
    if not rates or not common:
        return []
    wanted = [
        (base, min(scores) / 2)
        for base, scores in zip(scope.pretraining_seeds, learned, strict=True)
        if scores[min(scores)] >= TOO_LOW
    ]
    chosen = chosen_rate(case, rows, scope)
    beyond = [chosen / 2] * (chosen == min(common)) + [chosen * 2] * (chosen == max(common))
    wanted += [(base, rate) for rate in beyond for base in scope.pretraining_seeds]
    lowest, highest = min(rates) / 2**EXTENSIONS, max(rates) * 2**EXTENSIONS
    return [case.run(rate, base, seed) for base, rate in wanted if lowest <= rate <= highest]


def repeats(case: Case, rows: list[Row], scope: Scope) -> list[Run]:
    """The chosen rate with the other fine-tuning seeds."""
    rate = chosen_rate(case, rows, scope)
    if rate is None:
        return []
    return [case.run(rate, base, seed) for base in scope.pretraining_seeds for seed in scope.seeds[1:]]


def _stage(title: str, cases: list[Case], step: Callable[[Case, list[Row]], list[Run]]) -> Stage:
    """One step for many cases: first wishes of all, then second ones; post-merge methods last, as they share runs."""

    def runs(rows: list[Row]) -> list[Run]:
        wishes = [
            (METHODS[case.method].after_full and case.method != "full", position, run)
            for case in cases
            for position, run in enumerate(step(case, rows))
        ]
        return list(dict.fromkeys(run for *_, run in sorted(wishes, key=lambda wish: wish[:2])))

    return Stage(title, runs)


def _study(name: str, cases: list[Case], scope: Scope, neighbours: int = 1) -> Iterator[Stage]:
    yield _stage(f"{name}: sweep", cases, lambda case, rows: sweep(case, rows, scope))
    if len(scope.pretraining_seeds) > 1:
        yield _stage(f"{name}: transfer", cases, lambda case, rows: transfer(case, rows, scope, neighbours))
        if neighbours:
            yield _stage(f"{name}: completion", cases, lambda case, rows: completion(case, rows, scope))


def _repeats(name: str, cases: list[Case], scope: Scope) -> Iterator[Stage]:
    if len(scope.seeds) > 1:
        yield _stage(f"{name}: repeats", cases, lambda case, rows: repeats(case, rows, scope))


def _cases(methods: list[str], task: str, scope: Scope) -> list[Case]:
    return [Case(name, task, scope.items) for name in scope.of(methods)]


def stages(study: str, scope: Scope) -> list[Stage]:
    """The stages of a study, in order."""
    return list(_STUDIES[study](scope))


def _main(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        yield from _study(f"main, {task}", _cases(MAIN, task, scope), scope)
    for task in scope.tasks:
        yield from _repeats(f"main, {task}", _cases(MAIN, task, scope), scope)


def _ablations(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        yield from _study(f"ablations, {task}", _cases(ABLATIONS, task, scope), scope)
        yield from _repeats(f"ablations, {task}", _cases(ABLATIONS, task, scope), scope)


def _variants(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        cases = _cases(["dowser", *VARIANTS], task, scope)
        yield from _study(f"variants, {task}", cases, scope)
        yield from _repeats(f"variants, {task}", cases, scope)


def _depth(scope: Scope) -> Iterator[Stage]:
    whole = _cases(IN_DEPTH, scope.tasks[0], scope)
    cases = whole + [replace(case, depth=depth) for depth in DEPTHS for case in whole]
    yield from _study(f"depth, {scope.tasks[0]}", cases, scope, neighbours=0)


def _rho(scope: Scope) -> Iterator[Stage]:
    usual = _cases(IN_RHO, scope.tasks[0], scope) + _cases(["full"], scope.tasks[0], scope)
    cases = usual + [replace(case, rho=rho) for rho in RHOS for case in usual if METHODS[case.method].has_rho]
    yield from _study(f"rho, {scope.tasks[0]}", cases, scope, neighbours=0)


def _regimes(scope: Scope) -> Iterator[Stage]:
    for task in [task for task in REGIME_TASKS if task in scope.tasks]:
        usual = _cases(IN_REGIMES, task, scope)
        cases = [replace(case, transform=transform) for transform in REGIMES.values() for case in usual]
        yield from _study(f"regimes, {task}", cases, scope)
        yield from _repeats(f"regimes, {task}", cases, scope)


def _decay(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        cases = _cases(DECAY, task, scope)
        yield from _study(f"decay, {task}", cases, scope)
        yield from _repeats(f"decay, {task}", cases, scope)


def _harsh(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        yield _stage(
            f"harsh, {task}",
            _cases(MASKS, task, scope),
            lambda case, rows: [case.run(HARSH, base, scope.seeds[0]) for base in scope.pretraining_seeds],
        )


def _longer(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        cases = [replace(case, longer=times) for times in (1, LONGER) for case in _cases(IN_LONGER, task, scope)]
        yield from _study(f"longer, {task}", cases, scope)
        yield from _repeats(f"longer, {task}", cases, scope)


def _larger(scope: Scope) -> Iterator[Stage]:
    for task in scope.tasks:
        cases = [replace(case, size=LARGE) for case in _cases(IN_LARGER, task, scope)]
        yield from _study(f"larger, {task}", cases, scope)
        yield from _repeats(f"larger, {task}", cases, scope)


def _all(scope: Scope) -> Iterator[Stage]:
    first, others = scope.tasks[0], scope.tasks[1:]
    for task in scope.tasks:
        yield from _study(f"main, {task}", _cases(MAIN, task, scope), scope)
    yield from _study(f"ablations, {first}", _cases(ABLATIONS, first, scope), scope)
    yield from _repeats(f"main, {first}", _cases(MAIN, first, scope), scope)
    yield from _depth(scope)
    yield from _rho(scope)
    for task in others:
        yield from _repeats(f"main, {task}", _cases(MAIN, task, scope), scope)
    yield from _repeats(f"ablations, {first}", _cases(ABLATIONS, first, scope), scope)
    for task in others:
        yield from _study(f"ablations, {task}", _cases(ABLATIONS, task, scope), scope)
        yield from _repeats(f"ablations, {task}", _cases(ABLATIONS, task, scope), scope)


def _quick(scope: Scope) -> Iterator[Stage]:
    cases = _cases(QUICK, "style", scope)

    def second_rate(case: Case, rows: list[Row]) -> list[Run]:
        return [case.run((METHODS[case.method].rates or (None, None))[1], 0, 0)]

    yield _stage("quick look", cases, second_rate)


_STUDIES: dict[str, Callable[[Scope], Iterator[Stage]]] = {
    "main": _main,
    "ablations": _ablations,
    "variants": _variants,
    "depth": _depth,
    "rho": _rho,
    "regimes": _regimes,
    "longer": _longer,
    "larger": _larger,
    "decay": _decay,
    "harsh": _harsh,
    "all": _all,
    "quick": _quick,
}
STUDIES = [name for name in _STUDIES if name != "quick"]


def estimates(runs: list[Run], known: Iterable[Run]) -> list[float]:
    """Seconds of each of ``runs`` on one core, in their order, after those that are ``known``.

    The first post-merge method to need a full fine-tuning run pays for it, unless full fine-tuning itself was there.
    """
    trained = {_training(run) for run in known}
    found = []
    for run in runs:
        is_new = _training(run) not in trained
        trained.add(_training(run))
        seconds = SECONDS_PER_RUN + (SECONDS_PER_STEP * run.steps if is_new else 0.0)
        found.append(seconds * (LARGE_COSTS if run.size else 1.0))
    return found


def _training(run: Run) -> Run:
    """What is trained for a run: full fine-tuning for all post-merge methods."""
    return replace(run, method="full", rho=None) if METHODS[run.method].after_full else run


def dry_run(study: str, scope: Scope) -> list[tuple[str, int, float]]:
    """Title, new runs and core-hours of each stage, if every grid keeps its best rate inside."""
    rows: list[Row] = []
    table = []
    for stage in stages(study, scope):
        known = {run_of(row) for row in rows}
        new = [run for run in stage.runs(rows) if run not in known]
        rows += [_imagined(run) for run in new]
        table.append((stage.title, len(new), sum(estimates(new, known)) / 3600))
    return table


def _imagined(run: Run) -> Row:
    """A row as a run would leave it whose second rate is the best."""
    rates = METHODS[run.method].rates
    good = 90.0 if not rates or run.lr == rates[1] else 50.0
    return {**vars(run), "status": OK, "validation": {"old": good, run.task: good}}
