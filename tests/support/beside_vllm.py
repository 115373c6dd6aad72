"""Run by the Python of an environment that has vLLM: what transformers loads where vLLM has read a checkpoint's config.

Prints, as JSON, the classes of what it loads with the checkpoint's code and without, or the error's.
"""

import json
import os
import pickle
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def loaded(path, **trusted):
    from transformers import AutoModelForCausalLM

    try:
        return type(AutoModelForCausalLM.from_pretrained(path, **trusted)).__name__
    except Exception as error:
        return type(error).__name__


def main(path, out):
    from vllm.plugins import load_general_plugins
    from vllm.transformers_utils.config import get_config

    load_general_plugins()
    config = get_config(path, trust_remote_code=False)
    same = pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    found = {"sent": same, "not trusted": loaded(path), "trusted": loaded(path, trust_remote_code=True)}
    print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], own)
