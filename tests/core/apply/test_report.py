"""The report as a person reads it."""

from __future__ import annotations

from html.parser import HTMLParser

from optkit.apply.report import TableRow, render_html, table_rows

METRICS = {
    "size_bytes": {
        "unit": "B", "baseline": 540e6, "value": 135e6, "ratio": {"value": 0.25, "low": 0.25, "high": 0.25},
        "verdict": "better",
    },
    "decode_tokens_per_second": {
        "unit": "tok/s", "baseline": 10.0, "value": 51.23, "ratio": {"value": 5.1, "low": 4.9, "high": 5.34},
        "verdict": "better",
    },
    "perplexity": {
        "unit": "", "baseline": 22.1, "value": 22.3, "ratio": {"value": 1.009, "low": 1.004, "high": 1.013},
        "verdict": "equivalent",
    },
    "kl": {
        "unit": "nat", "baseline": 0.0, "value": 0.01234, "ratio": None,
        "interval": {"value": 0.01234, "low": 0.011, "high": 0.0135},
    },
    "ttft_ms": {"unit": "ms", "withheld": "<b>1 < 2</b>"},
}  # fmt: skip


def test_rows():
    assert table_rows(METRICS) == [
        TableRow("size_bytes", "540.0 MB", "135.0 MB", "0.25x", "better"),
        TableRow("decode_tokens_per_second", "10 tok/s", "51.23 tok/s", "5.1x [4.9, 5.34]", "better"),
        TableRow("perplexity", "22.1", "22.3", "1.0090x [1.004, 1.013]", "equivalent"),
        TableRow("kl", "0 nat", "0.01234 nat", "[0.011, 0.0135]", ""),
        TableRow("ttft_ms", "", "", "<b>1 < 2</b>", "withheld"),
    ]


class Page(HTMLParser):
    """The text of a page, and what it refers to."""

    def __init__(self):
        super().__init__()
        self.text, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())


def test_the_page_shows_the_same_escaped_and_without_references():
    page = Page()
    page.feed(
        render_html(
            {
                "name": "<script>",
                "metrics": METRICS,
                "gates": [{"passed": True, "message": "kl & more"}, {"passed": False, "message": "size"}],
                "lowering": {"weights:int4": {"kernel": "<kernel>", "native": False}},
                "measured": "2026-01-01T00:00:00+00:00",
                "machine": {"cpu": "x86 & co", "cores": 2, "libraries": {"torch": "2.13.0"}},
            }
        )
    )
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "kernel", "link", "img", "iframe"})
    assert not [attributes for _, attributes in page.tags if attributes.keys() & {"src", "href"}]
    for row in table_rows(METRICS):
        for cell in (row.metric, row.baseline, row.value, row.change, row.verdict):
            assert cell in page.text
    for text in ("passed: kl & more", "FAILED: size", "weights:int4: <kernel> (dequantized)"):
        assert text in page.text
    assert any("x86 & co, 2 cores" in text for text in page.text)
