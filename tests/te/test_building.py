"""Every family with Transformer Engine's layers: built, filled, exported, marked for gradients."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from megatron_rlsd.runtime.megatron_versions import check_megatron_version
from tests.distributed.ranks import run_on_ranks
from tests.te.engine import BEFORE, IS_REAL
from tests.te.models import family_configs, save_families

FAMILIES = tuple(family_configs())
WITH_EXPERTS = ("qwen3_moe", "mixtral", "deepseek_v3")
IN_CI = ("qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
RECIPES = ("current", "blockwise", "mxfp8")
TP2_SP = {"tensor": 2, "sequence": True}
LAYOUTS: list[dict[str, Any]] = [TP2_SP, {"expert": 2}, TP2_SP | {"expert": 2, "expert_tensor": 1}]

pytestmark = pytest.mark.megatron_range


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A line for each model in each layout; with the stand-in, of some models in two processes."""
    from tests.te.building import Built, build_all

    folder = tmp_path_factory.mktemp("families")
    families = FAMILIES if IS_REAL else IN_CI
    save_families(folder, families)
    plain = [Built(family) for family in families]
    local = [Built(family, "local", grouped=False) for family in families]
    sequential = [Built(family, grouped=False) for family in families if family in WITH_EXPERTS]
    eight_bit = [Built(family, fp8=fp8) for family in families for fp8 in RECIPES if IS_REAL]
    every = [*plain, *local, *sequential, *eight_bit]
    of_experts = [each for each in every if each.family in WITH_EXPERTS]
    two = [(layout, of_experts if "expert" in layout else every) for layout in LAYOUTS]
    lines = []
    for ranks, cases in ((1, [({}, every)] * IS_REAL), (2, two)):
        if not cases:
            continue
        out = folder / f"{ranks}.json"
        run_on_ranks(
            *(build_all, ranks, str(folder), str(out), cases),
            seconds=900,
            worlds=len(cases) + 1,
            before=BEFORE,
        )
        lines += json.loads(out.read_text())
    return lines


def test_families_load_and_export_bit_for_bit(built: list[dict[str, Any]]) -> None:
    assert len(built) > (100 if IS_REAL else 10)
    different = {(str(b["parallel"]), b["name"]): b["different"] for b in built if b["different"]}
    assert not different


def test_every_parameter_has_its_place_in_a_checkpoint(built: list[dict[str, Any]]) -> None:
    """Beside parts that have nothing to save: the fused activation."""
    unsaved = {(str(b["parallel"]), b["name"]): b["unsaved"] for b in built if b["unsaved"]}
    assert not unsaved


def test_the_layers_are_transformer_engines(built: list[dict[str, Any]]) -> None:
    for line in built:
        grouped = "TEColumnParallelGroupedLinear" in line["modules"]
        engine = "TERowParallelLinear" in line["modules"]
        expected = "transformer_engine" in line["name"]
        assert engine == expected, line["name"]
        has_experts = line["name"].split()[0] in WITH_EXPERTS
        assert grouped == (expected and has_experts and "sequential" not in line["name"])


def test_marks_that_this_megatron_release_sets_wrong(built: list[dict[str, Any]]) -> None:
    """Known ones, named; a release that sets others is seen here."""
    found: dict[str, set[str]] = {}
    for line in built:
        for each in line["corrected"]:
            kind = re.sub(r"\d+", "N", each["name"])
            change = ", ".join(
                f"{key}: {each['found'][key]} -> {each['wanted'][key]}"
                for key in each["found"]
                if each["found"][key] != each["wanted"][key]
            )
            found.setdefault(f"{kind}: {change}", set()).add(f"{line['parallel']} {line['name']}")
    for change, where in sorted(found.items()):
        print(f"{change}: {len(where)} models, such as {min(where)}")
    major, minor, *_ = check_megatron_version()
    known = KNOWN[major, minor]
    assert set(found) == known


GROUPED = "decoder.layers.N.mlp.experts.local_experts.N.linear_fcN.weight"
DOWN = "decoder.layers.N.self_attention.linear_{}_down_proj.weight"
KNOWN: dict[tuple[int, int], set[str]] = {
    (0, 16): {
        # Missing from the gradient norm but on the first tensor-parallel rank.
        f"{GROUPED}: tensor_model_parallel: False -> True",
        # In it once for each tensor-parallel rank.
        *(f"{DOWN.format(of)}: tensor_model_parallel: True -> False" for of in ("q", "kv")),
    },
    (0, 19): set(),
}

SPLIT = (True, True, False)
WHOLE = (False, True, True)
BY_HAND = {
    r"(embedding\.word_embeddings|output_layer)\.weight": SPLIT,
    r".*linear_(qkv|proj|fc1|fc2|q_up_proj|kv_up_proj)\.(weight|bias)": SPLIT,
    r".*(layernorm|layer_norm)\.?_?weight": WHOLE,
    r".*router\.weight": WHOLE,
    r".*linear_(q|kv)_down_proj\.weight": WHOLE,
}


def test_marks_are_those_written_here_by_hand(built: list[dict[str, Any]]) -> None:
    """At tensor parallel 2 with sequence parallelism, where each of them matters."""
    checked = 0
    for line in (b for b in built if b["parallel"].get("tensor") == 2):
        own_groups = line["parallel"].get("expert", 1) > 1
        for name, marks in line["marks"].items():
            if ".experts." in name:
                wanted = (True, not own_groups, False)
            else:
                (wanted,) = {v for k, v in BY_HAND.items() if re.fullmatch(k, name)}
                if "down_proj" in name and "local" in line["name"]:
                    wanted = SPLIT
            assert tuple(marks.values()) == wanted, (line["parallel"], line["name"], name)
            checked += 1
    assert checked > (1000 if IS_REAL else 100)
