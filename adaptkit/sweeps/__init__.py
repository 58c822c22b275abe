"""Many runs: what a suite asks for, what of it is done, who does the rest, and reading it all back."""
