"""Record and replay: the inputs of attribution as JSON Lines, and the same ledger run over them again."""
