"""llama.cpp as an OpenAI-compatible server on loopback, JSON schemas as grammars; needs `pip install xllamacpp`.

python -m benchmarks.llama_cpp_server SmolLM2-135M-Instruct.Q4_1.gguf 8912
"""

import sys
import time

import xllamacpp


def main() -> None:
    """Serves the GGUF file on the port until it is ended."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
    parameters.hostnames = ["127.0.0.1"]
    parameters.n_ctx, parameters.n_parallel = 8192, 4
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
