"""Plans for the eye: a terminal table, a timeline, a report."""
