"""One generation a test in the default run: which one follows from the test's name, so that they take turns."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

GENERATIONS = ("gemma", "gemma2", "gemma3_text")
# Theirs are `slow` where they are costly: tests/test_other_generations.py compiles each in the default run.
OTHERS = ("vaultgemma", "gemma4_text")
# Where a case takes an export, a calibration or a run of a model.
COSTLY = tuple(
    f"tests/{part}"
    for part in (
        *("graph/", "runtime/", "quantization/", "backends/", "parity/", "evaluation/", "split/"),
        *("test_quantized_artifact.py", "test_divided.py", "test_staging.py", "test_as_documented.py"),
        "source_code/test_training.py",
    )
)
# Tests of seconds, or of many cases: so many cases, evenly spaced, are in the default run.
A_FEW = {
    "tests/runtime/test_draft.py::test_what_is_drawn_keeps_the_distribution": 2,
    "tests/runtime/test_assistant.py::test_guesses_are_transformers_and_greedy_text_is_the_targets": 3,
    "tests/runtime/test_assistant.py::test_a_drafter_of_another_model_is_refused": 1,
    "tests/runtime/test_assistant.py::test_another_tokenizer_and_caches_of_a_window_are_refused": 0,
    "tests/runtime/test_assistant.py::test_a_drafter_of_a_shorter_context_guesses_no_more_at_its_end": 0,
    "tests/runtime/test_assistant.py::test_replies_of_one_session_follow_each_other": 1,
    "tests/runtime/test_assistant.py::test_the_gate_sees_what_is_wrong": 1,
    "tests/runtime/test_assistant.py::test_int8_drafters_are_proven_and_guess": 0,
    "tests/backends/test_target.py::test_an_artifact_is_proven_whole_and_says_what_it_is": 1,
    "tests/backends/test_window.py::test_an_artifact_is_proven_and_says_which_layers": 1,
    "tests/backends/test_openvino.py::test_an_artifact_is_proven": 2,
    "tests/backends/test_openvino.py::test_the_gate_sees_a_wrong_graph": 1,
    "tests/backends/test_openvino.py::test_what_a_config_may_say_else": 2,
    "tests/backends/test_tvm.py::test_an_artifact_is_proven": 2,
    "tests/backends/test_tvm.py::test_the_gate_sees_weights_that_a_function_should_not_have": 1,
    "tests/backends/test_tvm.py::test_the_gate_sees_a_library_of_another_model": 0,
    "tests/backends/test_tvm.py::test_another_machine_gets_object_files_that_are_not_run": 0,
    "tests/native/test_backend.py::test_a_table_by_rows_whose_columns_are_folded_compiles_proven": 0,
    "tests/serve/test_cluster.py::test_a_killed_replica_is_started_again_and_nobody_waits_for_ever": 0,
    "tests/serve/test_cluster.py::test_a_node_that_lacks_something_is_refused_by_its_name": 1,
    "tests/backends/test_cache_codes.py::test_logits_are_transformers_with_such_a_cache": 3,
    "tests/backends/test_cache_codes.py::test_genai_and_our_engine_give_its_greedy_tokens": 1,
    "tests/backends/test_cache_codes.py::test_the_gate_sees_what_is_wrong_with_a_cache": 1,
    "tests/test_quantized_artifact.py::test_compiles_proven_and_repeats_its_twin": 0,
    "tests/runtime/test_session.py::test_strict_int8_session_keeps_the_dequantized_matmuls": 1,
    "tests/runtime/test_session.py::test_scales_of_another_type_are_refused_by_a_sentence": 1,
    "tests/calibration/test_command.py::test_it_prints_a_table_and_progress_and_says_where_the_result_is": 0,
    "tests/test_taken_over.py::test_gguf_blocks": 1,
    "tests/test_quantized_artifact.py::test_tables_groups_and_divisions_pass_the_gate": 0,
    "tests/test_quantized_artifact.py::test_the_fast_session_takes_groups": 0,
    "tests/runtime/test_session.py::test_fast_session_gives_the_numbers_of_orts_own_rewriting": 0,
    "tests/runtime/test_runner.py::test_strict_bfloat16_weights_lose_nothing_of_a_bfloat16_checkpoint": 0,
    "tests/parity/test_parity_command.py::test_against_an_artifact_of_the_same_scheme": 0,
    "tests/parity/test_parity_command.py::test_text_of_the_users_own": 0,
    "tests/parity/test_gate_fails.py::test_gemma_2_with_its_layers_in_the_wrong_order": 0,
    "tests/parity/test_gate_fails.py::test_one_rotary_base_for_all_layers": 0,
    "tests/parity/test_gate_fails.py::test_a_weight_that_is_no_number": 1,
    "tests/parity/test_gate_fails.py::test_gemma_2_without_the_attention_cap_of_one_layer": 1,
    "tests/evaluation/test_record.py::test_killed_between_manifest_and_files_the_next_evaluation_finishes_it": 1,
    "tests/test_whole_or_not.py::test_a_calibration_that_another_process_made_meanwhile_is_taken": 0,
    "tests/parity/test_sensitivity.py::test_it_is_what_transformers_loses": 0,
    "tests/artifact/test_outside.py::test_a_manifest_that_names_something_outside_is_refused": 2,
    "tests/graph/test_export.py::test_shifted_positions_are_seen": 0,
    "tests/test_compile.py::test_a_recipe_can_switch_the_gate_off_but_not_the_verdict": 0,
    "tests/finetune/test_training.py::test_losses_and_adapter_are_those_of_trl": 1,
    "tests/quantization/test_kv_cache.py::test_compiles_proven_with_half_the_bytes": 0,
    "tests/evaluation/test_exam.py::test_choices_and_accuracy_are_transformers": 1,
    "tests/test_new_generation.py::test_it_compiles_proven": 0,
    "tests/test_graph_cache.py::test_another_graph_is_exported": 0,
    "tests/test_stages_told.py::test_stages_are_named_and_long_ones_counted": 0,
    "tests/test_serving.py::test_compiling_and_proving_without_calibration_needs_build_alone": 0,
    "tests/quantization/test_layers.py::test_kill_9_loses_the_layer_at_work_and_nothing_else": 0,
    "tests/test_wheel.py::test_the_installed_program_lists_its_recipes_takes_their_names_and_has_its_pages": 0,
    "tests/params/test_resume.py::test_killed_at_many_moments_the_bytes_are_the_same": 0,
    "tests/calibration/test_store.py::test_a_damaged_result_is_refused_and_made_again": 3,
    "tests/test_stage_keys.py::test_the_stages_that_read_an_input": 6,
    "tests/split/test_split.py::test_a_killed_split_leaves_nothing_that_looks_finished_and_continues": 0,
    "tests/test_whole_or_not.py::test_killed_at_many_moments": 1,
    "tests/test_whole_or_not.py::test_numbers_that_json_cannot_hold_become_null": 0,
    "tests/test_reading.py::test_small_files_do_not_become_gigabytes": 1,
    "tests/test_api.py::test_an_example_runs": 2,
    "tests/checkpoint/adapters/test_as_peft.py::test_every_field": 12,
    "tests/checkpoint/adapters/test_as_peft.py::test_what_stays_tied": 3,
    "tests/checkpoint/adapters/test_as_peft.py::test_a_resized_vocabulary": 4,
    "tests/checkpoint/adapters/test_as_peft.py::test_several_adapters": 2,
    "tests/test_merge.py::test_what_another_adapter_left_is_not_continued": 0,
    "tests/test_provenance.py::test_every_module_that_a_stage_really_imports_counts": 3,
    "tests/quantization/test_power_cut.py::test_what_is_lost_is_made_again": 3,
    "tests/recipe/test_environment.py::test_what_is_wrong_with_the_largest_recipes_is_said_at_once_and_in_short": 2,
    "tests/evaluation/test_perplexity.py::test_an_artifact_against_its_checkpoint": 1,
    "tests/graph/test_worker.py::test_what_the_passes_did_is_logged_in_the_parent": 0,
    "tests/test_dry_run.py::test_the_calibration_text_is_said_in_one_line": 0,
    "tests/quantization/test_workers.py::test_a_killed_worker_is_said_and_another_number_of_workers_continues": 0,
    "tests/quantization/test_workers.py::test_processes_give_the_same_bytes_ranges_and_errors": 0,
    "tests/evaluation/test_perplexity.py::test_two_artifacts_side_by_side_need_no_checkpoint": 0,
    "tests/text/test_budget.py::test_the_real_limits_end_loops_as_well": 1,
    "tests/text/test_budget.py::test_a_runaway_template_ends_within_seconds_and_a_gigabyte": 40,
    "tests/parity/test_parity_command.py::test_against_an_artifact_of_another_scheme": 0,
    "tests/test_new_generation.py::test_it_is_staged_split_and_refused_by_its_names": 0,
    "tests/quantization/test_workers.py::test_a_killed_run_leaves_no_process_and_one_process_continues_it": 0,
    "tests/parity/test_gate_fails.py::test_the_norms_that_gemma_3_has_more": 1,
    "tests/parity/test_gate_fails.py::test_an_intact_copy_passes": 1,
    "tests/parity/test_segments.py::test_equals_the_whole_graphs_at_the_prompt_end_and_every_step": 1,
    "tests/test_compile.py::test_kill_9_at_any_moment_and_run_again": 5,
    "tests/test_child.py::test_processes_that_calibrate": 0,
    "tests/evaluation/test_exam.py::test_side_by_side": 0,
    "tests/evaluation/test_perplexity.py::test_the_default_fits_the_artifact_and_less_text_than_asked_for_is_said": 0,
    "tests/test_compile.py::test_a_failed_gate_says_what_to_do": 0,
    "tests/test_divided.py::test_the_gate_proves_the_parts": 0,
    "tests/test_divided.py::test_in_float64_ranks_of_every_generation_are_the_whole": 0,
    "tests/quantization/test_rescaling.py::test_a_second_run_does_not_measure_again": 0,
    "tests/quantization/test_kv_cache.py::test_the_calibrated_factors_are_the_largest_magnitudes_of_transformers": 0,
    "tests/quantization/test_activations.py::test_kept_linears_are_listed_and_read_their_inputs_as_they_are": 0,
    "tests/parity/test_sensitivity.py::test_it_can_be_left_out": 0,
    "tests/runtime/test_runner.py::test_strict_float16_follows_the_stock_model": 0,
    "tests/runtime/test_engine.py::test_text_is_transformers_greedy_text": 1,
    "tests/graph/test_worker.py::test_the_child_gives_the_same_bytes": 0,
    "tests/test_quantized_artifact.py::test_int4_is_packed_as_onnx_packs_it": 0,
    "tests/runtime/test_session.py::test_ort_alone_rounds_activations_to_int8": 0,
    "tests/calibration/test_manifest.py::test_the_manifest_holds_the_fingerprint_of_the_text": 0,
    "tests/test_examples.py::test_the_static_loop_gives_transformers_tokens_until_the_cache_is_full": 1,
    "tests/graph/test_export.py::test_every_module_output_is_named": 0,
    "tests/test_divided.py::test_every_share_of_a_linear_is_read_in_blocks_of_its_own": 0,
    "tests/graph/test_export.py::test_disagreeing_parameters_are_listed_at_once": 0,
    "tests/parity/test_adapted.py::test_it_is_peft_s_own_model": 4,
    "tests/parity/test_merged.py::test_a_merge_passes": 4,
    "tests/finetune/test_training.py::test_held_out_loss_is_that_of_peft": 0,
    "tests/finetune/test_training.py::test_what_is_left_in_out": 0,
    "tests/finetune/test_resume.py::test_a_checkpoint_that_is_not_whole_is_passed_over": 0,
    "tests/finetune/test_codes.py::test_only_the_adapter_is_trained_and_the_other_way_is_measured": 0,
    "tests/finetune/test_command.py::test_from_python": 0,
    "tests/finetune/test_training.py::test_answers_alone_are_learned_as_trl_does_it": 0,
    "tests/test_new_back_end.py::test_it_compiles_proven_to_the_same_bytes_and_every_command_takes_it": 0,
    "tests/test_compile.py::test_out_names_the_directory_and_a_second_export_gives_the_same_bytes": 0,
    "tests/test_graph_cache.py::test_another_checkpoint_of_the_shape_exports_nothing_and_gets_its_own_weights": 0,
    "tests/quantization/test_kv_cache.py::test_a_killed_run_measures_the_cache_once": 0,
    "tests/graph/test_worker.py::test_an_error_comes_back_whole": 0,
    "tests/finetune/test_plan.py::test_the_disk_holds_what_a_run_writes": 0,
    "tests/source_code/test_encoder.py::test_a_wrong_mask_is_seen": 5,
    "tests/source_code/test_encoder.py::test_what_the_second_computes_otherwise_is_seen": 4,
    "tests/backends/test_encoder.py::test_a_wrong_graph_is_seen": 5,
    "tests/backends/test_encoder.py::test_a_text_alone_is_what_it_is_in_company": 1,
    "tests/test_embed2.py::test_the_gate_sees_a_wrong_graph": 0,
    "tests/calibration/test_beside.py::test_a_stopped_run_goes_on_and_makes_lost_files_again": 2,
    "tests/parity/test_dynamic.py::test_codes_in_the_other_convention": 1,
    "tests/parity/test_dynamic.py::test_a_window_wider_or_narrower_by_one": 2,
    "tests/native/test_backend.py::test_a_token_gives_the_same_bits_whatever_its_company": 1,
    "tests/text/test_as_transformers.py::test_a_tokenizer_inside_a_gguf_file": 5,
    "tests/chat/test_parser.py::test_what_the_published_templates_write_is_read_back": 3,
}


def all_but_a_few(names: Sequence[str]) -> set[int]:
    """Numbers of the cases of `A_FEW` that are left out; the cases of a test as they follow each other.

    Args:
        names: of the test of each case.
    """
    gone = set()
    for test, few in A_FEW.items():
        cases = [number for number, name in enumerate(names) if name == test]
        stay = {cases[len(cases) * turn // few] for turn in range(few)} if cases else set()
        gone |= set(cases) - stay
    return gone


def of_others(cases: Iterable[tuple[str, Mapping[str, object]]]) -> set[int]:
    """Numbers of the cases of `OTHERS`; `cases` as in `left_out`."""
    return {number for number, (_, parameters) in enumerate(cases) if set(OTHERS) & {*map(str, parameters.values())}}


def left_out(cases: Iterable[tuple[str, Mapping[str, object]]]) -> set[int]:
    """Numbers of the cases that another generation stands for.

    Cases that differ in the generation alone are one group: one of them stays, chosen by the name of the test and by
    what else it is given.

    Args:
        cases: (name of the test, its parameters) of each.
    """
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, (name, parameters) in enumerate(cases):
        found = [key for key, value in parameters.items() if isinstance(value, str) and value in GENERATIONS]
        if len(found) == 1:
            others = sorted((key, repr(value)) for key, value in parameters.items() if key != found[0])
            groups[f"{name} {others}"].append((str(parameters[found[0]]), number))
    return {number for name, group in groups.items() for number in _others(name, group)}


def _others(name: str, group: Sequence[tuple[str, int]]) -> list[int]:
    chosen = sorted(group)[zlib.crc32(name.encode()) % len(group)]
    return [number for generation, number in group if (generation, number) != chosen]
