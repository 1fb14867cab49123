"""Back to the last good checkpoint, after too many loss spikes in a row.

The weights come from before the first of them, the data goes on behind the last. A run that dies right after it needs
no record: started again it meets the same spikes, and decides the same.
"""

from recap_ds.checkpoint.resume import find_checkpoint, load_checkpoint
from recap_ds.checkpoint.saver import CheckpointSaver
from recap_ds.errors import RunFailed
from recap_ds.train.logbook import Logbook
from recap_ds.train.progress import Progress
from recap_ds.train.session import Session


def roll_back(session: Session, progress: Progress, logbook: Logbook, saver: CheckpointSaver) -> None:
    """RunFailed where the run may not, or cannot, go back. Collective: every rank must call."""
    training, run = session.plan.config.training, session.plan.run
    told = f"step {progress.step}: {progress.spikes_in_a_row} steps in a row were loss spikes, see {run.spikes}"
    if training.spike_action == "skip":
        raise RunFailed(f"{told}; lower the learning rate, or set training.spike_action=rollback; checkpoints are safe")
    if progress.rollbacks >= training.spike_max_rollbacks:
        raise RunFailed(
            f"{told}; rolled back training.spike_max_rollbacks={training.spike_max_rollbacks} times before; lower the "
            "learning rate, or raise training.spike_deviations if these losses are sound"
        )
    session.watch.mark(f"rolling back from step {progress.step}")
    saver.finish()
    last_applied = progress.step - progress.spikes_in_a_row - progress.skipped_in_a_row
    good = find_checkpoint(run.checkpoints, session.runtime, up_to_step=last_applied)
    if good is None:
        raise RunFailed(f"{told}; there is no checkpoint from before them; lower checkpoint.save_every_steps")
    state, tensors = load_checkpoint(good, runtime=session.runtime, engine=session.engine, shadows=session.shadows)
    session.load_tensors(tensors)
    restored = Progress.restore(state)
    restored.next_slot, restored.wandb_id = progress.next_slot, progress.wandb_id
    restored.spikes, restored.rollbacks = progress.spikes, progress.rollbacks + 1
    progress.become(restored)
    saver.rewind(progress.step)
    logbook.rewind(progress.step)
    logbook.say(
        f"warning: {told}; rolled back to step {progress.step} ({progress.rollbacks} of "
        f"training.spike_max_rollbacks={training.spike_max_rollbacks}), going on at slot {progress.next_slot}"
    )
