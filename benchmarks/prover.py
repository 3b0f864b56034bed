"""sora_fast.proof.child from a checkout that nobody installed.

python -m benchmarks.prover JSON
"""

from benchmarks import _checkout

if __name__ == "__main__":
    _checkout.make_importable()
    from sora_fast.proof.child import main

    main()
