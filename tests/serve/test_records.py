"""Records of a server: metrics that Prometheus can read, and an audit log without a word of what was said."""

import json
import stat
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_serve import TALK, Server

from gptjax.serve.access import Policy
from gptjax.serve.audit import AuditLog
from gptjax.serve.keys import Keys
from gptjax.types import UserError

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(file):
    server = Server(policy=Policy(keys=Keys(others=["root"]), audit=AuditLog(file)))
    yield server
    server.close()


def post(server, path=CHAT, **body):
    headers = {"authorization": "Bearer root", "x-request-id": "theirs"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def lines(file, count):
    """The log's last lines, which are written after the reply."""
    deadline = time.monotonic() + 5
    while (written := file.read_text()).count("\n") < count or not written.endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [json.loads(line) for line in written.splitlines()][-count:]


def test_the_audit_log_says_who_asked_and_how_much(server, file):
    usage = post(server, messages=TALK, max_tokens=7, n=2).json()["usage"]
    post(server, messages=TALK, max_tokens=7, n=2, stream=True)
    page = post(server, "/page/replies", messages=TALK, max_tokens=3).json()
    httpx.get(f"{server.url}/page/replies/{page['id']}", headers={"authorization": "Bearer root"}, timeout=60)
    httpx.post(server.url + CHAT, json={"messages": TALK})
    found = {(line["path"], line["status"], line["completion_tokens"]): line for line in lines(file, 5)}
    line = found[CHAT, 200, usage["completion_tokens"]]
    assert (line["key"], line["caller_id"], line["model"], line["address"]) == ("key 1", "theirs", "tiny", "127.0.0.1")
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert found["/page/replies", 200, 3]["seconds"] > 0
    assert found[CHAT, 401, 0]["key"] == "anyone"
    assert "dedent" not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_audit_log_begins_new_files(tmp_path):
    log = AuditLog(tmp_path / "log", size=1_000, files=2)
    for i in range(100):
        log.write(number=i, text="x" * 50)
    log.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "log.1", "log.2"]
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["number"] == 99
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"audit: got .*cannot be written"):
        AuditLog(tmp_path / "none" / "log")


def test_metrics_are_prometheus_and_count_every_text(server):
    def read():
        text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer root"}).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        samples = {(s.name, s.labels.get("le")): s.value for f in families.values() for s in f.samples}
        return families, samples

    _, before = read()
    post(server, messages=TALK, max_tokens=9, n=3, ignore_eos=True)
    families, after = read()
    for name in ("queue_seconds", "first_token_seconds", "token_seconds", "text_seconds", "text_tokens"):
        full = f"gptjax_{name}"
        assert families[full].type == "histogram"
        count = after[f"{full}_count", None]
        assert count - before.get((f"{full}_count", None), 0) == 3
        bounds = [value for (sample, bound), value in after.items() if sample == f"{full}_bucket" and bound]
        assert bounds == sorted(bounds)
        assert bounds[-1] == count
    assert after["gptjax_text_tokens_sum", None] - before.get(("gptjax_text_tokens_sum", None), 0) == 27
    rows = after["gptjax_decode_rows_total", None] - before["gptjax_decode_rows_total", None]
    calls = after["gptjax_decode_calls_total", None] - before["gptjax_decode_calls_total", None]
    assert 1 < rows / calls <= 3, "choices share calls"
    queue, first, whole = (after[f"gptjax_{name}_seconds_sum", None] for name in ("queue", "first_token", "text"))
    assert queue <= first <= whole
    # Names and types of the gateway's model server protocol.
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert families[name].type == "gauge"
    (info,) = families["vllm:cache_config_info"].samples
    assert info.labels == {"model_name": "tiny", "block_size": "16", "num_gpu_blocks": str(server.engine.pages.count)}
