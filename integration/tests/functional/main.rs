//! What one mesh does for its users, by every way in, on real microVMs.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends where something is not as expected")]

mod agents;
mod browser;
mod chains;
mod checkpoints;
mod clients;
mod clones;
mod commands;
mod files;
mod followed;
mod grafts;
mod hibernation;
mod host;
mod main_job;
mod names;
mod network;
mod packages;
mod ports;
mod previews;
mod refusals;
mod sessions;
mod tenants;
mod tiers;
mod tls;
mod watch;

use std::process::ExitCode;

use oc_integration::{mesh::Mesh, suite};

fn main() -> ExitCode {
    let suite = suite! {
        main_job:
            the_main_job_is_done_from_create_to_delete,
            a_token_is_enough_for_its_sandbox,
            an_idle_sandbox_hibernates_by_itself,
            every_size_boots_and_has_what_it_says;
        commands:
            a_command_has_what_it_was_given,
            a_command_ends_as_it_ends,
            a_timeout_kills_the_commands_group_alone,
            what_a_command_leaves_running_runs_on,
            output_is_exact_and_bounded,
            a_long_command_keeps_its_client_waiting,
            many_commands_run_at_once,
            the_first_process_survives_what_is_done_to_it;
        sessions:
            a_session_takes_and_gives_every_byte,
            a_session_goes_on_through_hibernation,
            a_terminal_is_one,
            a_flood_waits_for_its_reader_and_disturbs_no_other,
            a_session_ends_as_it_was_told_to,
            a_command_that_takes_long_is_asked_after,
            bad_sessions_are_refused,
            there_is_an_end_to_sessions_and_attachments;
        files:
            a_file_comes_back_as_it_went,
            a_large_file_streams_through_small_processes,
            readers_that_stand_still_hold_up_nobody,
            a_broken_upload_leaves_what_was_there,
            directories_are_made_listed_moved_and_removed,
            a_full_disk_is_told_and_is_left,
            a_tree_comes_back_as_an_archive,
            what_happens_in_a_directory_is_told;
        ports:
            a_port_of_a_sandbox_is_one_of_this_machine,
            a_port_is_reached_wherever_its_server_listens;
        agents:
            an_agent_does_what_it_is_told,
            an_agent_that_is_interrupted_waits_for_the_next_prompt,
            an_agent_goes_on_with_an_earlier_conversation,
            an_agent_tells_the_apis_errors_and_goes_on,
            a_wrapper_takes_whatever_it_is_told,
            an_agent_that_dies_ends_alone;
        clones:
            clones_are_strangers_to_each_other,
            a_clone_knows_the_time;
        network:
            a_sandbox_reaches_the_world_and_goes_on_to,
            a_sandbox_that_may_reach_nothing_does_not,
            a_hostile_sandbox_reaches_nothing_that_it_should_not,
            two_meshes_of_one_machine_do_not_meet,
            a_mesh_without_a_network_is_of_use;
        hibernation:
            a_sandbox_wakes_where_it_was,
            any_call_wakes_a_sandbox,
            a_call_under_way_is_told_that_its_sandbox_sleeps,
            damaged_memory_leads_to_a_boot_from_the_disk,
            writers_lose_nothing_however_often_their_sandbox_sleeps;
        tiers:
            a_paused_sandbox_goes_on_whatever_dies,
            a_paused_sandbox_makes_room;
        checkpoints:
            a_checkpoint_is_gone_back_to_and_branched_from,
            a_running_sandbox_branches_while_it_goes_on,
            a_fork_has_ssh_host_keys_of_its_own,
            forks_share_what_none_of_them_changed,
            bad_checkpoints_and_forks_are_refused,
            there_is_an_end_to_checkpoints,
            a_damaged_checkpoint_is_told_and_never_served,
            a_checkpoint_that_is_deleted_disturbs_no_fork,
            writers_lose_nothing_however_their_sandbox_branches;
        grafts:
            a_live_fork_goes_on_in_a_clone_that_waited,
            a_busy_sandbox_is_forked_into_clones_that_waited,
            a_stored_sandbox_wakes_in_a_clone_that_waited;
        chains:
            each_checkpoint_of_a_chain_is_its_own_moment,
            sandboxes_live_on_a_filesystem_of_their_own;
        refusals:
            bad_creates_are_refused,
            bad_commands_are_refused,
            bad_paths_are_refused,
            bad_requests_are_refused,
            bad_credentials_are_refused;
        tenants:
            another_tenants_sandbox_is_not_there,
            a_revoked_key_opens_nothing;
        watch:
            every_change_is_seen_once_however_often_the_stream_is_cut,
            a_watch_says_what_it_cannot_show;
        clients:
            the_published_python_client_works_unmodified,
            the_published_typescript_client_works_unmodified,
            oc_does_the_main_job,
            a_grpc_client_needs_no_proto_files;
        browser:
            a_terminal_in_a_browser_outlives_what_serves_it;
        previews:
            a_page_in_a_sandbox_is_opened_before_and_after_it_slept,
            a_preview_asks_for_its_token_and_wakes_nobody_without;
        tls:
            all_of_it_works_by_tls;
        host:
            a_vmm_is_nobody_and_bounded,
            nothing_secret_is_logged;
    };
    // Long enough for some that are woken soon, and no longer than a test waits for.
    suite.run(|| Mesh::start(&["--pool-size", "2", "--paused-for", "1"]), Mesh::stop)
}
