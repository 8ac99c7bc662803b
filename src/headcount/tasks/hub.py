"""Whether the hub answers: it is asked once, before the libraries ask it for each of many files.

Where there is no network, huggingface_hub tries a request six times over 23 s, and up to 10 s more for each try that is
dropped in silence; datasets lets it do so for every task: 6 min 26 s for the 16 tasks of the paper. So one short
request goes first, and where it is not answered, both libraries go on offline, as with HF_HUB_OFFLINE=1: what is cached
is read, and whatever else is asked for is refused at once.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading

from huggingface_hub import constants, get_session
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever of its versions the hub uses

from headcount.errors import first_line


# Kept for the process, as the libraries' own switch is that this turns.
@functools.cache
def answers() -> bool | None:
    """Whether the hub answers; asked once in a process, and where it does not, the libraries are put offline.

    Any answer counts, an error too: that a name is unknown is told by a network that is there. The wait is as long as
    huggingface_hub itself gives such a request (HF_HUB_ETAG_TIMEOUT), but with everything in it: looking the host up,
    which knows no limit of its own, and every address that the host has.

    Returns:
        None where it was not asked, since the user has chosen to be offline.
    """
    if constants.is_offline_mode():
        return None
    answered = threading.Event()
    asking = threading.Thread(target=_ask, args=(answered,), daemon=True)
    asking.start()
    asking.join(constants.HF_HUB_ETAG_TIMEOUT)
    if not answered.is_set():
        _go_offline()
    return answered.is_set()


def reason(error: BaseException) -> str:
    """Why a request failed; where the hub answered before, it is asked again, since the network may be gone."""
    if isinstance(error, ConnectionError):
        if answers():
            answers.cache_clear()
        if answers() is False:
            return f"{constants.ENDPOINT} does not answer"
    return first_line(error)


def _ask(answered: threading.Event) -> None:
    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, OSError):
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False)
        answered.set()


def _go_offline() -> None:
    constants.HF_HUB_OFFLINE = True  # huggingface_hub and transformers read it at every request
    if "datasets" in sys.modules:  # it keeps a copy, made when it is imported
        import datasets

        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
