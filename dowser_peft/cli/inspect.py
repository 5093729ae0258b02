"""``dowser-peft inspect``: what is in a file of probe statistics, or in an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from dowser_peft.cli.common import (
    AsJson,
    Debug,
    TrustRemoteCode,
    err,
    human_bytes,
    note,
    print_facts,
    print_json,
    print_table,
    short,
    shows_progress,
)

if TYPE_CHECKING:
    from dowser_peft import DowserConfig, ProbeStatistics
    from dowser_peft.cli.adapter_report import AdapterRow
    from dowser_peft.cli.statistics_report import StatisticsRow


def inspect(
    path: Annotated[
        str, typer.Argument(help="A file of probe statistics, or an adapter: folder or hub id.", metavar="PATH")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model. Of statistics: adds the scores, which need its weights. Of an adapter: where its "
            "configuration is, if not where the adapter says; tells the shapes of the layers.",
        ),
    ] = None,
    rho: Annotated[float, typer.Option(help="Where to cut the scores of statistics, in (0, 1].")] = 0.1,
    plot: Annotated[Path | None, typer.Option(help="Also draw a figure: out.png, .pdf or .svg.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what is in a file of probe statistics, or in an adapter.

    Statistics: how activations, sensitivities and (with --model) scores are spread, layer by layer. An adapter:
    how much of each module trains, how far it moved, and whether its mask gathers in few rows or columns; of an
    adapter with granularity 'column', how many columns train.

    Examples:

        dowser-peft inspect stats.safetensors --model ./model --plot scores.png
        dowser-peft inspect ./adapter --json
    """
    from dowser_peft import DowserConfig

    DowserConfig(rho=rho)  # checks it
    if plot is not None:
        from dowser_peft.cli.plotting import check_plot

        check_plot(plot)
    file = Path(path).expanduser()
    if file.is_file() and file.name not in ("adapter_config.json", "adapter_model.safetensors"):
        _inspect_statistics(file, model, rho, plot, trust_remote_code, as_json)
    else:
        _inspect_adapter(path, model, plot, trust_remote_code, as_json)


def _inspect_adapter(path: str, model: str | None, plot: Path | None, trust_remote_code: bool, as_json: bool) -> None:
    from dowser_peft.cli.adapter_report import adapter_rows, num_other_weights
    from dowser_peft.cli.models import ADAPTER_WEIGHTS, adapter_config, adapter_folder

    folder = adapter_folder(path)
    config = adapter_config(folder)
    rows = list(adapter_rows(folder, _base_shapes(config, model, trust_remote_code)))
    file_bytes = (folder / ADAPTER_WEIGHTS).stat().st_size
    trained = sum(row.trained for row in rows)
    total = None if any(row.total is None for row in rows) else sum(row.total or 0 for row in rows)
    by_column = any(row.columns is not None for row in rows)
    facts = {
        "path": path,
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "importance": config.importance,
        "estimator": config.estimator,
        "seed": config.seed,
        "granularity": config.granularity,
        "save_dtype": config.save_dtype,
        "trained": trained,
        "total": total,
        "rho": trained / total if total else None,
        "other_weights": num_other_weights(folder),
        "l2": sum(row.l2**2 for row in rows) ** 0.5,
        "max_abs": max(row.max_abs for row in rows),
        "file_bytes": file_bytes,
    }
    if plot is not None:
        from dowser_peft.cli.plotting import plot_adapter

        share = f" ({trained / total:.2%})" if total else ""
        plot_adapter(rows, f"Adapter {folder.resolve().name}: {trained:,} weights train{share}", plot)
    if as_json:
        modules = [dataclasses.asdict(row) | dataclasses.asdict(row.place) | {"rho": row.rho} for row in rows]
        for module in modules:
            del module["place"]
        print_json({"kind": "adapter", **facts, "modules": modules, "plot": str(plot) if plot else None})
        return
    print_facts(
        f"Adapter {path}",
        {
            "base model": f"{facts['base_model'] or 'not recorded'} (fingerprint {facts['base_fingerprint']})",
            "importance": f"{config.importance}, seed {config.seed}",
            "trained": f"{trained:,}"
            + (f" of {total:,}" if total else "")
            + f" weights in {len(rows)} modules"
            + (f": {trained / total:.4g}" if total else "")
            + (f", {sum(row.columns or 0 for row in rows):,} whole input columns" if by_column else "")
            + (f", and {facts['other_weights']:,} in full" if facts["other_weights"] else ""),
            "delta": f"L2 {short(facts['l2'])}, largest {short(facts['max_abs'])}",
            "file": f"{human_bytes(file_bytes)}, {file_bytes / trained:.3g} bytes per trained weight",
        }
        | ({"figure": str(plot)} if plot else {}),
    )
    _print_modules(rows)


def _base_shapes(config: DowserConfig, model: str | None, trust_remote_code: bool) -> Any:
    """The base model without weights; None, with a note, if the user did not name it and it is not at hand."""
    from dowser_peft.cli.models import base_source, meta_model

    try:
        return meta_model(base_source(config, model, trust_remote_code, "--model"))
    except (OSError, ValueError, ImportError) as error:
        if model is not None:
            raise
        note(f"what needs the shapes of the layers is left out, because the base model is not at hand ({error})")
        return None


