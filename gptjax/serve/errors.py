"""Errors in the shape of OpenAI's interface."""

from __future__ import annotations

from typing import Any

from gptjax.types import UserError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> type; other 4xx are "invalid_request_error", 5xx "server_error"."""


class ApiError(Exception):
    """An error to tell the client. retry_after: seconds until it is worth to try again."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = 1 if retry_after is None and status in (429, 503) else retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        if self.status in (408, 413):  # the rest of the body is not waited for
            return {"connection": "close"}
        if self.status == 504:  # it would take as long again; OpenAI's clients would try
            return {"x-should-retry": "false"}
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode("utf-8", "replace").decode()  # half a surrogate pair of the client's is not UTF-8
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def of_user_error(error: UserError) -> ApiError:
    """A mistake in a request. Its message begins with the name of the field."""
    message = str(error).removeprefix("body: ")
    field, _, rest = message.partition(": ")
    param = field if rest and field.isidentifier() else None
    too_long = param in ("max_tokens", "messages", "prompt") and "context" in rest
    return ApiError(400, message, param, "context_length_exceeded" if too_long else None)
