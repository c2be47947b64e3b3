from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokens are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
