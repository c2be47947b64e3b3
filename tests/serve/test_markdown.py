"""Markdown as HTML: a model's words can only be read, and a text that grows is rendered as it is in one go."""

import random
import time

import pytest

from gptjax.serve.markdown import blocks, render

TEXT = r"""# Title
Some *text* with `code`, $x^2$ and \(y_i\), for $5 and $6.

Setext
===
| a | b |
|:--|--:|
| 1 | 2 |

- one
- two

  of it
3. three

```python
def f(x):

    return "a"  # a
```
> quoted

$$
\begin{aligned} a &= b \\ c &= d \end{aligned}
- z
$$
\[ \int_0^1 x \, dx \]
and
\[
a
- b
\]

[ref]: https://example.org
see [ref], 你好，世界
"""
HOSTILE = r"""<script>alert(1)</script><img src=x onerror=alert(1)>
<style>*{display:none}</style><svg onload=alert(1)>

![picture](https://evil.example/x.png) [run](javascript:alert(1)) [go](/page/replies) [in](data:text/html,x)
[z](https://ok.example "t" onmouseover=alert(1)) <javascript:alert(1)> [v](VBscript:x)

$\text{<img src=x onerror=alert(1)>}$ $\href{javascript:alert(1)}{x}$ $\style{color:red}{x}$

```"><script>alert(1)</script>
</code></pre><script>alert(1)</script>
```
<form action=/page/markdown><input></form><iframe src=https://evil.example></iframe><math><mtext><style><img src=x>
"""


def test_blocks_are_those_of_the_whole_text():
    whole = render(TEXT)
    joined = "".join(whole)
    for found in (
        "<h1>Title</h1>",
        "<em>text</em>",
        '<th class="right">b</th>',
        '<ol start="3">',
        "<msup>",
        "$5 and $6",
    ):
        assert found in joined
    for found in ('<span class="k">def</span>', 'data-language="python"', "<mtable>", "∫", "<mo>−</mo>", "你好，世界"):
        assert found in joined
    assert '<a href="https://example.org"' in joined
    for seed in range(20):
        draw, growing, pieces, at = random.Random(seed), blocks(), [], 0
        while at < len(TEXT):
            size = draw.randint(1, 12)
            pieces += growing.feed(TEXT[at : at + size])
            at += size
        assert pieces + growing.feed("", last=True) == whole
        assert growing.rest == ""


def test_finished_blocks_come_before_the_text_ends():
    growing = blocks()
    assert growing.feed("# A\nSome") == ["<h1>A</h1>\n"]
    assert (growing.feed(" text\n\n- a\n"), growing.rest) == (["<p>Some text</p>\n"], "- a\n")
    assert growing.feed("```\nx = [\n") == ["<ul>\n<li>a</li>\n</ul>\n"]
    assert growing.feed("1]\n```\n") == ['<pre data-language=""><code>x = [\n1]\n</code></pre>\n']


def test_hostile_text_stays_text():
    joined = "".join(render(HOSTILE))
    for tag in ("<script", "<img", "<svg", "<style", "<form", "<input", "<iframe", "<object"):
        assert tag not in joined.lower()
    assert 'href="https://evil.example/x.png"' in joined, "an image is a link"
    links = joined.split("href=")[1:]
    assert all(link.startswith(('"https://', '"http://')) for link in links)
    assert "onerror=" not in joined.replace("&lt;img src=x onerror=", "")
    assert " style=" not in joined


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "a\n" * 6_000, "- a\n" * 3_000, "> " * 9_000, f"${'{' * 1_990}$", "```\n" + "x = 1\n" * 20_000],
    ids=lambda text: text[:4].strip(),
)
def test_no_text_takes_long(text):
    started, growing = time.process_time(), blocks()
    made = [html for at in range(0, len(text), 50) for html in growing.feed(text[at : at + 50])]
    made += growing.feed("", last=True)
    assert made
    assert time.process_time() - started < 5
