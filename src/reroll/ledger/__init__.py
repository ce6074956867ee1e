"""The ledger of records: tracks that are frozen when they open, and runs that reached a track's target.

records/TRACK/track.toml                 data, target, what is fixed, the rule of significance
records/TRACK/DATE_NAME/record.json      losses, seconds, memory and p-value, all recomputed from
records/TRACK/DATE_NAME/run-0.txt …      one self-contained log per run
"""

from reroll.ledger.log import Log, read_log, write_log
from reroll.ledger.record import submit, verify
from reroll.ledger.track import Track, find_track, tracks

__all__ = ["Log", "Track", "find_track", "read_log", "submit", "tracks", "verify", "write_log"]