def _print_modules(rows: list[AdapterRow]) -> None:
    has_rho = all(row.rho is not None for row in rows)
    by_column = any(row.columns is not None for row in rows)
    with_spread = all(row.in_fullest_rows is not None for row in rows)
    columns = (
        ["rho"] * has_rho + ["columns"] * by_column + ["trained", "L2", "max"] + ["rows10", "cols10"] * with_spread
    )

    def numbers(row: AdapterRow) -> list[str]:
        spread = [f"{row.in_fullest_rows:.0%}", f"{row.in_fullest_columns:.0%}"] if with_spread else []
        first = [short(row.rho or 0.0)] * has_rho + [f"{row.columns or 0:,}"] * by_column
        return [*first, f"{row.trained:,}", short(row.l2), short(row.max_abs), *spread]

    print_table("Trained weights per module", columns, ((row.place, numbers(row)) for row in rows))
    if with_spread:
        note(
            "rows10, cols10: share of the trained weights in the fullest 10 % of a layer's rows (outputs) and columns "
            "(inputs); 10 % is an even spread"
        )


def _inspect_statistics(
    file: Path, model: str | None, rho: float, plot: Path | None, trust_remote_code: bool, as_json: bool
) -> None:
    from dowser_peft import ProbeStatistics
    from dowser_peft.cli.models import Source, load_model
    from dowser_peft.cli.statistics_report import mask_error_fact, statistics_rows

    statistics = ProbeStatistics.load(file)
    loaded = load_model(Source(model, None, trust_remote_code)) if model is not None else None
    if loaded is not None:
        _warn_about_other_base(statistics, loaded)
    rows = list(
        track(
            statistics_rows(statistics, loaded, rho),
            "Scoring",
            total=len(statistics.module_names),
            console=err,
            transient=True,
            disable=loaded is None or not shows_progress(),
        )
    )
    if plot is not None:
        from dowser_peft.cli.plotting import plot_statistics

        size = f"N = {statistics.num_prompts}, R = {statistics.num_probes}"
        plot_statistics(rows, f"Probe statistics {file.name}: {len(rows)} modules, {size}", rho, plot)
    if as_json:
        facts = {
            field.name: getattr(statistics, field.name)
            for field in dataclasses.fields(statistics)
            if field.name not in ("activations", "sensitivities", "input_groups")
        }
        modules = [_statistics_entry(row) for row in rows]
        print_json(
            {
                "kind": "statistics",
                "path": str(file),
                "file_bytes": file.stat().st_size,
                "num_prompts": statistics.num_prompts,
                **facts,
                "rho": rho if loaded is not None else None,
                "modules": modules,
                "plot": str(plot) if plot else None,
            }
        )
        return
    averaged = " (means of four prompts)" if statistics.estimator == "mean_abs" else ""
    print_facts(
        f"Probe statistics {file}",
        {
            "modules": f"{len(rows)}, with {len(statistics.activations)} different inputs",
            "N": f"{statistics.num_prompts}{averaged}"
            + (f", of {statistics.prompt_length} tokens" if statistics.prompt_length else ""),
            "R": f"{statistics.num_probes} ({statistics.estimator})",
            **mask_error_fact(statistics),
            "source": f"{statistics.source}{' behind images' if statistics.images else ''}, seed {statistics.seed}",
            "fingerprint": statistics.fingerprint,
            "versions": ", ".join(f"{name} {number}" for name, number in statistics.versions.items()),
            "file": human_bytes(file.stat().st_size),
        }
        | ({"figure": str(plot)} if plot else {}),
    )
    _print_factors(rows)
    if loaded is not None:
        _print_scores(rows, rho)
    else:
        note("pass --model MODEL to see the scores as well: they need the weights")


def _warn_about_other_base(statistics: ProbeStatistics, model: Any) -> None:
    from dowser_peft.fingerprint import differs_from
    from dowser_peft.fused_experts import probed_layers

    modules = probed_layers(model, statistics.module_names)
    if modules is not None and differs_from(modules, statistics.fingerprint):
        note("this model has other weights than the one that was probed: its scores may mean little")


def _statistics_entry(row: StatisticsRow) -> dict[str, Any]:
    return {
        **dataclasses.asdict(row.place),
        "name": row.name,
        "shape": row.shape,
        "activation": row.activation,
        "sensitivity": row.sensitivity,
        "score": row.scores.quantiles | {"cut": row.scores.cut} if row.scores else None,
    }


def _print_factors(rows: list[StatisticsRow]) -> None:
    shown = ("p10", "median", "p90")
    print_table(
        "Activation |h| over inputs, sensitivity psi over outputs: 10 %, median, 90 %",
        ["|h| 10", "50", "90", "psi 10", "50", "90"],
        (
            (row.place, [short(factor[q]) for factor in (row.activation, row.sensitivity) for q in shown])
            for row in rows
        ),
    )


def _print_scores(rows: list[StatisticsRow], rho: float) -> None:
    print_table(
        f"Score S: 10 %, median, 90 %, largest, and the cut for rho = {rho:g}",
        ["S 10", "50", "90", "max", "cut"],
        (
            (row.place, [short(score) for score in (*row.scores.quantiles.values(), row.scores.cut)])
            for row in rows
            if row.scores is not None
        ),
    )
