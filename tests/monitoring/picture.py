"""Draws dashboards as PNG: their panels, queries, units, colours and thresholds from the JSON, the data from a
Prometheus. For pages that show what a dashboard looks like; Grafana itself draws more, and finer."""

import datetime
import io
import math
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates
import matplotlib.pyplot as plt
import matplotlib.ticker
from matplotlib.patches import FancyBboxPatch
from PIL import Image

import dashboards

WIDTH, UNIT, GAP, HEAD = 1480, 32, 8, 54  # pixels: the page, a line of the grid, between panels, above all
PAGE, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2b2f36", "#ccccdc", "#8e929c"
# Grafana's names of colours, and the order in which it gives them out.
COLORS = {"green": "#73bf69", "red": "#f2495c", "yellow": "#fade2a", "blue": "#5794f2", "orange": "#ff9830",
          "purple": "#b877d9", "light-blue": "#8ab8ff", "dark-orange": "#fa6400", "light-orange": "#ffb357",
          "dark-blue": "#1f60c4", "dark-yellow": "#e0b400"}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d"]


def color(name):
    return COLORS.get(name, name)


def plain(value, digits):
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled(value, steps, digits):
    for size, unit in steps:
        if abs(value) >= size:
            return plain(value / size, digits) + unit
    return plain(value, digits)


