"""Which scheme each linear takes on one kind of hardware: from measurements to a plan, as data."""
