"""A model's own way of writing calls of tools and its reasoning: its replies are taken apart, as they come.

    form = reply_format(template.source, tokenizer)
    reader = form.reader(tools=True, thinking=form.thinking(prompt, tokenizer))
    delta = reader.feed("<tool_call>...")        # content, reasoning, calls; all deltas together are the message
    delta = reader.close()

One file per format of calls; `TOOLS` has them by name.
"""

from gptjax.inference.formats.choose import TOOLS as TOOLS
from gptjax.inference.formats.choose import ReplyFormat as ReplyFormat
from gptjax.inference.formats.choose import marks as marks
from gptjax.inference.formats.choose import reply_format as reply_format
from gptjax.inference.formats.reader import CallDelta as CallDelta
from gptjax.inference.formats.reader import Delta as Delta
from gptjax.inference.formats.reader import Reader as Reader
from gptjax.inference.formats.reasoning import Reasoning as Reasoning
from gptjax.inference.formats.tool_format import ToolFormat as ToolFormat
