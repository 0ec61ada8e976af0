"""A report as HTML: its table for notebooks, and a page of its own."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ocs.report.text import RIGHT_ALIGNED, cells_of, columns_of, summary_of

if TYPE_CHECKING:
    from ocs.report.data import Report


def report_table(report: Report) -> str:
    """Write the table of a report, with its summary below."""
    columns = columns_of(report)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = []
    for layer, cells in zip(report.layers, cells_of(report, columns), strict=True):
        style = "" if layer.status == "quantized" else ' style="color:#777"'
        rows.append(f"<tr{style}>{''.join(map(_cell, columns, cells))}</tr>")
    return (
        f'<table style="border-collapse:collapse" border="1" cellpadding="4"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table><p>{escape(summary_of(report))}</p>"
    )


def report_page(report: Report) -> str:
    """Write a page that holds the table and nothing else."""
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ocs report</title></head>'
    return f'{head}<body style="font-family:sans-serif">{report_table(report)}</body></html>\n'


def _cell(column: str, text: str) -> str:
    align = ' style="text-align:right"' if column in RIGHT_ALIGNED else ""
    return f"<td{align}>{escape(text)}</td>"
