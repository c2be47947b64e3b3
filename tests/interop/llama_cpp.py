"""Answers of the real llama.cpp about a GGUF file, in a process of its own.

`python llama_cpp.py FILE`, with the questions as JSON on standard input and the answers on standard output.
"""

import json
import sys
import urllib.request


def main(file: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = 256, 1, 0, 1
    params.warmup = params.fit_params = False
    params.use_jinja = True
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(path: str, **question):
        data = json.dumps(question).encode()
        request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    given = json.load(sys.stdin)
    greedy = {"temperature": 0, "n_predict": given["tokens"], "cache_prompt": False, "return_tokens": True}
    likely = {**greedy, "n_probs": given.get("probabilities", 0), "ignore_eos": True}
    found = {
        "texts": [ask("/tokenize", content=text, add_special=False)["tokens"] for text in given["texts"]],
        "continued": [ask("/completion", prompt=ids, **greedy)["tokens"] for ids in given["prompts"]],
        "likely": [_likely(ask("/completion", prompt=ids, **likely)) for ids in given.get("likely", ())],
        "talks": [],
        "answers": [],
    }
    for talk in given["talks"]:
        prompt = ask("/apply-template", messages=talk)["prompt"]
        found["talks"].append(ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"])
        answer = ask("/v1/chat/completions", messages=talk, max_tokens=given["tokens"], temperature=0)
        found["answers"].append((answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]))
    print("\n" + json.dumps(found))


def _likely(answer) -> list[list[tuple[int, float]]]:
    """Log-probabilities of the likeliest tokens at each place of a greedy text, the chosen one first."""
    return [
        [(top["id"], top["logprob"]) for top in place["top_logprobs"]] for place in answer["completion_probabilities"]
    ]


if __name__ == "__main__":
    main(sys.argv[1])
