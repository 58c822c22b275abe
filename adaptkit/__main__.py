"""`python -m adaptkit`: what `adaptkit` does, for launchers that start modules (torchrun -m, accelerate launch -m)."""

from adaptkit.commands.main import main

if __name__ == "__main__":
    main(prog_name="adaptkit")
