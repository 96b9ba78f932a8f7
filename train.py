"""Train an agent: `python train.py --help`."""

from oversight_rl.cli import train

if __name__ == "__main__":
    train()
