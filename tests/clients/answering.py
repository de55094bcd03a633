"""What the scripts that run in the clients' environments share: REQUEST.json in, one line of JSON out."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path


def serve(answer: Callable[[dict], dict]) -> None:
    """Answer for each model of the request; what fails is answered with the error."""
    found = {}
    for name, model in json.loads(Path(sys.argv[1]).read_text()).items():
        try:
            found[name] = answer(model)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # panics of Rust are not Exceptions
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        gc.collect()
    print("ANSWER" + json.dumps(found))
