"""Every step's loss, also of a run that was broken off."""

import numpy as np
import pytest
from lightning.pytorch import Trainer, seed_everything

from callbacks.checkpoint import AtomicCheckpointIO, last_checkpoint
from callbacks.step_losses import StepLosses
from depthlab import Classifier, ImageData, SimpleNet


def fit(folder, data_dir, epochs):
    folder.mkdir(exist_ok=True)
    seed_everything(3, verbose=False)
    data = ImageData("digits", dir=data_dir, batch_size=32, eval_batch_size=32)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        max_epochs=epochs, limit_train_batches=3, limit_val_batches=0, accelerator="cpu", precision="64-true",
        callbacks=[StepLosses(folder), last_checkpoint(folder)], plugins=[AtomicCheckpointIO()], **quiet,
    )  # fmt: skip
    checkpoint = folder / "last.ckpt"
    trainer.fit(Classifier(SimpleNet(10, 5, 4)), data, ckpt_path=checkpoint if checkpoint.exists() else None)
    return np.load(folder / "losses.npy"), trainer.callback_metrics["train/loss"].item()


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Checkpoint directory", "ignore:The number of training batches")
def test_resumed(tmp_path, data_dir):
    whole, last = fit(tmp_path / "whole", data_dir, 3)
    assert whole.dtype == np.float64
    assert len(whole) == 9
    assert whole[-3:].mean() == pytest.approx(last, rel=1e-6)
    assert len(set(whole)) == 9
    fit(tmp_path / "parts", data_dir, 1)
    np.save(tmp_path / "parts/losses.npy", np.append(np.load(tmp_path / "parts/losses.npy"), [7.0]))  # cut off after 4
    np.testing.assert_array_equal(fit(tmp_path / "parts", data_dir, 3)[0], whole)
    fit(tmp_path / "older", data_dir, 2)
    (tmp_path / "older/losses.npy").unlink()
    np.testing.assert_array_equal(fit(tmp_path / "older", data_dir, 3)[0], [*[np.nan] * 6, *whole[-3:]])
