"""Do these blocks, skip those that exist: alone, under MPI, in a Slurm array.

    with find_team() as team, StopFlag() as stop, Lease.take(run_folder, team) as lease:
        outcome = run_blocks(blocks, work, lease=lease, stop=stop, how=How(preload=("torch",)))

- `team.find_team() -> Team(kind, rank, size, token, job, restart)`; as a context manager it ends all ranks of
  MPI if one fails. `team.exit_code(fault)` is the status a command ends with.
- `lease.Lease.take(folder, team, *, sweep=(), beat_s=5.0) -> Lease`; `.check()`, `.release()`.
- `stop.StopFlag()`: `bool(stop)`, `stop.check()`, `stop.set(reason)`, `stop.reason`.
- `blocks.Block(index, path, size=1)`; `blocks.How(processes=None, preload=(), item_timeout_s=60.0, retries=1,
  label="blocks", stop_grace_s=10.0)`.
- `blocks.run_blocks(blocks, work, *, lease, stop=None, how=None) -> Outcome(done, skipped, elsewhere,
  culprits, failed, counts)`, `failed` being a list of `board.Failure(block, reason, kind)`.
- `work(block, draft, cursor) -> dict[str, number] | None` writes the file `draft`, is picklable, and calls
  `cursor.at(item)` before each risky item; `cursor.culprits` says which items to record as 'crash' or
  'timeout'; `cursor.rest()` goes before what is no item's fault; `cursor.keep` is a path for finished pieces.
  `cursor` is a `worker.Cursor`.
- `blocks.once(path, make, *, lease, stop=None) -> bool`: one file by `make(draft)` on one member; the others
  wait for it.

Import from the modules: this package imports nothing by itself.
"""
