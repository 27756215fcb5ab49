#!/usr/bin/env python3
"""Write the Grafana dashboards of role ``vllm_monitoring`` from this one source.

Usage: ``tools/dashboards.py`` writes ``roles/vllm_monitoring/files/dashboards/*.json``; ``tools/dashboards.py --check``
writes nothing and exits 1 where a file is not what it would write. What the panels show is in
``dashboard_serving.py`` and ``dashboard_engines.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboard_engines import GPUS, INSTANCE
from dashboard_panels import TAG, Board, Panel, Table, Tiles, Timeline
from dashboard_serving import GATEWAY, OVERVIEW

DIRECTORY = Path(__file__).resolve().parent.parent / "roles/vllm_monitoring/files/dashboards"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Grafana's grid has 24 columns.
HEIGHTS = {Tiles: 4, Timeline: 7, Table: 7, Panel: 8}
# One builder each; they share no type in the library.
Builder = stat.Panel | statetimeline.Panel | table.Panel | timeseries.Panel


def targets(panel: Panel) -> Iterator[prometheus.Dataquery]:
    """One query for each line of a panel, with the identifiers A, B, C, ..."""
    for index, (legend, expr) in enumerate(panel.queries.items()):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + index)).datasource(SOURCE)
        if isinstance(panel, Table):
            query.instant().format(PromQueryFormat.TABLE)
        elif isinstance(panel, Tiles):
            query.instant()
        else:
            query.range()
        yield query


def empty(panel: Panel) -> Builder:
    """The builder of this kind of panel, with what only this kind has."""
    if isinstance(panel, Tiles):
        return (
            stat.Panel()
            .color_mode(common.BigValueColorMode.BACKGROUND if panel.thresholds else common.BigValueColorMode.NONE)
            .graph_mode(common.BigValueGraphMode.NONE)
            .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
            .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        )
    if isinstance(panel, Timeline):
        return statetimeline.Panel().legend(VizLegendOptions().show_legend(False)).row_height(0.8)
    if isinstance(panel, Table):
        columns = models.DataTransformerConfig(
            id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": panel.columns}
        )
        rows = table.Panel().show_header(True).with_transformation(columns)
        for column, unit in panel.units.items():
            # By column: a unit of time for all would be tried on words too.
            rows.override_by_name(column, [models.DynamicConfigValue(id_val="unit", value=unit)])
        return rows
    lines = (
        timeseries.Panel()
        .fill_opacity(10)
        .show_points(common.VisibilityMode.NEVER)
        .legend(VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM))
        .tooltip(VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .min(0)
        .stacking(StackingConfig().mode(common.StackingMode.NORMAL if panel.stacked else common.StackingMode.NONE))
    )
    if panel.thresholds:
        lines.thresholds_style(GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED))
    return lines


def built(panel: Panel, number: int) -> Builder:
    """A panel, ready for its dashboard."""
    builder = empty(panel)
    builder.id(number).title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    builder.height(HEIGHTS[type(panel)]).span(panel.width)
    for target in targets(panel):
        builder.with_target(target)
    if panel.maximum is not None:
        builder.max(panel.maximum)
    steps = [models.Threshold(value=value, color=colour) for value, colour in panel.thresholds.items()]
    if steps:
        builder.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.words:
        results = {
            str(value): models.ValueMappingResult(text=word, color=colour, index=index)
            for index, (value, (word, colour)) in enumerate(panel.words.items())
        }
        builder.mappings([models.ValueMap(options=results)])
    return builder


def variables(board: Board) -> Iterator[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    """The choices at the top: the Prometheus, and what its series can be narrowed down to."""
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    for name, series in board.variables.items():
        yield (
            dashboard.QueryVariable(name)
            .label(name)
            .datasource(SOURCE)
            .query(f"label_values({series}, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            # All, also where the label is absent.
            .all_value(".*")
            .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
        )


def rendered(board: Board) -> str:
    """A dashboard as the file that Grafana reads."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .timezone("browser")
        .refresh("30s")
        .time("now-3h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("vLLM")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for variable in variables(board):
        builder.with_variable(variable)
    number = 0
    for title, panels in board.rows.items():
        number += 1
        builder.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            builder.with_panel(built(panel, number))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def files() -> dict[Path, str]:
    """Every file with its content."""
    return {DIRECTORY / f"{board.uid}.json": rendered(board) for board in (OVERVIEW, INSTANCE, GPUS, GATEWAY)}


def main() -> None:
    """Write the files, or only say which are stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a file is stale")
    arguments = parser.parse_args()
    stale = {
        path: text for path, text in files().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    }
    if arguments.check and stale:
        sys.exit(f"dashboards: {', '.join(sorted(path.name for path in stale))}: stale; run tools/dashboards.py")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
