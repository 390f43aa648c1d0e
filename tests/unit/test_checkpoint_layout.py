"""What ``lm.resume`` knows of the layout of Lightning's checkpoints is still so."""

import inspect

import lightning as L


def test_lightning_keeps_the_progress_of_a_fit_where_it_kept_it() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    state = trainer.fit_loop.state_dict()
    counters = {"ready", "started", "processed", "completed"}
    assert state["epoch_loop.batch_progress"].keys() == {"total", "current", "is_last_batch"}
    assert state["epoch_loop.batch_progress"]["current"].keys() == counters
    assert state["epoch_progress"].keys() == {"total", "current"}
    assert state["epoch_progress"]["current"].keys() == counters
    assert state["epoch_loop.state_dict"].keys() == {"_batches_that_stepped"}
    assert 'state_dict["combined_loader"]' in inspect.getsource(type(trainer.fit_loop))
    assert isinstance(trainer.fit_loop.epoch_loop.restarting, bool)
