"""Structured output: texts held to a JSON schema, a regular expression, a grammar or a choice, token by token.

    constraint = engine.constraint(JsonSchema({"type": "object", "properties": {"age": {"type": "integer"}}}))
    engine.submit(Request(prompt, constraint=constraint))

A `Grammar` says which texts are allowed; a `Compiler` makes it a `Constraint` for one tokenizer.
"""

from gptjax.inference.constraints.compiler import Compiler as Compiler
from gptjax.inference.constraints.constraint import Constraint as Constraint
from gptjax.inference.constraints.constraint import Matcher as Matcher
from gptjax.inference.constraints.grammars import Choice as Choice
from gptjax.inference.constraints.grammars import Compound as Compound
from gptjax.inference.constraints.grammars import Ebnf as Ebnf
from gptjax.inference.constraints.grammars import Grammar as Grammar
from gptjax.inference.constraints.grammars import JsonSchema as JsonSchema
from gptjax.inference.constraints.grammars import Regex as Regex
