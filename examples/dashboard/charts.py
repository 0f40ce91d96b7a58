"""Bar charts as SVG images, which pygal draws on the server."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pygal
from pygal.style import Style

BLUE, LIGHT_BLUE = "#2f6fdb", "#a9c6f7"
RESULT_COLORS = {
    "success": "#2f9e6e",
    "pending": "#94a3b8",
    "partial": "#e2b93b",
    "failure": "#e8833a",
    "error": "#d64550",
}
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# XML 1.0 cannot contain these characters, not even escaped.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def starts(since: datetime, step: timedelta) -> list[datetime]:
    """Return the starts of all hours or days (UTC) from `since` until now."""
    first = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if step == DAY:
        first = first.replace(hour=0)
    return [first + step * n for n in range((datetime.now(UTC) - first) // step + 1)]


def over_time(times: Sequence[datetime], series: Mapping[str, Mapping[datetime, int]]) -> str:
    """Draw one bar for each time, with one part for each series, and return a data URI."""
    hourly = len(times) > 1 and times[1] - times[0] == HOUR
    chart = pygal.StackedBar(
        **_options([RESULT_COLORS.get(name, BLUE) for name in series], height=240),
        show_legend=len(series) > 1,
        margin_bottom=34 if len(series) > 1 else 8,
        truncate_label=-1,
        x_labels=[f"{time:%H:%M}" if hourly else f"{time.day} {time:%b}" for time in times],
        x_labels_major_every=max(1, len(times) // 8),
        show_minor_x_labels=False,
    )
    totals = [sum(counts.get(time, 0) for counts in series.values()) for time in times]
    chart.range = (0, max(4, *totals))  # a lower range has fractions as labels
    for name, counts in series.items():
        chart.add(name, [counts.get(time, 0) for time in times])
    return _image(chart)


def ranking(counts: Iterable[tuple[str, int]]) -> str:
    """Draw one horizontal bar for each name, longest bar first, and return a data URI."""
    bars = list(counts)[::-1]
    chart = pygal.HorizontalBar(
        **_options([LIGHT_BLUE], height=60 + 34 * len(bars)),
        show_legend=False,
        x_labels=[_UNPRINTABLE.sub("\ufffd", name) for name, _ in bars],
        truncate_label=24,
        print_values=True,
    )
    chart.add("", [count for _, count in bars])
    return _image(chart)


def _options(colors: Sequence[str], *, height: int) -> dict[str, object]:
    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground="#64748b",
        foreground_strong="#334155",
        foreground_subtle="#dbe2ea",
        guide_stroke_color="#dbe2ea",
        major_guide_stroke_color="#dbe2ea",
        guide_stroke_dasharray="0",
        major_guide_stroke_dasharray="0",
        colors=tuple(colors),
        opacity="1",
        font_family=_FONT,
        label_font_size=13,
        major_label_font_size=13,
        value_font_size=13,
        legend_font_size=13,
        no_data_font_size=16,
    )
    return {
        "style": style,
        "js": [],  # pygal's default scripts are on another host
        "width": 900,
        "height": height,
        "margin": 8,
        "spacing": 14,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": 5,
        "legend_box_size": 11,
        "rounded_bars": 2,
        "min_scale": 2,
        "max_scale": 4,
        "value_formatter": lambda count: f"{count:,.0f}",
        "no_data_text": "no data",
    }


def _image(chart: pygal.Graph) -> str:
    uri: str = chart.render_data_uri()
    return uri
