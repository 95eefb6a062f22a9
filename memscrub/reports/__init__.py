"""What a run found out, as plain values: judgements, verdict, report; knows no torch."""
