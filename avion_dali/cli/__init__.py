"""The command `avion-dali`: one module per subcommand."""
