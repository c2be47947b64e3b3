"""The store of conversations: encrypted, each its owner's alone, deleted by user and by age, exported."""

import json
import sqlite3
import stat
import time

import openai
import pytest
from test_serve import Server

from gptjax.cli.main import main
from gptjax.data.masks import Mask
from gptjax.serve import keys as keys_file
from gptjax.serve.access import Policy
from gptjax.serve.filters import Filters
from gptjax.serve.keys import DAY, Key, Keys
from gptjax.serve.store import Store, new_key
from gptjax.types import UserError

ALICE, BOB = Key("alice", "a"), Key("bob", "b")
SECRET = "my secret is a heron"


def test_a_store_is_read_with_its_key_alone(tmp_path):
    file, first, second = tmp_path / "store", new_key(), new_key()
    store = Store(file, [first])
    store.put("1", ALICE, {"items": [SECRET]})
    assert store.get("1", "a") == {"items": [SECRET]}
    assert store.get("1", "b") is None, "another's"
    store.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SECRET.encode() not in file.read_bytes()
    with pytest.raises(UserError, match="does not open"):
        Store(file, [second])
    store = Store(file, [second, first])  # a new key is put first
    store.put("2", ALICE, {"items": []})
    assert [entry["id"] for entry in store.export("alice")] == ["1", "2"]
    store.close()
    for bad in (["x"], []):
        with pytest.raises(UserError, match="store_key"):
            Store(file, bad)
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "text", [first])


def test_conversations_are_deleted_by_user_and_age(tmp_path, capsys, monkeypatch):
    file, secret = tmp_path / "store", new_key()
    store = Store(file, [secret])
    for i, key in enumerate((ALICE, ALICE, BOB, BOB)):
        store.put(str(i), key, {"items": [SECRET]})
    store.close()
    with sqlite3.connect(file) as db:
        db.execute("update conversations set time = ? where id in ('0', '2')", (time.time() - 40 * DAY,))
    db.close()
    monkeypatch.setenv("GPTJAX_STORE_KEY", secret)
    assert main(["store", "export", str(file), "--user", "alice"]) == 0
    assert [json.loads(line)["items"] for line in capsys.readouterr().out.splitlines()] == [[SECRET]] * 2
    for arguments, deleted in ((["--older-than", "30d"], 2), (["--user", "alice"], 1), (["--user", "alice"], 0)):
        assert main(["store", "delete", str(file), *arguments]) == 0
        assert capsys.readouterr().out == f"{deleted}\n"
    assert main(["store", "delete", str(file)]) == 2
    assert main(["store", "export", str(tmp_path / "none"), "--user", "x"]) == 2


def test_responses_go_on_from_those_before(tmp_path):
    file = tmp_path / "keys.json"
    secrets = [keys_file.add(file, name) for name in ("alice", "bob")]
    store = Store(tmp_path / "store", [new_key()])
    server = Server(policy=Policy(keys=Keys(file), store=store, filters=Filters(inputs=(Mask(),))))
    alice, bob = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0) for secret in secrets)
    try:
        first = alice.responses.create(model="tiny", input="Call 650-253-0000", max_output_tokens=8)
        assert first.store is True
        asked = {"model": "tiny", "max_output_tokens": 8}
        second = alice.responses.create(**asked, input="And?", previous_response_id=first.id)
        said = [{"role": "user", "content": "Call [telephone]"}, *first.output, {"role": "user", "content": "And?"}]
        whole = alice.responses.create(**asked, input=said, store=False)
        assert second.output_text == whole.output_text
        assert second.usage.input_tokens == whole.usage.input_tokens
        assert alice.responses.retrieve(second.id).output_text == second.output_text
        for call in (
            lambda: bob.responses.retrieve(second.id),
            lambda: bob.responses.create(model="tiny", input="x", previous_response_id=first.id),
            lambda: alice.responses.retrieve(whole.id),
            lambda: bob.responses.delete(second.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        kept = [entry["items"][0]["content"] for entry in store.export("alice")]
        assert kept == ["Call [telephone]"] * 2
        alice.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            alice.responses.retrieve(first.id)
    finally:
        for client in (alice, bob):
            client.close()
        server.close()
