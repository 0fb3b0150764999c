"""What a deployment would cost and how fast it would run, computed without running it.

``plan.plan(program, deployment)`` is the way in; docs/planner.md says what is computed how.
"""
