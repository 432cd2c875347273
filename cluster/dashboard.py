"""The client of a cluster's dashboard, which knows its jobs.

Ray's own client waits for ever, goes where RAY_ADDRESS says whatever it is told, and prints what it does.
"""

from __future__ import annotations

import logging
import os
from typing import Any

REQUEST_S = 60.0  # deadline of each request
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# each has a level of its own
_CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def job_client(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of the dashboard at this address, http://HEAD:8265.

    Token authentication is read from the environment. Raises ConnectionError when nobody answers, and
    `ray.exceptions.AuthenticationError`. It uses a private hook of Ray 2.60, which a test checks.
    """
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, **({"timeout": REQUEST_S} | more))

    kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        return Client(address)
    finally:
        os.environ |= kept
