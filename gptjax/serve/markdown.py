"""Markdown to HTML that can only be read: no scripts, styles, images or forms, and no links but to other sites.

render("# Title\\n\\nSome *text*")            # ["<h1>Title</h1>\\n", "<p>Some <em>text</em></p>\\n"]
growing = blocks()
growing.feed("# Title\\n\\nSome *te")        # ["<h1>Title</h1>\\n"]

markdown-it-py parses CommonMark with tables, Pygments highlights code, latex2mathml makes MathML of formulas, and nh3
removes every element and attribute that is not listed here.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from gptjax.serve.blocks import Blocks, grammar

LIMIT, CODE_LIMIT = 10_000, 200_000
"""Maximum characters of a block, and of one of code, that is rendered; longer ones are shown as they are. There are
texts, such as a row of opening brackets, whose parsing takes time quadratic in their length."""
FORMULA = 2_000
"""Maximum characters of a formula that is converted."""
TEXT = "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"
MATH = (
    "math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd "
    "mtext mtr munder munderover"
)
ATTRIBUTES = {
    "a": {"href"},
    "code": {"class"},
    "div": {"class"},
    "math": {"display", "alttext"},
    "mo": {"stretchy", "fence", "form", "minsize", "maxsize"},
    "mspace": {"width", "linebreak"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mtd": {"columnalign"},
    "ol": {"start"},
    "pre": {"data-language"},
    "span": {"class"},
    "td": {"class"},
    "th": {"class"},
}
SCHEMES = ("https://", "http://", "mailto:")


def render(text: str) -> list[str]:
    """The HTML of each block of a text."""
    return blocks().feed(text, last=True)


def blocks() -> Blocks[str]:
    """The HTML of each block of a text that grows."""
    return Blocks(_render)


def _render(block: str, links: dict[str, Any]) -> str:
    limit = CODE_LIMIT if block.lstrip().startswith(("```", "~~~")) else LIMIT
    made = _parser().render(block, links) if len(block) <= limit else f"<pre>{html.escape(block)}</pre>"
    return nh3.clean(
        made,
        tags=_TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_attribute,
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer nofollow",
    )


_TAGS = set(f"{TEXT} {MATH}".split())


def _attribute(element: str, name: str, value: str) -> str | None:
    """The value, or None to remove the attribute. Links within this site could ask it for something."""
    return value if name != "href" or value.lower().startswith(SCHEMES) else None


@functools.cache
def _parser() -> MarkdownIt:
    parser = grammar()
    dollarmath_plugin(parser, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    parser.disable("math_block")  # `grammar` has its own
    parser.inline.ruler.before("escape", "bracket_math", _bracket_inline)
    for kind in ("math_inline", "math_inline_double", "math_block"):
        parser.add_render_rule(kind, _formula)
    for kind, rule in (("fence", _code), ("code_block", _code), ("image", _image)):
        parser.add_render_rule(kind, rule)
    for kind in ("th_open", "td_open"):
        parser.add_render_rule(kind, _cell)
    return parser


_BRACKETS = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def _bracket_inline(state: StateInline, silent: bool) -> bool:
    r"""\( x \) and, within a paragraph, \[ x \]."""
    found = _BRACKETS.match(state.src, state.pos)
    if found and not silent:
        token = state.push("math_inline" if found[1] else "math_inline_double", "math", 0)
        token.content = found[1] or found[2]
    state.pos = found.end() if found else state.pos
    return found is not None


def _code(self: Any, tokens: Sequence[Token], i: int, options: Any, links: Any) -> str:
    code, name = tokens[i].content, tokens[i].info.split(maxsplit=1)[0] if tokens[i].info.strip() else ""
    try:
        shown = highlight(code, get_lexer_by_name(name), HtmlFormatter(nowrap=True)) if name else html.escape(code)
    except ClassNotFound:
        shown = html.escape(code)
    return f'<pre data-language="{html.escape(name)}"><code>{shown}</code></pre>\n'


def _image(self: Any, tokens: Sequence[Token], i: int, options: Any, links: Any) -> str:
    """A link in place of the image: nothing is loaded from elsewhere unasked."""
    source = str(tokens[i].attrs.get("src", ""))
    return f'<a href="{html.escape(source)}">{html.escape(tokens[i].content or source)}</a>'


def _cell(self: Any, tokens: Sequence[Token], i: int, options: Any, links: Any) -> str:
    side = str(tokens[i].attrs.get("style", "")).removeprefix("text-align:")
    return f'<{tokens[i].tag} class="{html.escape(side)}">' if side else f"<{tokens[i].tag}>"


def _formula(self: Any, tokens: Sequence[Token], i: int, options: Any, links: Any) -> str:
    source, block = tokens[i].content.strip(), tokens[i].type != "math_inline"
    try:
        if len(source) > FORMULA:
            raise ValueError("too long")
        math = convert(source.replace("{aligned}", "{align*}"), display="block" if block else "inline")
        shown = math.replace("<math ", f'<math alttext="{html.escape(source)}" ', 1)
    except Exception:  # latex2mathml raises errors of many kinds for what it cannot read, RecursionError among them
        shown = f'<code class="math">{html.escape(source)}</code>'
    tag = "div" if tokens[i].type.startswith("math_block") else "span"
    return f'<{tag} class="math">{shown}</{tag}>'
