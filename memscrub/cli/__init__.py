"""The command line: commands, options, what the terminal shows; decides nothing."""