def write(value, unit, decimals=None):
    """A number as Grafana writes it."""
    if not math.isfinite(value):
        return "-"
    digits = 1 if decimals is None else decimals
    if unit == "percentunit":
        return f"{value * 100:.{digits}f}%"
    if unit == "s":
        if value == 0:
            return "0 s"
        if abs(value) < 1:
            return f"{value * 1000:.3g} ms"
        return scaled(value, ((3600, " h"), (60, " min"), (1, " s")), max(digits, 1))
    if unit in ("bytes", "Bps"):
        tail = "/s" if unit == "Bps" else ""
        return scaled(value, ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B")), 1) + tail
    return scaled(value, ((1e6, " M"), (1e3, " K")), digits)


def label(legend, metric):
    return re.sub(r"{{(\w+)}}", lambda name: metric.get(name[1], ""), legend)


class Page:
    """One dashboard being drawn."""

    def __init__(self, stack, board, start, end, interval):
        self.stack, self.board, self.start, self.end, self.interval = stack, board, start, end, interval
        lines = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
        self.height = HEAD + lines * UNIT + GAP
        self.figure = plt.figure(figsize=(WIDTH / 100, self.height / 100), dpi=100, facecolor=PAGE)

    def query(self, target):
        span = f"{int(self.end - self.start)}s"
        expression = dashboards.fill_in(self.board, target["expr"], self.interval, span)
        step = max(1, round((self.end - self.start) / 400))
        data = self.stack.api("query_range", query=expression, start=self.start, end=self.end, step=step)["result"]
        for series in sorted(data, key=lambda one: label(target["legendFormat"], one["metric"])):
            yield label(target["legendFormat"], series["metric"]), [(t, float(v)) for t, v in series["values"]]

    def box(self, place):
        """Where a panel lies: left, bottom, width, height in pixels."""
        column = (WIDTH - GAP) / 24
        left, width = GAP + place["x"] * column, place["w"] * column - GAP
        top, height = HEAD + place["y"] * UNIT, place["h"] * UNIT - GAP
        return left, self.height - top - height, width, height

    def axes(self, left, bottom, width, height):
        return self.figure.add_axes((left / WIDTH, bottom / self.height, width / WIDTH, height / self.height), zorder=3)

    def say(self, x, y, text, size, color, **rest):
        self.figure.text(x / WIDTH, y / self.height, text, fontsize=size, color=color, family="DejaVu Sans", **rest)

    def panel(self, panel):
        left, bottom, width, height = self.box(panel["gridPos"])
        if panel["type"] == "row":
            self.say(left + 2, bottom + 5, "⌄  " + panel["title"], 10, TEXT, weight="bold")
            return
        self.figure.add_artist(FancyBboxPatch(
            (left / WIDTH, bottom / self.height), width / WIDTH, height / self.height,
            boxstyle="square,pad=0", facecolor=PANEL, edgecolor=EDGE, linewidth=0.8))
        self.say(left + 10, bottom + height - 19, panel["title"], 9, TEXT, weight="medium")
        draw = {"stat": self.stat, "timeseries": self.lines, "table": self.table}[panel["type"]]
        draw(panel, left, bottom, width, height)

    def stat(self, panel, left, bottom, width, height):
        defaults = panel["fieldConfig"]["defaults"]
        values = [points[-1][1] for target in panel["targets"] for _, points in self.query(target)]
        value = values[0] if values else math.nan
        shade = [step["color"] for step in defaults["thresholds"]["steps"]
                 if step["value"] is None or value >= step["value"]][-1]
        self.say(left + width / 2, bottom + height / 2 - 12, write(value, defaults["unit"], defaults.get("decimals")),
                 25, color(shade), ha="center", va="center", weight="medium")

    def lines(self, panel, left, bottom, width, height):
        defaults, custom = panel["fieldConfig"]["defaults"], panel["fieldConfig"]["defaults"]["custom"]
        fixed = {one["matcher"]["options"]: one["properties"][0]["value"]["fixedColor"]
                 for one in panel["fieldConfig"]["overrides"]}
        axes = self.axes(left + 58, bottom + 44, width - 74, height - 76)
        series = [one for target in panel["targets"] for one in self.query(target)]
        if len(series) > 6:
            # What there is most of comes first, so that the legend has room for it.
            series.sort(key=lambda one: -sum(value for _, value in one[1] if math.isfinite(value)))
        shades = [color(fixed.get(name, PALETTE[at % len(PALETTE)])) for at, (name, _) in enumerate(series)]
        moments = sorted({t for _, points in series for t, _ in points})
        days = [datetime.datetime.fromtimestamp(t, datetime.timezone.utc) for t in moments]
        base, top = [0.0] * len(moments), 0.0
        for (_, points), shade in zip(series, shades):
            at = dict(points)
            values = [at.get(t, math.nan) for t in moments]
            if custom["stacking"]["mode"] == "normal":
                raised = [below + (0 if math.isnan(value) else value) for below, value in zip(base, values)]
                axes.fill_between(days, base, raised, color=shade, alpha=custom["fillOpacity"] / 100, linewidth=0)
                axes.plot(days, raised, color=shade, linewidth=0.9)
                base = raised
                top = max([top, *raised])
            else:
                axes.fill_between(days, values, color=shade, alpha=custom["fillOpacity"] / 100, linewidth=0)
                axes.plot(days, values, color=shade, linewidth=1.4)
                top = max([top, *(v for v in values if math.isfinite(v))])
        unit = defaults["unit"]
        top = min(top, 1.0) if unit == "percentunit" else top
        for step in defaults["thresholds"]["steps"][1:]:
            if custom["thresholdsStyle"]["mode"] == "dashed" and step["value"] <= top * 1.5:
                axes.axhline(step["value"], color=color(step["color"]), linewidth=1, linestyle=(0, (5, 4)))
                top = max(top, step["value"])
        axes.set_ylim(0, top * 1.12 if top else 1)
        axes.set_xlim(*(datetime.datetime.fromtimestamp(t, datetime.timezone.utc) for t in (self.start, self.end)))
        ticks = matplotlib.ticker.MaxNLocator(4, integer=unit == "short" and top >= 2)
        if unit in ("bytes", "Bps") and top:
            ticks = matplotlib.ticker.MultipleLocator(2 ** math.ceil(math.log2(top / 4)))
        axes.yaxis.set_major_locator(ticks)
        digits = 0 if unit == "percentunit" else None
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: write(value, unit, digits)))
        minutes = next(n for n in (1, 2, 5, 10, 15, 30, 60, 180) if (self.end - self.start) / 60 / n < width / 90)
        axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(minutes / 24 / 60))
        axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
        axes.set_facecolor(PANEL)
        axes.grid(color="#262a30", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, labelsize=7.5, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        self.legend([(name, shade) for (name, _), shade in zip(series, shades)], left, bottom, width)

    def legend(self, entries, left, bottom, width):
        x = left + 12
        for at, (name, shade) in enumerate(entries):
            needed = 28 + 5.6 * len(name)
            if x + needed > left + width - 24 and at + 1 < len(entries):
                self.say(x, bottom + 9, f"+{len(entries) - at}", 7.5, FAINT)
                return
            self.figure.add_artist(plt.Line2D([x / WIDTH, (x + 12) / WIDTH], [(bottom + 13) / self.height] * 2,
                                              color=shade, linewidth=3))
            self.say(x + 17, bottom + 9, name, 7.5, TEXT)
            x += needed

    def table(self, panel, left, bottom, width, height):
        defaults = panel["fieldConfig"]["defaults"]
        rows = [(points[-1][1], name) for target in panel["targets"] for name, points in self.query(
            target | {"legendFormat": " ".join("{{" + word + "}}" for word in ("environment", "status", "syscall"))})]
        y = bottom + height - 46
        for value, name in sorted(rows, reverse=True)[: int((height - 40) // 20)]:
            self.say(left + 14, y, name.strip(), 8.5, TEXT)
            self.say(left + width - 14, y, write(value, defaults["unit"], defaults.get("decimals")), 8.5, TEXT, ha="right")
            y -= 20

    def png(self):
        self.say(GAP + 4, self.height - 34, self.board["title"], 13, TEXT, weight="bold")
        moments = [datetime.datetime.fromtimestamp(t, datetime.timezone.utc) for t in (self.start, self.end)]
        span = f"{moments[0]:%H:%M:%S} to {moments[1]:%H:%M:%S}"
        self.say(WIDTH - GAP - 4, self.height - 33, span, 9, FAINT, ha="right")
        for panel in self.board["panels"]:
            self.panel(panel)
        raw = io.BytesIO()
        self.figure.savefig(raw, format="png", facecolor=PAGE)
        plt.close(self.figure)
        # Few colours, so that a page that shows it loads fast.
        small = io.BytesIO()
        Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        return small.getvalue()


def draw(stack, uid, start, end, interval):
    """One dashboard, as it looked from `start` to `end`."""
    return Page(stack, dashboards.load()[uid], start, end, interval).png()
