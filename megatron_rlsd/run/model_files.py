"""What goes along with a run's weights, in exports and in checkpoints: as this run used it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.data import Tokenizer
from megatron_rlsd.hf_bridge.companions import without_code, write_json
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object
from megatron_rlsd.runtime.small_files import own_files

LICENCES = ("LICENSE*", "NOTICE*")
GENERATION = "generation_config.json"


class ModelFiles:
    """The run's tokenizer and chat template, the tokens at which its responses ended, licences.

    The model's own folder may have another tokenizer, no template, and end tokens at which no
    response of the run ended: with those an export would be prompted otherwise than it was trained.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Raises UserError for files of the model's folder that cannot go along."""
        source = Path(config.model.hf_path)
        self._tokenizer = tokenizer
        self._licences = own_files(source, LICENCES)
        ids = _special_ids(config, tokenizer)
        generation = source / GENERATION
        self._generation = (read_json_object(generation) if generation.exists() else {}) | ids
        self.hf_config = without_code(hf_config) | ids
        """config.json of the export."""

    def write(self, folder: Path) -> None:
        """Everything but config.json and weights; ``folder`` has its config.json already."""
        self._tokenizer.save(folder)
        write_json(folder / GENERATION, self._generation)
        for path in self._licences:
            shutil.copyfile(path, folder / path.name)

    def write_with_config(self, folder: Path) -> None:
        """Everything but weights, into a new folder."""
        folder.mkdir()
        write_json(folder / "config.json", self.hf_config)
        self.write(folder)


def refuse_to_write_over_the_model(config: Config) -> None:
    """Raise UserError if an export of this run would replace the folder that it starts from."""
    source, exports = Path(config.model.hf_path), Path(config.run_dir) / "hf"
    if source.resolve().is_relative_to(exports.resolve()):
        raise UserError(
            f"model.hf_path={source} lies in {exports}, which this run writes; choose another "
            "run_dir"
        )


def _special_ids(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    stops: Sequence[int] = list(
        dict.fromkeys((*tokenizer.stop_token_ids, *config.rollout.stop_token_ids))
    )
    ids: dict[str, Any] = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
    if config.tokenizer.path is not None:
        # The others of the model's folder may be words of this tokenizer.
        ids |= {
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return ids
