"""Serves the policy of a configuration by vLLM, and starts the server again when it dies.

python experiments/serve.py --config math.yaml --port 8001 [--host 10.0.0.5] [--key value] [--print-command]
"""

from ogls.system.startup import defer_torchmetrics

defer_torchmetrics()

from ogls.serve import main  # noqa: E402 - Lightning comes in here

if __name__ == "__main__":
    main()
