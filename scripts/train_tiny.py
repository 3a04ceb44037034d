"""Trains `tiny` from Debian's dataset-fashion-mnist: judge, autoencoder, then text encoder and UNet.

    python scripts/train_tiny.py --data /usr/share/datasets/fashion-mnist --out build/tiny

Stages that are done already (their file is in the output folder) are skipped; a stopped UNet run continues. What sdc
ships is then in OUT/models, to be copied to compiler/models.
"""

from sdc.compiler.tiny.train import main

if __name__ == "__main__":
    main()
