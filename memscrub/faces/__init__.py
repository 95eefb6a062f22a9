"""The faces of a report: each module writes one report in one format that other tools or people read."""
