"""What every strategy is built from: the contract, edits, objectives, the head, the default step."""
