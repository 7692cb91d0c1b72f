"""One thread a process: the suite runs on two cores, several processes at a time."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, whoever does it
    if importlib.util.find_spec("triton"):
        import interpreter

        interpreter.hurry()

from hypothesis import settings

torch.set_num_threads(1)

# Why a row has no case of a law, or row by row why each has none. What is missing here leaves a hole in the grid.
EXEMPT = {
    "test_released_blocks": {  # where a row's oracle is that is no released block
        **dict.fromkeys(
            ("gshard", "st_moe", "open_moe", "v_moe"), "test_blocks.py::test_two_experts_a_token_are_those_of_nllb"
        ),
        "sinkhorn": "test_megatron.py::test_sinkhorn",
        "noisy": "test_routers.py::test_noisy_top_k",
        "expert_choice": "test_routers.py::test_expert_choice",
        "base": "test_routers.py::test_base_shares_tokens_out_best",
        "remoe": "test_routers.py::test_remoe_visits_what_is_positive",
        "hash": "test_routers.py::test_the_word_chooses",
        "soft": "test_moe.py::test_soft_moe_is_its_two_matrices",
    },
    **dict.fromkeys(
        (
            "test_two_experts_a_token_are_those_of_nllb",
            "test_softmax_before_or_after_the_choice",
            "test_sigmoid_with_a_bias",
            "test_groups_of_experts",
            "test_balance_losses",
            "test_the_least_probable_are_dropped",
        ),
        "another oracle is enough, or a few rows stand for all",
    ),
    "test_extreme_gates": "no gate a token",
    "test_three_steps_on_every_mesh_are_those_of_one_process": "a few rows stand for all: whole trainings are slow",
    "test_the_bias_chooses_and_never_weighs": "has no balancing bias",
    "test_scans_go_on_from_piece_to_piece_and_keep_only_their_inputs": "its chunks are matrix products",
    "test_groups": "has no groups of experts",
    "test_heads_that_share_keys_equal_heads_with_the_same_keys": "every head of values has keys of its own",
    "test_recomputing_blocks_changes_nothing": "hands nothing to later layers",
    "test_all_experts_without_renormalisation_are_the_dense_mixture": "renormalises, or visits one expert only",
    "test_errors_are_one_clear_line": "has none of these limits",
    "test_the_stack_equals_released_models": "no whole model of a released size to compare with; its block is",
    "test_pieces_equal_the_whole": "not prefix-stable",
    "test_what_a_memory_adds_afterwards": "its memory cannot come late",
    **dict.fromkeys(
        (
            "test_a_row_equals_its_matrix_of_scores",
            "test_documents_do_not_see_each_other",
            "test_a_reversed_sequence_gives_reversed_outputs",
            "test_no_token_at_all",
        ),
        "does not run both ways",
    ),
    "test_low_precision_rounds_once": "a few rows stand for all",
    "test_a_model_sees_every_token_of_a_document": "a few rows stand for all",
    "test_both_ways": "a few rows stand for all",
    "test_a_few_numbers_make_up_the_whole_transition": "its transition is small, or known by its tokens alone",
    "test_a_few_tokens_by_hand": "its oracle is enough",
    "test_chunks_of_more_tokens_than_keys_keep_their_digits": "its chunks solve nothing",
    "test_heads_without_channels_are_refused_in_one_line": "a few rows stand for all",
    "test_heads_that_test_time_training_cannot_have_give_one_line": "takes heads of any size",
    **dict.fromkeys(
        (
            "test_ranks_equal_one",
            "test_drawn_segments_folded_are_the_whole",
            "test_one_gather_each_way_of_a_size_that_does_not_know_the_length",
            "test_a_layer_gathers_its_span_and_its_nearest_neighbours",
        ),
        "not affine in its memory: it has no span",
    ),
    **dict.fromkeys(
        (
            "test_values_and_gradients",
            "test_steps_are_the_whole",
            "test_span",
            "test_sixteen_bits",
            "test_segments",
            "test_from_an_empty_memory",
            "test_documents",
        ),
        "no kernel yet, or the three words of a row above",
    ),
}


def pytest_addoption(parser):
    parser.addoption("--grid", action="store_true", help="print which law ran for which row, and how often")


def pytest_terminal_summary(terminalreporter, config):
    """The grid rows × laws: how many cases passed. An empty cell has its reason, or is a HOLE."""
    if not config.getoption("--grid"):
        return
    from reference.lsm import LSM
    from reference.routers import ROUTER

    passed = [r.nodeid for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    for table in (LSM, ROUTER):
        grid = {}
        for node in passed:
            law, _, case = node.partition("::")[2].partition("[")
            for row in set(case.rstrip("]").split("-")) & set(table):
                grid.setdefault(law, dict.fromkeys(table, 0))[row] += 1
        width = max(map(len, grid), default=0)
        for row in table:
            terminalreporter.write_line(f"\n{row}")
            for law, cases in sorted(grid.items()):
                why = EXEMPT.get(law, "HOLE")
                said = cases[row] or (why if isinstance(why, str) else why.get(row, "HOLE"))
                terminalreporter.write_line(f"    {law:{width}} {said}")


settings.register_profile("ci", deadline=None, derandomize=True, max_examples=15, print_blob=True)
settings.load_profile("ci")
